"""The DataModule from configuration to batches, its reports, its errors; and the preview."""

import io
import json
import logging
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console

from shadowlit.data.conversation import Conversation, DataErrors, gathered, located, raise_all
from shadowlit.data.dataset import DataReport, TokenDataset
from shadowlit.data.module import ShadowData
from shadowlit.data.preview import preview, token_texts
from shadowlit.data.sampler import FILLER
from shadowlit.data.template import Encoded
from shadowlit.data.tokenise import tokenise
from shadowlit.errors import DataError
from tests.data.templates import GEMMA, QWEN3, talk, tokenizer_with, word_tokenizer
from tests.tiny import CHATML, CHATML_UNMARKED, make_tokenizer

PAIR = SimpleNamespace(tokenizer=lambda: make_tokenizer(CHATML))
HEADERS = len("user\n\nassistant\n\n") + 4  # tokens of a question-answer pair beside its two contents


def pair_with(template):
    return SimpleNamespace(tokenizer=lambda: make_tokenizer(template))


@pytest.fixture
def files(tmp_path):
    """Writes conversations to a file and returns its path."""

    def write(name, *rows):
        path = tmp_path / name
        rows = [row if isinstance(row, dict) else {"messages": row} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def numbered(count, start=0):
    return [talk("q", f"{i:03d}") for i in range(start, start + count)]


# -- tokenised sets -----------------------------------------------------------------------------------------------


def encode_numbers(conversation):
    """``a`` unsupervised and ``b`` supervised tokens."""
    a, b = conversation.messages
    return [Encoded(list(range(a + b)), [-100] * a + list(range(a, a + b)))]


def run(rows, **options):
    conversations = [Conversation(row, "train.jsonl", 16 + i, 17 + i) for i, row in enumerate(rows)]
    return tokenise("train", conversations, encode_numbers, max_length=10, filler_token=9, **options)


def test_counts_by_hand():
    dataset, report = run([(2, 3), (8, 4), (10, 4), (1, 1)], overlong="truncate", drop_unsupervised=True)
    assert report == DataReport("train", num_rows=4, num_samples=3, num_split=0, num_truncated=1, num_dropped=1,
                                num_tokens=17, num_supervised_tokens=6, longest=10)  # fmt: skip
    assert str(report) == "train: 3 samples, 17 tokens, 35.3 % supervised, longest 10; 1 truncated, 1 dropped"
    one = DataReport("train", num_samples=1, num_tokens=2000, num_supervised_tokens=1000, longest=2000, drawn=1)
    assert str(one) == "train: 1 sample, 2,000 tokens, 50.0 % supervised, longest 2,000; 1 sample per epoch"
    assert len(dataset) == 3
    assert dataset[0] == {"input_ids": [0, 1, 2, 3, 4], "labels": [-100, -100, 2, 3, 4]}
    assert dataset[1] == {"input_ids": list(range(10)), "labels": [-100] * 8 + [8, 9]}
    assert dataset[FILLER] == {"input_ids": [9, 9], "labels": [-100, -100]}
    assert dataset[-1] == dataset[2] == {"input_ids": [0, 1], "labels": [-100, 1]}
    assert dataset.origin(-1) == dataset.origin(2)
    assert dataset.origin(2) == "sample 19 of train.jsonl (line 20)"
    for index in (3, -4):
        with pytest.raises(IndexError):
            dataset[index]


def test_overlong_samples_are_dropped_or_an_error():
    assert run([(2, 3), (8, 4)], overlong="drop")[1].num_dropped == 1
    assert run([(8, 2)], overlong="error")[1].num_truncated == 0
    with pytest.raises(
        DataError,
        match=r"^sample 17 of train\.jsonl \(line 18\) has 12 tokens\. Raise data\.max_length=10, or "
        r"set data\.overlong to truncate or drop\.$",
    ):
        run([(2, 3), (8, 4)], overlong="error")


def test_samples_without_loss_are_an_error():
    with pytest.raises(
        DataError,
        match=r"^sample 17 of train\.jsonl \(line 18\) has no supervised token after truncation to 10 "
        r"tokens \(its prompt has 13\)\. Raise data\.max_length or set data\.drop_unsupervised=true\.$",
    ):
        run([(2, 3), (13, 4)])
    with pytest.raises(
        DataError,
        match=r"(?s)^2 problems.*sample 16.*none of its assistant turns.*drop_unsupervised=true"
        r"(?s:.*)sample 17",
    ):
        run([(3, 0), (3, 0)])


def test_an_empty_set_has_no_samples():
    assert len(TokenDataset([], [], 0)) == 0


# -- the module ---------------------------------------------------------------------------------------------------


def test_batches_from_a_file(files):
    data = ShadowData(PAIR, files("train.jsonl", talk("a", "bc"), talk("d", "e")), shuffle=False, pad_to_multiple_of=16)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        key: (2, 32) for key in ("input_ids", "attention_mask", "labels")
    }
    assert batch["attention_mask"].sum(1).tolist() == [HEADERS + 3, HEADERS + 2]
    assert (batch["labels"] != -100).sum(1).tolist() == [3, 2]
    assert str(data.reports["train"]).startswith("train: 2 samples")


