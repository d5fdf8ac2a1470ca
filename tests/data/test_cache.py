"""Tokenised once, and mapped ever after: until anything changes that the tokens depend on, or the file is damaged."""

import dataclasses
import json
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from lightning.pytorch import Trainer

import shadowlit.data.blocks as blocks_module
import shadowlit.data.cache as cache_module
import shadowlit.data.prepare as prepare_module
from shadowlit.data.blocks import BlockBuilder, read_blocks, require_storable, write_blocks
from shadowlit.data.cache import default_folder, digest_tokenizer
from shadowlit.data.conversation import Conversation
from shadowlit.data.dataset import TokenDataset
from shadowlit.data.module import ShadowData
from shadowlit.data.sampler import FILLER
from shadowlit.data.template import Encoded
from shadowlit.errors import DataError
from tests.data.templates import talk
from tests.data.test_resume import Recorder
from tests.distributed import run_ranks
from tests.tiny import CHATML, CHATML_UNMARKED, make_tokenizer


def pair_with(template=CHATML, end="<|endoftext|>"):
    other = make_tokenizer(None)
    other.eos_token = end
    return SimpleNamespace(tokenizer=lambda: make_tokenizer(template), other_tokenizer=lambda: other)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"messages": talk("q" * (i + 1), "answer", "again", "é" * (i + 1)), "id": i} for i in range(7)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def tokenised(monkeypatch):
    """Names of the sets that are tokenised rather than taken from the cache."""
    names = []
    original = prepare_module.tokenise

    def tokenise(name, *args, **kwargs):
        names.append(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(prepare_module, "tokenise", tokenise)
    return names


def load(path, folder, pair=None, stage="fit", **options):
    data = ShadowData(pair or pair_with(), str(path), cache_dir=str(folder), **options)
    data.setup(stage)
    return data


def content(data, split="train"):
    dataset = data.dataset(split)
    samples = [dataset[i] for i in range(len(dataset))]
    origins = [dataset.origin(i) for i in range(len(dataset))]
    return (
        samples,
        origins,
        dataset.lengths.tolist(),
        dataset.hashes().tolist(),
        dataclasses.asdict(data.reports[split]),
    )


def test_the_second_start_reads_what_the_first_one_made(path, tmp_path, tokenised, caplog):
    expected = content(load(path, tmp_path, cache=False))
    for start in range(2):
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            data = load(path, tmp_path / "cache")
        assert content(data) == expected
        assert tokenised == ["train", "train"], start
        assert [record.message.split("; ")[0] for record in caplog.records] == [
            f"data: {path} is read as messages", f"data: {data.reports['train']}"
        ]  # fmt: skip
    (file,) = (tmp_path / "cache").iterdir()
    assert file.suffix == ".arrow" and file.stat().st_mode == path.stat().st_mode
    (block,) = data.dataset("train")._blocks
    assert not block.tokens.flags.owndata and not block.tokens.flags.writeable  # mapped
    table = datasets.Dataset.from_file(str(file))
    assert [row["input_ids"] for row in table] == [sample["input_ids"] for sample in expected[0]]


def test_a_set_of_another_name_with_the_same_rows_is_the_same_file(path, tmp_path, tokenised):
    data = ShadowData(pair_with(), str(path), {"v": str(path)}, cache_dir=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="the training data contain 7 of the 7 samples of val/v"):
        data.setup("fit")
    assert tokenised == ["train"] and data.reports["val/v"].name == "val/v"


def rewrite(path, **_):
    path.write_text(path.read_text().replace("answer", "Answer", 1))


CHANGES = {
    "content": (rewrite, {}),
    "template": (None, {"pair": pair_with(CHATML_UNMARKED)}),
    "max_length": (None, {"max_length": 100}),
    "overlong": (None, {"overlong": "drop"}),
    "drop_unsupervised": (None, {"drop_unsupervised": True}),
    "system": (None, {"system": "Be brief."}),
    "loss_on": (None, {"loss_on": "last"}),
    "format": (None, {"format": "messages"}),
    "limit": (None, {"limit_train_samples": 3}),
    "choice": (None, {"limit_train_samples": 3, "seed": 5}),
}
SAME = {"batch_size": 2, "packing": "best_fit", "shuffle": False, "pad_to_multiple_of": 8, "seed": 5, "num_workers": 1}


def test_whatever_the_tokens_depend_on_makes_another_file(path, tmp_path, tokenised):
    folder = tmp_path / "cache"
    load(path, folder)
    for name, value in SAME.items():
        load(path, folder, **{name: value})
    assert len(tokenised) == 1
    for number, (change, options) in enumerate(CHANGES.values(), 2):
        if change:
            change(path)
        fresh = content(load(path, folder, **options))
        assert len(tokenised) == number == len(list(folder.iterdir()))
        assert content(load(path, folder, **options)) == fresh
        assert len(tokenised) == number
    assert len(load(path, folder, limit_train_samples=3).dataset("train")) == 3


def test_the_code_and_the_tokenizer_are_part_of_the_key(path, tmp_path, tokenised, monkeypatch):
    folder = tmp_path / "cache"
    load(path, folder)
    monkeypatch.setattr(cache_module, "_digest_code", lambda: "of another version")
    load(path, folder)
    assert len(tokenised) == 2
    one, other = make_tokenizer(), make_tokenizer()
    assert digest_tokenizer(one) == digest_tokenizer(other)
    other("a", truncation=True, max_length=3, padding="max_length")  # state of a call, and no property
    assert digest_tokenizer(one) == digest_tokenizer(other)
    other.add_tokens(["xyz"])
    assert digest_tokenizer(one) != digest_tokenizer(other)
    assert digest_tokenizer(one) != digest_tokenizer(make_tokenizer(CHATML_UNMARKED))


def test_the_code_in_the_key_is_all_that_makes_tokens():
    """Whatever the preparation imports, except for modules that decide where and in what order, not what."""
    folder = Path(prepare_module.__file__).parent
    found, new = set(), {"prepare"}
    while new:
        found |= new
        sources = [(folder / f"{name}.py").read_text() for name in new]
        new = {name for source in sources for name in re.findall(r"from shadowlit\.data\.(\w+) import", source)} - found
    assert found - {"cache", "given", "packing", "settings"} == set(cache_module._CODE)


def test_todays_date_in_a_template_is_part_of_the_key(path, tmp_path, tokenised):
    dated = CHATML_UNMARKED + "{% if false %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    for _ in range(2):
        with pytest.warns(UserWarning, match="writes today's date"):
            load(path, tmp_path / "cache", pair_with(dated))
    assert len(tokenised) == 1

    class Tomorrow(prepare_module.datetime.date):
        @classmethod
        def today(cls):
            return cls(2999, 1, 1)

    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="writes today's date"):
        patch.setattr(prepare_module.datetime, "date", Tomorrow)
        load(path, tmp_path / "cache", pair_with(dated))
    assert len(tokenised) == 2


