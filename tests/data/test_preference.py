"""Preference data: every format gives the same two conversations, bad rows are named, sequences stay together."""

import json

import numpy as np
import pytest
import torch

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.module import ShadowData
from shadowlit.data.preference import PreferenceCollate
from shadowlit.data.preference_formats import convert_labelled, convert_pair
from shadowlit.data.preview import preview
from shadowlit.data.sampler import FILLER
from shadowlit.data.sources import read_conversations
from shadowlit.errors import DataError
from shadowlit.pair.pair import ModelPair
from tests.tiny import save_pair


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


PAIRS = {
    "texts": {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
    "messages": {"prompt": [user("1+1?")], "chosen": [says("2")], "rejected": [says("3")]},
    "whole conversations": {"chosen": [user("1+1?"), says("2")], "rejected": [user("1+1?"), says("3")]},
    "whole conversations and the prompt": {
        "prompt": "1+1?", "chosen": [user("1+1?"), says("2")], "rejected": [user("1+1?"), says("3")],
        "messages": [user("1+1?"), says("2")], "score_chosen": 8.0,
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "1+1?"}],
        "chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "3"},
    },
    "alpaca": {"instruction": "1+1?", "input": "", "chosen": "2", "rejected": "3", "system": None, "history": []},
    "sharegpt, whole": {
        "chosen": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}],
        "rejected": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "3"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_pairs_in_every_format(row):
    assert convert_pair(row) == ([user("1+1?"), says("2")], [user("1+1?"), says("3")])


def test_what_stands_before_the_answers_carries_no_loss():
    before = [{"role": "system", "content": "Be brief."}, user("1?"), says("1"), user("2?")]
    row = {"chosen": [*before, says("2"), user("3?"), says("3")], "rejected": [*before, says("two")]}
    chosen, rejected = convert_pair(row)
    assert [turn.get("weight") for turn in chosen] == [None, None, 0.0, None, None, None, None]
    assert rejected == [*before[:2], says("1", weight=0.0), before[3], says("two")]


def test_alpacas_history_comes_before_the_prompt():
    row = {**PAIRS["alpaca"], "history": [["0?", "0"]], "system": "Be brief."}
    before = [{"role": "system", "content": "Be brief."}, user("0?"), says("0", weight=0.0), user("1+1?")]
    assert convert_pair(row) == ([*before, says("2")], [*before, says("3")])
    row = {**LABELS["alpaca"], "history": [["0?", "0"]]}
    assert convert_labelled(row) == ([user("0?"), says("0", weight=0.0), user("1+1?")], [says("2")], True)


def test_no_column_of_preferences_is_dropped_in_silence(tmp_path):
    for samples, row in (("pairs", {**PAIRS["texts"], "score": 3}), ("labels", LABELS["alpaca"])):
        assert len(read_conversations(write(tmp_path / "f.jsonl", [row] * 2), samples=samples)) == 2
        path = write(tmp_path / "f.jsonl", [{**row, "context": "Count."}] * 2)
        with pytest.raises(DataError, match=r"model wouldn't see: 'context' \('Count\.' \(str\) in sample 0 of"):
            read_conversations(path, samples=samples)
        assert len(read_conversations(path, samples=samples, ignore=["context"])) == 2
    path = write(tmp_path / "f.jsonl", [{**PAIRS["texts"], "tools": '[{"name": "f"}]'}])
    assert read_conversations(path, samples="pairs")[0].tools == [{"type": "function", "function": {"name": "f"}}]
    # Whole conversations have their prompt, so that another one in a column would be lost; copies and tools aren't.
    whole = PAIRS["whole conversations and the prompt"]
    path = write(tmp_path / "f.jsonl", [{**whole, "tools": '[{"name": "f"}]'}])
    assert read_conversations(path, samples="pairs")[0].tools
    path = write(tmp_path / "f.jsonl", [{**whole, "prompt": "Another one."}])
    with pytest.raises(DataError, match=r"model wouldn't see: 'prompt' \('Another one\.' \(str\) in sample 0 of"):
        read_conversations(path, samples="pairs")


def test_a_system_text_of_its_own_column():
    row = {"system": "Be brief.", **PAIRS["sharegpt"]}
    assert convert_pair(row)[0][0] == {"role": "system", "content": "Be brief."}
    assert convert_pair({"system": "Be brief.", **PAIRS["texts"]})[0][0]["content"] == "Be brief."


LABELS = {
    "texts": {"prompt": "1+1?", "completion": "2", "label": True},
    "messages": {"prompt": [user("1+1?")], "completion": [says("2")], "label": True},
    "a conversation": {"messages": [user("1+1?"), says("2")], "label": True},
    "alpaca": {"instruction": "1+1?", "output": "2", "kto_tag": True},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}], "kto_tag": True},
}


@pytest.mark.parametrize("row", LABELS.values(), ids=LABELS)
def test_labels_in_every_format(row):
    assert convert_labelled(row) == ([user("1+1?")], [says("2")], True)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = PAIRS["texts"]