def test_every_knob_reaches_help_and_yaml(files):
    parser = ArgumentParser()
    parser.add_class_arguments(ShadowData, "data")
    text = re.sub(r"\s+", " ", parser.format_help())
    for piece in (
        "--data.pair.base",
        "--data.train TRAIN",
        "Maximum length of a sample, in tokens. (type: int, default: 4096)",
        "--data.validation",
        "so a smaller choice is part of each larger one",
        "{error,truncate,drop}",
    ):
        assert piece in text
    config = parser.parse_object({"data": {
        "pair": {"base": "b", "instruct": "i"}, "train": ["a.jsonl", "b.jsonl"], "validation": {"math": "m.jsonl"},
        "test": "t.jsonl", "template_kwargs": {"enable_thinking": False}, "overlong": "drop", "limit_train_samples": 5,
    }})  # fmt: skip
    data = parser.instantiate(config).data
    assert (data.train, data.validation_names, data.test_names) == (["a.jsonl", "b.jsonl"], ["math"], ["test"])
    assert data.template_kwargs == {"enable_thinking": False}
    strict = ArgumentParser(exit_on_error=False)
    strict.add_class_arguments(ShadowData, "data")
    with pytest.raises(ArgumentError, match="max_lenght"):
        strict.parse_object({"data": {"pair": {"base": "b", "instruct": "i"}, "max_lenght": 3}})


def test_problems_with_the_settings_come_together():
    with pytest.raises(DataError, match=r"^7 problems") as error:
        ShadowData(PAIR, "t.jsonl", {"a b": "v", "train": "v"}, max_length=1, batch_size=0, num_workers=-1, seed=-1,
                   limit_train_samples=0)  # fmt: skip
    for piece in ("data.max_length is 1; expected at least 2", "data.batch_size is 0", "data.num_workers is -1",
                  "data.seed is -1", "limit_train_samples is 0", "and 2 more"):  # fmt: skip
        assert piece in str(error.value)
    with pytest.raises(DataError, match=r"data\.validation has the name 'a b'; expected letters.*Rename"):
        ShadowData(PAIR, validation={"a b": "v"})
    with pytest.raises(DataError, match=r"data\.test has the name 'predict', which is used already"):
        ShadowData(PAIR, test={"predict": "v"})


def test_problems_with_the_sources_come_together(files):
    data = ShadowData(PAIR, "none.jsonl", {"one": files("empty.jsonl"), "two": files("v.jsonl", talk("a", "b"))})
    with pytest.raises(DataError, match=r"^2 problems(?s:.*)none\.jsonl does not exist(?s:.*)empty\.jsonl is empty"):
        data.setup("fit")


def test_errors_of_the_template_name_the_row(files):
    path = files("train.jsonl", talk("a", "b"), talk("a", "b", system="s"))
    gemma = SimpleNamespace(
        tokenizer=lambda: tokenizer_with(GEMMA, "<start_of_turn>", "<end_of_turn>", bos="<bos>", eos="<eos>")
    )
    with pytest.raises(
        DataError, match=r"^sample 1 of \S*train\.jsonl \(line 2\) is refused by the chat template: 'System"
    ):
        ShadowData(gemma, path).setup("fit")
    with pytest.raises(DataError, match=r"^the tokenizer of .* has no chat template"):
        ShadowData(pair_with(None), path, path).setup("fit")
    with pytest.raises(DataError, match=r"template_kwargs has enable, which"):
        ShadowData(PAIR, path, template_kwargs={"enable": 1}).setup("fit")


def test_hub_sets_are_fetched_once_per_machine_and_their_errors_told_in_setup(monkeypatch):
    asked = []

    def refuse(repo, **_):
        asked.append(repo)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    data = ShadowData(PAIR, "org/train", {"v": "org/val:x"}, {"t": "local.jsonl"}, "org/prompts")
    data.prepare_data()
    assert asked == ["org/train", "org/val", "org/prompts"]
    with pytest.raises(DataError, match=r"(?s)^2 problems.*'org/train' can't be read.*'org/val:x' can't be read"):
        data.setup("fit")