def test_documents_depend_on_the_end_of_text_of_the_base(tmp_path, tokenised):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "abc"}')
    for end, count in (("<|endoftext|>", 1), ("<|endoftext|>", 1), ("<|im_end|>", 2)):
        data = load(path, tmp_path / "cache", pair_with(end=end))
        assert data.tokenizer.decode(data.dataset("train")[0]["input_ids"]) == f"abc{end}"
        assert len(tokenised) == count


def test_sources_of_datasets_are_known_by_their_fingerprint(tmp_path, tokenised):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for _ in range(2):
        load(tmp_path / "saved", tmp_path / "cache")
    assert len(tokenised) == 1
    datasets.Dataset.from_list(rows[:1]).save_to_disk(tmp_path / "saved")
    assert len(load(tmp_path / "saved", tmp_path / "cache").dataset("train")) == 1
    assert len(tokenised) == 2


def as_stored(text):
    return np.array(make_tokenizer()(text)["input_ids"], np.int32).tobytes()


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-200],
    "empty": lambda data: b"",
    "no Arrow": lambda data: b"{}" * 400,
    "another word": lambda data: data.replace(as_stored("answer"), as_stored("ANSWER"), 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again(path, tmp_path, tokenised, damage):
    expected = content(load(path, tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    assert file.read_bytes() != whole
    with pytest.warns(UserWarning, match="train is tokenised again, since what was kept is damaged"):
        assert content(load(path, tmp_path / "cache")) == expected
    assert file.read_bytes() == whole
    assert len(tokenised) == 2


def test_no_flipped_byte_goes_unnoticed(path, tmp_path):
    """Or it stands where nothing is: in the padding of Arrow's buffers."""
    load(path, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole, draw = file.read_bytes(), random.Random(0)
    (expected,), about = read_blocks(file)
    noticed = 0
    for place in draw.sample(range(len(whole)), 300):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        try:
            (block,), found = read_blocks(file)
        except (ValueError, OSError):
            noticed += 1
            continue
        for field in dataclasses.fields(block):
            assert np.array_equal(getattr(block, field.name), getattr(expected, field.name)), (place, field.name)
        assert found == about
    assert noticed > 150


def test_what_cannot_be_used_is_not_kept(path, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match="7 problems"):
            load(path, tmp_path / "cache", max_length=20, overlong="error")
        with pytest.raises(DataError, match="no sample left"):
            load(path, tmp_path / "cache", max_length=20, overlong="drop")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written_to(path, tmp_path, tokenised):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"train can't be kept in .*Set data\.cache_dir to a folder"):
        data = load(path, tmp_path / "file" / "cache")
    assert len(data.dataset("train")) == 7 and tokenised == ["train"]


def test_the_default_folder_is_that_of_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "shadowlit"
    monkeypatch.delenv("HF_DATASETS_CACHE")
    assert default_folder().parts[-2:] == ("datasets", "shadowlit")


# -- blocks -------------------------------------------------------------------------------------------------------


def make_blocks():
    """Three blocks of three, one and two samples."""
    builder, blocks = BlockBuilder(), []
    for row, (length, ends) in enumerate([(3, 0), (2, 0), (5, 1), (4, 1), (2, 0), (6, 1)]):
        tokens = list(range(row * 10, row * 10 + length))
        origin = Conversation([], "a" if row < 4 else "b", row, row + 1 if row < 4 else None, source_index=int(row > 3))
        builder.add(Encoded(tokens, [-100, *tokens[1:]]), origin)
        if ends:
            blocks.append(builder.take())
    return blocks, ["a", "b"]


@pytest.mark.parametrize("mapped", [False, True])
def test_samples_of_several_blocks(tmp_path, mapped):
    blocks, sources = make_blocks()
    if mapped:
        with write_blocks(tmp_path / "x.arrow") as file:
            for block in blocks:
                file.add(block)
            file.finish({"some": ["thing"]})
        blocks, about = read_blocks(tmp_path / "x.arrow")
        assert about == {"some": ["thing"]}
    dataset = TokenDataset(blocks, sources, 9, tmp_path / "x.arrow" if mapped else None)
    assert [len(block) for block in blocks] == [3, 1, 2]
    assert dataset.lengths.tolist() == [3, 2, 5, 4, 2, 6]
    assert [dataset[i]["input_ids"][0] for i in range(6)] == [0, 10, 20, 30, 40, 50]
    assert dataset[4] == {"input_ids": [40, 41], "labels": [-100, 41]}
    assert [dataset.origin(i) for i in (3, 4)] == ["sample 3 of a (line 4)", "sample 4 of b"]
    assert len(set(dataset.hashes().tolist())) == 6
    pickled = pickle.dumps(dataset)
    again = pickle.loads(pickled)
    assert [again[i] for i in range(-6, 6)] == [dataset[i] for i in range(6)] * 2
    assert (len(pickled) < 600) is mapped  # a worker maps the file, and gets no copy
    assert again[FILLER] == dataset[FILLER] == {"input_ids": [9, 9], "labels": [-100, -100]}
    for index in (6, -7):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize("mapped", [False, True])
def test_weights_of_some_samples(tmp_path, mapped):
    """A byte per token and the few weights of a sample; nothing of a sample, or a block, without any."""
    builder, blocks, origin = BlockBuilder(), [], Conversation([], "a", 0)
    builder.add(Encoded([1, 2, 3], [-100, 2, 3]), origin)
    builder.add(Encoded([4, 5, 6, 7], [-100, 5, 6, 7], weights=[0.0, 0.5, 2.0, 0.5]), origin)
    builder.add(Encoded([8, 9], [-100, 9], weights=[0.0, 1.0]), origin)  # the rest was cut off
    blocks.append(builder.take())
    builder.add(Encoded([1, 2], [-100, 2]), origin)
    blocks.append(builder.take())
    if mapped:
        with write_blocks(tmp_path / "x.arrow") as file:
            for block in blocks:
                file.add(block)
            file.finish({})
        blocks, _ = read_blocks(tmp_path / "x.arrow")
    assert blocks[0].supervised.tolist() == [0, 1, 1, 0, 1, 2, 1, 0, 1] and blocks[0].supervised.dtype == np.uint8
    assert blocks[0].weights.to_pylist() == [[], [0.5, 2.0], []] and blocks[1].weights is None
    dataset = TokenDataset(blocks, ["a"], 9)
    assert dataset[1] == {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7], "loss_weights": [0.0, 0.5, 2.0, 0.5]}
    assert [dataset[i].keys() for i in (0, 2, 3)] == [{"input_ids", "labels"}] * 3
    with pytest.raises(DataError, match="has 299 different weights; expected at most 255"):
        require_storable(Encoded([1] * 300, [1] * 300, weights=[*map(float, range(300))]))


def test_large_sets_are_written_block_by_block(path, tmp_path, monkeypatch):
    expected = content(load(path, tmp_path / "one"))
    monkeypatch.setattr(blocks_module, "_MOST_TOKENS", 100)
    data = load(path, tmp_path / "several")
    assert len(data.dataset("train")._blocks) > 2
    assert content(data) == content(load(path, tmp_path / "several")) == expected


# -- processes ----------------------------------------------------------------------------------------------------


def tokenise_at_once(path, folder):
    """Several times, removing what is there in between, as if the others had just begun."""
    samples = []
    for _ in range(5):
        samples.append(content(load(path, folder)))
        for file in folder.glob("*.arrow"):
            file.unlink(missing_ok=True)
    return samples


def test_several_processes_at_once(path, tmp_path):
    expected = content(load(path, tmp_path, cache=False))
    for samples in run_ranks(tokenise_at_once, 4, path, tmp_path / "cache"):
        assert samples == [expected] * 5
    assert not list((tmp_path / "cache").glob("*.partial"))


def fit_on_two(path, held_out, folder):
    """What this rank tokenises under DDP."""
    made = []
    original = prepare_module.tokenise
    prepare_module.tokenise = lambda name, *args, **kwargs: (made.append(name), original(name, *args, **kwargs))[1]
    data = ShadowData(pair_with(), str(path), {"v": str(held_out)}, cache_dir=str(folder), batch_size=2)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=1,
        use_distributed_sampler=False, enable_checkpointing=False, devices=2, strategy="ddp",
    )  # fmt: skip
    trainer.fit(Recorder(), data)
    return made


def test_one_process_of_a_machine_tokenises_for_all(path, tmp_path):
    (tmp_path / "val.jsonl").write_text(json.dumps({"messages": talk("held", "out")}))
    assert run_ranks(fit_on_two, 2, path, tmp_path / "val.jsonl", tmp_path / "cache") == [["train", "val/v"], []]