BAD_PAIRS = {
    "equal": ({**GOOD, "rejected": "2"}, "has the same answer in 'chosen' and in 'rejected'"),
    "equal conversations": (
        {"chosen": [user("1?"), says("1")], "rejected": [user("1?"), says("1")]}, "has the same answer",
    ),
    "empty": ({**GOOD, "chosen": " "}, "has an empty 'chosen'"),
    "null": ({**GOOD, "chosen": None}, "has null in 'chosen'; expected a text or a list"),
    "missing": ({"prompt": "1?", "chosen": "1"}, "lacks the field 'rejected'"),
    "no prompt": ({"chosen": "1", "rejected": "2"}, "has answers .* but no prompt. Add the column 'prompt'"),
    "other prompts": (
        {"chosen": [user("1?"), says("1")], "rejected": [user("2?"), says("2")]},
        "has 'chosen' and 'rejected' with different first turns",
    ),
    "other prompts later": (
        {"chosen": [user("1?"), says("1"), user("2?"), says("2")],
         "rejected": [user("1?"), says("1"), user("3?"), says("3")]},
        "has different prompts: turn 2 of 'chosen', where 'chosen' and 'rejected' part, is the user's",
    ),
    "beginning": (
        {"chosen": [user("1?"), says("1")], "rejected": [user("1?"), says("1"), user("2?"), says("3")]},
        "has nothing in 'chosen' that the other doesn't begin with",
    ),
    "speaker": (
        {"conversations": [{"from": "human", "value": "1?"}], "chosen": {"from": "gtp", "value": "1"},
         "rejected": {"from": "gpt", "value": "2"}},
        r"has the unknown speaker 'gtp' in chosen\[0\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_bad_pair_is_named(tmp_path, row, message):
    path = write(tmp_path / "pairs.jsonl", [{**GOOD, "conversations": None}, row])
    with pytest.raises(DataError, match=rf"sample 1 of .*pairs.jsonl \(line 2\) {message}"):
        read_conversations(path, samples="pairs")


@pytest.mark.parametrize("label", ["good", 1, None, 0.5])
def test_a_label_of_the_wrong_kind_is_named(tmp_path, label):
    rows = [LABELS["texts"], {**LABELS["texts"], "label": label}]
    with pytest.raises(DataError, match=r"sample 1 of .* \(line 2\) has .* in 'label'; expected true"):
        read_conversations(write(tmp_path / "labels.jsonl", rows), samples="labels")


def test_data_of_another_objective_are_refused_with_the_one_they_suit(tmp_path):
    pairs, labels = write(tmp_path / "p.jsonl", [GOOD]), write(tmp_path / "l.jsonl", [LABELS["texts"]] * 2)
    talks = write(tmp_path / "c.jsonl", [{"messages": [user("1?"), says("1")]}])
    for path, samples, remedy in (
        (pairs, "conversations", "set model.objective to one of pairs, e.g. DPO"),
        (pairs, "labels", "set model.objective to one of pairs, e.g. DPO"),
        (labels, "pairs", "set model.objective to KTO"),
        (talks, "pairs", "set model.objective to SFT"),
        (talks, "labels", "set model.objective to SFT"),
    ):
        with pytest.raises(DataError, match=remedy):
            read_conversations(path, samples=samples)
    with pytest.raises(DataError, match=r"no assistant turn.*model.objective=DPO"):
        read_conversations(write(tmp_path / "s.jsonl", [PAIRS["sharegpt"]]))
    assert len(read_conversations(labels)) == 2  # prompts and completions, as ever
    assert read_conversations(pairs, prompts_only=True)[0].messages == [user("1+1?")]


def test_a_labelled_answer_is_compared_with_the_next_rows(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": f"{i}!", "label": i != 1} for i in range(3)]
    read = read_conversations(write(tmp_path / "labels.jsonl", rows), samples="labels")
    assert [one.other for one in read] == [[user(f"{i}?"), says(f"{(i + 1) % 3}!")] for i in range(3)]
    assert [one.desirable for one in read] == [True, False, True]
    with pytest.raises(DataError, match=r"labels.jsonl has one row; labels need at least two"):
        read_conversations(write(tmp_path / "labels.jsonl", rows[:1]), samples="labels")


# -- to batches ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return ModelPair(*map(str, save_pair(tmp_path_factory.mktemp("pair"))))


def pairs_of(count):
    return [{"prompt": f"{i}?", "chosen": "yes" * (1 + i % 3), "rejected": "no" * (1 + i % 4)} for i in range(count)]


def make_data(pair, folder, rows=None, samples="pairs", **options):
    path = write(folder / "rows.jsonl", pairs_of(7) if rows is None else rows)
    data = ShadowData(pair, train=path, validation=path, samples=samples, **{"cache": False, **options})
    data.setup("fit")
    return data


def answers_of(batch):
    """Every sequence of a batch: its tokens and the places of its loss."""
    found = {}
    for number in range(int(batch["sequence"].max()) + 1):
        own = batch["sequence"] == number
        found[number] = batch["input_ids"][own].tolist(), (batch["labels"][own] != IGNORE_INDEX).tolist()
    return found


@pytest.mark.parametrize("packing", [None, "padding_free", "best_fit"])
@pytest.mark.parametrize("cache", [False, True])
def test_batches_hold_every_pair_once(pair, tmp_path, packing, cache):
    data = make_data(pair, tmp_path, packing=packing, batch_size=3, pad_to_multiple_of=8, cache=cache,
                     cache_dir=str(tmp_path), pack_length=None if packing != "best_fit" else 150,
                     max_length=75)  # fmt: skip
    tokenizer, seen = data.tokenizer, []
    for batch in data.train_dataloader():
        known = answers_of(batch)
        assert len(known) == 2 * len(batch["sample"]) == 2 * len(batch["valid"])
        for place, index in enumerate(batch["sample"].tolist()):
            row = pairs_of(7)[index]
            for number, name in ((2 * place, "chosen"), (2 * place + 1, "rejected")):
                tokens, loss = known[number]
                text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row[name]}<|im_end|>\n"
                assert tokenizer.decode(tokens) == text
                said = tokenizer.decode([token for token, own in zip(tokens, loss, strict=True) if own])
                assert said == f"{row[name]}<|im_end|>"
            seen.append(index)
        assert batch["input_ids"].shape[1] % 8 == 0
        if packing is None:
            assert torch.equal(batch["sequence"] >= 0, batch["attention_mask"] == 1)
    assert sorted(seen) == list(range(7))
    assert data.reports["train"].num_samples == 7
    assert data.reports["train"].fill == pytest.approx(1, abs=0.75 if packing is None else 0.5)


def test_a_filler_is_no_sample(pair, tmp_path):
    data = make_data(pair, tmp_path)
    batch = PreferenceCollate(0)([data.dataset("train")[FILLER], data.dataset("train")[2]])
    assert batch["valid"].tolist() == [1] and batch["sample"].tolist() == [-1, 2]
    assert (batch["labels"][:2] == IGNORE_INDEX).all()


def test_pairs_share_a_pack_or_are_refused(pair, tmp_path):
    data = make_data(pair, tmp_path, packing="best_fit", max_length=60)
    assert data.pack_length == 120
    with pytest.raises(DataError, match=r"sample \d of .* has two answers of \d+ tokens together.*pack_length is 60"):
        make_data(pair, tmp_path, packing="best_fit", max_length=60, pack_length=60)


def test_what_is_cut_loses_both_answers_or_none(pair, tmp_path):
    """Bytes are tokens: with four left of each answer, those of the second row are the same."""
    rows = [{"prompt": "1", "chosen": a, "rejected": b} for a, b in (("a", "b" * 90), ("c" * 8, "c" * 9))]
    prompt = make_data(pair, tmp_path, rows[:1]).dataset("train")[0][0]["answers"][0]["labels"].count(IGNORE_INDEX)
    with pytest.raises(DataError, match=r"sample 1 of .* has two answers that are the same tokens, cut to"):
        make_data(pair, tmp_path, rows, max_length=prompt + 4)
    data = make_data(pair, tmp_path, rows, max_length=prompt + 4, drop_unsupervised=True)
    report = data.reports["train"]
    assert (report.num_samples, report.num_truncated, report.num_dropped) == (1, 1, 1)
    assert len(data.dataset("train")) == 1


def test_parts_of_an_answer_are_not_weighed(pair, tmp_path):
    row = {"prompt": "1?", "chosen": [says("yes", weight=0.5)], "rejected": [says("no")]}
    with pytest.raises(DataError, match=r"sample 0 of .* weighs its answer by 'weight', but .* whole answers"):
        make_data(pair, tmp_path, [row])
    with pytest.raises(DataError, match=r"data\.loss_on is all, but model\.objective learns from preferences"):
        make_data(pair, tmp_path, loss_on="all")


def test_labels_reach_the_batch(pair, tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "yes" * (i + 1), "label": i % 2 == 0} for i in range(4)]
    data = make_data(pair, tmp_path, rows, "labels", shuffle=False, batch_size=4, max_length=48, overlong="error")
    (batch,) = data.train_dataloader()
    assert batch["desirable"].tolist() == [True, False, True, False]
    hashes = data.dataset("train").hashes()
    assert len(np.unique(hashes)) == 4
    flipped = make_data(pair, tmp_path, [{**row, "label": not row["label"]} for row in rows], "labels")
    assert not np.isin(hashes, flipped.dataset("train").hashes()).any()


def test_preview_shows_both_answers(pair, tmp_path, capsys):
    preview(make_data(pair, tmp_path), "train", 1)
    text = capsys.readouterr().out
    assert "rows.jsonl (line 1), chosen: " in text and ", rejected: " in text
    assert "⟦yes" in text and "⟦no" in text