def test_problems_of_several_readers_are_numbered_once():
    """As of evaluators, each of which has several: the list of one would become an item of the other's."""
    errors = []
    for name in ("a", "b"):
        with gathered(errors), located(f"evaluators.{name}:"):
            raise_all(["row 0 is wrong", "row 1 is wrong"])
    with pytest.raises(DataErrors) as raised:
        raise_all(errors)
    lines = [f"{i}. evaluators.{name}: row {row} is wrong" for i, name, row in
             ((1, "a", 0), (2, "a", 1), (3, "b", 0), (4, "b", 1))]  # fmt: skip
    assert str(raised.value).splitlines() == ["4 problems with the data:", *(f"  {line}" for line in lines)]


def test_rows_of_a_template_that_rewrites_history_are_split(files):
    data = ShadowData(pair_with(QWEN3), files("t.jsonl", talk("a", "b", "c", "d"), talk("e", "f")))
    data.setup("fit")
    report = data.reports["train"]
    assert (report.num_rows, report.num_samples, report.num_split) == (2, 3, 1)
    assert data.dataset("train").origin(1).startswith("sample 0 of")
    assert str(report).endswith("; 1 split")


def test_a_template_of_ones_own_leaves_the_pairs_tokenizer_alone(files, tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML.replace("user", "USER"))
    tokenizer = make_tokenizer(CHATML_UNMARKED)
    pair = SimpleNamespace(tokenizer=lambda: tokenizer)
    data = ShadowData(
        pair, files("t.jsonl", talk("a", "b")), chat_template=str(tmp_path / "own.jinja"), system="Be brief."
    )
    data.setup("fit")
    assert data.tokenizer.chat_template != tokenizer.chat_template == CHATML_UNMARKED
    assert data.tokenizer.decode(data.dataset("train")[0]["input_ids"]).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>"
    )


def test_a_system_text_only_where_there_is_none(files):
    data = ShadowData(PAIR, files("t.jsonl", talk("a", "b"), talk("a", "b", system="own")), system="S")
    data.setup("fit")
    texts = [data.tokenizer.decode(data.dataset("train")[i]["input_ids"]) for i in range(2)]
    assert [text.split("<|im_end|>")[0] for text in texts] == ["<|im_start|>system\nS", "<|im_start|>system\nown"]


def test_documents_are_trained_on_whole(files):
    """Every token but the first carries loss, the Base's end of text too; long ones are cut into pieces."""
    pair = SimpleNamespace(tokenizer=lambda: make_tokenizer(CHATML), other_tokenizer=other_tokenizer)
    end = other_tokenizer().eos_token_id
    assert end != make_tokenizer(CHATML).eos_token_id
    data = ShadowData(pair, train=files("train.jsonl", {"text": "abcdefg"}, {"text": "xy"}), max_length=5)
    data.setup("fit")
    ids = make_tokenizer(CHATML)("abcdefg")["input_ids"]
    samples = [data.dataset("train")[i] for i in range(3)]
    assert samples[0] == {"input_ids": ids[:5], "labels": [-100, *ids[1:5]]}
    assert samples[1] == {"input_ids": [*ids[5:], end], "labels": [-100, ids[6], end]}
    assert samples[2]["input_ids"][-1] == end and data.reports["train"].num_split == 1
    both = files("both.jsonl", {"messages": talk("q", "a"), "text": "q a"})
    data = ShadowData(pair, train=both)
    data.setup("fit")
    assert data.reports["train"].supervised_share < 0.5  # as a conversation
    with pytest.raises(DataError, match="is plain text, which has no turn to answer"):
        ShadowData(pair, predict=files("prompts.jsonl", {"text": "abc"})).setup("predict")


def other_tokenizer():
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def test_smaller_choices_are_part_of_larger_ones(files):
    sources = [files("a.jsonl", *numbered(20)), files("b.jsonl", *numbered(20, 20))]

    def chosen(limit, seed=0):
        data = ShadowData(PAIR, sources, limit_train_samples=limit, seed=seed)
        data.setup("fit")
        return {data.dataset("train").origin(i) for i in range(len(data.dataset("train")))}

    assert len(chosen(5)) == 5 and chosen(5) < chosen(11) < chosen(40) == chosen(None)
    assert chosen(5) != chosen(5, seed=1)
    with pytest.warns(UserWarning, match=r"limit_train_samples=50, but the set has only 40 rows"):
        assert len(chosen(50)) == 40


def test_identical_samples_in_training_and_validation_are_counted(files):
    data = ShadowData(
        PAIR,
        files("t.jsonl", *numbered(6)),
        {"bad": files("bad.jsonl", *numbered(6, 4)), "good": files("good.jsonl", *numbered(4, 10))},
    )
    with pytest.warns(
        UserWarning, match=r"the training data contain 2 of the 6 samples of val/bad token for token.*remove"
    ) as caught:
        data.setup("fit")
    assert not any("val/good" in str(warning.message) for warning in caught)


def test_a_set_that_is_wholly_dropped(files):
    path = files("t.jsonl", talk("a", "b"))
    with pytest.raises(DataError, match=r"train has no sample left of 1 row\. Raise data\.max_length"):
        ShadowData(PAIR, path, max_length=5, overlong="drop").setup("fit")


def test_reports_are_logged_once(files, caplog):
    data = ShadowData(PAIR, files("t.jsonl", {"messages": talk("a", "b"), "id": 3, "extra": 4}))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
        data.setup("validate")
        data.setup("fit")
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].endswith("is read as messages; columns not used: extra, id")
    assert lines[1].startswith("data: train: 1 sample, ")


# -- ranks --------------------------------------------------------------------------------------------------------


def trainer_of(rank, world_size, use_distributed_sampler=False):
    return SimpleNamespace(
        world_size=world_size, global_rank=rank, current_epoch=0, train_dataloader=None, limit_train_batches=1.0,
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=use_distributed_sampler),
    )  # fmt: skip


def answers(data, loader):
    """The supervised text of each sample of each batch; empty for fillers."""
    return [[data.tokenizer.decode(row[row != -100])[:3] for row in batch["labels"]] for batch in loader]


@pytest.mark.parametrize("loaders", ["train_dataloader", "val_dataloader", "test_dataloader"])
def test_two_ranks_see_what_one_sees(files, loaders):
    path = files("t.jsonl", *numbered(11))
    seen = {}
    for world_size, batch_size in ((1, 4), (2, 2)):
        data = ShadowData(PAIR, path, path, path, batch_size=batch_size)
        with pytest.warns(UserWarning, match="11 of 11 samples"):
            data.setup()
        ranks = []
        for rank in range(world_size):
            data.trainer = trainer_of(rank, world_size)
            loader = getattr(data, loaders)()
            ranks.append(answers(data, loader if loaders == "train_dataloader" else loader[0]))
        assert {len(own) for own in ranks} == {3}
        seen[world_size] = [
            sorted(a for batch in together for a in batch if a) for together in zip(*ranks, strict=True)
        ]
    assert seen[1] == seen[2]
    assert sorted(a for batch in seen[2] for a in batch) == [f"{i:03d}" for i in range(11)]


def test_validation_may_have_fewer_samples_than_ranks_and_training_may_not(files):
    data = ShadowData(PAIR, files("t.jsonl", *numbered(2)), files("v.jsonl", *numbered(1, 5)))
    data.setup("fit")
    seen = []
    for rank in range(3):
        data.trainer = trainer_of(rank, 3)
        seen.append(answers(data, data.val_dataloader()[0]))
        with pytest.raises(DataError, match=r"there are 3 ranks, but only 2 training samples\. Use fewer devices"):
            data.train_dataloader()
    assert seen == [[["005"]], [[""]], [[""]]]


def test_lightnings_own_sampler_is_refused(files):
    data = ShadowData(PAIR, files("t.jsonl", *numbered(4)))
    data.setup("fit")
    data.trainer = trainer_of(0, 2, use_distributed_sampler=True)
    with pytest.raises(DataError, match=r"use_distributed_sampler is true.*Set it to false"):
        data.train_dataloader()


def test_missing_sources_are_told_when_they_are_needed(files):
    data = ShadowData(PAIR)
    data.setup()
    assert data.val_dataloader() == []
    for loader, key in (
        (data.train_dataloader, "train"),
        (data.test_dataloader, "test"),
        (data.predict_dataloader, "predict"),
    ):
        with pytest.raises(DataError, match=rf"data\.{key} is not set\. Give"):
            loader()


class Echo(LightningModule):
    def predict_step(self, batch, batch_idx):
        tokenizer = make_tokenizer()
        lengths = batch["attention_mask"].sum(1).tolist()
        texts = [tokenizer.decode(row[-n:]) for row, n in zip(batch["input_ids"], lengths, strict=True)]
        return list(zip(batch["index"].tolist(), texts, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_prompts_reach_predict_in_order(files, num_workers):
    rows = [talk("a"), talk("bcd", "the answer"), talk("e", "f", "g")]
    data = ShadowData(PAIR, predict=files("p.jsonl", *rows), eval_batch_size=2, num_workers=num_workers)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    batches = trainer.predict(Echo(), data)
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert [len(batch) for batch in batches] == [2, 1]
    assert [pair for batch in batches for pair in batch] == [
        (0, asked.format("a")),
        (1, asked.format("bcd")),
        (2, asked.format("e") + "f<|im_end|>\n" + asked.format("g")),
    ]


def test_prompts_are_never_cut_and_filled_up_over_ranks(files):
    path = files("p.jsonl", talk("a"), talk("b" * 100), talk("c"))
    with pytest.raises(
        DataError, match=r"^sample 1 of \S*p\.jsonl \(line 2\) has a prompt of \d+ tokens\. Raise data\.max_length=50"
    ):
        ShadowData(PAIR, predict=path, max_length=50).setup("predict")
    data = ShadowData(PAIR, predict=path, eval_batch_size=2)
    data.setup("predict")
    seen = []
    for rank in range(2):
        data.trainer = trainer_of(rank, 2)
        seen.append([batch["index"].tolist() for batch in data.predict_dataloader()])
    assert seen == [[[0, 2]], [[1, -1]]]


# -- the preview --------------------------------------------------------------------------------------------------


def shown(data, split="train", num_samples=3, **options):
    console = Console(file=io.StringIO(), width=100, highlight=False, **options)
    preview(data, split, num_samples, console)
    return console.file.getvalue()


def test_the_preview_brackets_the_loss_without_colours(files):
    data = ShadowData(
        PAIR, files("t.jsonl", talk("a", "é🙂\nx", "c", "d"), *numbered(4)), test=files("s.jsonl", *numbered(2))
    )
    text = shown(data, num_samples=2)
    assert "sample 0 of" in text and "(line 1): 53 tokens, 11 supervised" in text
    assert "<|im_start|>user⏎\na<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦é🙂⏎\nx<|im_end|>⟧⏎\n<|im_start|>user⏎\nc" in text
    assert text.count("sample") == 2 + 1 and "line 3" not in text  # the table has a column of that name
    assert re.search(r"train +│ +5 +│ +5 +│", text)
    assert "⟦supervised⟧" in text
    assert "sample 0 of" in shown(data, "test/test")
    assert "sample 1 of" in shown(data, "test")
    with pytest.raises(
        DataError, match=r"no data set 'valid' to preview; the configuration has: train, test/test\. Choose"
    ):
        shown(data, "valid")


def test_the_preview_names_the_weights(files):
    messages = talk("a", "b", "c", "dd", "e", "f")
    messages[1]["weight"], messages[3]["weight"] = 0.1, 2
    text = shown(ShadowData(PAIR, files("t.jsonl", messages, talk("a", "b"))))
    assert "7 supervised (2 with weight 0.1, 3 with weight 2, 2 with weight 1)" in text
    assert "2 supervised\n" in text
    text = shown(ShadowData(PAIR, files("t.jsonl", messages), loss_on="last"))
    assert "2 supervised\n" in text and text.count("⟦") == 2 and "⟦f<|im_end|>⟧" in text


def test_the_preview_in_colours(files):
    data = ShadowData(PAIR, files("t.jsonl", talk("a", "b")), predict=files("p.jsonl", talk("a")))
    text = shown(data, force_terminal=True, color_system="standard")
    assert "⟦" not in text
    assert re.search(r"\x1b\[30;(42|102)mb\x1b\[0m\x1b\[30;(42|102)m<\|im_end\|>\x1b\[0m", text)
    assert "⟦supervised⟧" in shown(data, force_terminal=True, color_system="standard", no_color=True)
    assert "0 supervised" in shown(data, "predict")


def test_the_texts_of_tokens_are_the_whole_text():
    tokenizer = make_tokenizer()
    ids = tokenizer("aé🙂\n<|im_end|>中")["input_ids"]
    assert [text for text, _ in token_texts(tokenizer, ids)] == ["a", "é", "🙂", "\n", "<|im_end|>", "中"]
    assert [i for _, i in token_texts(tokenizer, ids)] == [0, 2, 6, 7, 8, 11]
    words = word_tokenizer("")
    ids = words.convert_tokens_to_ids(["▁ask", ":", "▁yes", "▁", "no", "</s>"])
    assert "".join(text for text, _ in token_texts(words, ids)) == "ask: yes no</s>"


def test_flat_arrays_are_small():
    dataset, _ = run([(2, 8)] * 1000)
    (block,) = dataset._blocks
    assert block.tokens.nbytes + block.supervised.nbytes == 5 * 10_000
    assert block.tokens.dtype == np.int32
