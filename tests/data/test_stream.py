"""A stream gives the batches of a whole data set, without holding it; and goes on where it was."""

import json
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from shadowlit.data.dataset import TokenDataset
from shadowlit.data.module import ShadowData
from shadowlit.data.sources import read_conversations, stream_conversations
from shadowlit.errors import DataError
from tests.data.templates import talk
from tests.data.test_resume import PAIR, Recorder, answer

LETTERS = set("abcdefghij")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Ten rows whose answers are letters."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"messages": talk("x" * (1 + i % 3), letter)} for i, letter in enumerate(sorted(LETTERS))]
    rows[4]["messages"][1]["weight"] = 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data(path, **options):
    return ShadowData(PAIR, path, **{"batch_size": 3, "seed": 1, "streaming": True, "stream_window": 4, **options})


def on_rank(data, rank=0, world_size=1, max_steps=100, accumulate=1):
    data.trainer = SimpleNamespace(
        max_steps=max_steps, accumulate_grad_batches=accumulate, world_size=world_size, global_rank=rank,
        overfit_batches=0, accelerator=None, train_dataloader=None, current_epoch=0, limit_train_batches=1.0,
    )  # fmt: skip
    data.setup("fit")
    return data


def batches(data, count, **where):
    loader = on_rank(data, **where).train_dataloader()
    return list(islice(loader, count)), loader


def answers(batches):
    return [answer(row) for batch in batches for row in batch["labels"]]


@pytest.mark.parametrize(
    "options", [{}, {"group_by_length": True}, {"packing": "padding_free"}, {"packing": "best_fit", "max_length": 40}]
)
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 1)])
def test_a_window_of_all_rows_gives_the_batches_of_an_epoch(path, options, world_size, rank):
    whole, _ = batches(data(path, streaming=False, **options), 100, world_size=world_size, rank=rank)
    streamed, loader = batches(
        data(path, stream_window=10, **options), len(whole), world_size=world_size, rank=rank, max_steps=7, accumulate=2
    )
    assert len(whole) > 1 and len(loader) == 14
    assert world_size == 2 or sum("loss_weights" in batch for batch in whole) == 1
    for one, other in zip(whole, streamed, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_pass_has_every_row_once_in_windows_of_its_own_order(path):
    found, _ = batches(data(path), 2 + 2 + 1 + 5)  # windows of 4, 4 and 2 rows, in batches of 3
    first, second = answers(found[:5]), answers(found[5:])
    assert set("".join(first)) == set("".join(second)) == LETTERS
    assert len(first) == len(second) == 10
    assert set(first[:4]) == set("abcd") and set(first[8:]) == set("ij")
    assert first != second  # another order in the next pass
    assert answers(batches(data(path, shuffle=False), 5)[0]) == sorted(LETTERS)
    assert len(answers(batches(data(path, drop_last=True), 2)[0])) == 6  # a whole batch of each of the large windows


def test_ranks_share_a_window(path):
    parts = [answers(batches(data(path, batch_size=2, stream_window=8), 3, world_size=2, rank=r)[0]) for r in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(LETTERS)


def test_rows_are_read_when_they_are_due(path, tmp_path):
    lines = Path(path).read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines[:9], "{", ""]))
    found = data(str(broken))
    assert len(answers(batches(found, 4)[0])) == 8
    with pytest.raises(DataError, match=r"sample 9 of .*broken\.jsonl \(line 10\) is broken JSON"):
        batches(found, 5)
    later = tmp_path / "later.jsonl"
    later.write_text("\n".join([*lines[:6], json.dumps({"messages": [{"role": "user", "content": "?"}]})]))
    with pytest.raises(DataError, match=r"sample 6 of .*later\.jsonl \(line 7\)"):
        batches(data(str(later)), 4)


def fit(data, root, max_steps, ckpt_path=None, **options):
    recorder = Recorder()
    save = ModelCheckpoint(root, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=max_steps, logger=False, callbacks=[save], enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0, **options,
    )  # fmt: skip
    trainer.fit(recorder, data, ckpt_path=ckpt_path)
    return recorder.seen, trainer


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resumes_with_the_next_batch(path, tmp_path, num_workers):
    path = shutil.copy(path, tmp_path)
    options = {"num_workers": num_workers}
    whole, trainer = fit(data(path, **options), tmp_path / "whole", 9)
    assert [number for number, _ in whole] == list(range(9)) and trainer.current_epoch == 1
    begun, _ = fit(data(path, **options), tmp_path / "begun", 9)
    assert begun == whole
    for step in (3, 5):  # in the middle of a window, and at the end of a pass
        rest, trainer = fit(data(path, **options), tmp_path / "rest", 9, tmp_path / "begun" / f"step={step}.ckpt")
        assert rest == whole[step:], step
        assert trainer.datamodule.trained_tokens(1.0) > 9 * 20
    with pytest.raises(DataError, match=r"in window 1 of a stream.*stream_window 4 → 5"):
        fit(data(path, stream_window=5), tmp_path / "other", 9, tmp_path / "begun" / "step=3.ckpt")
    size = Path(path).stat().st_size
    with Path(path).open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=rf"in window 1 of a stream.*bytes of the files \[{size}\] → \[{size + 1}\]"):
        fit(data(path), tmp_path / "other", 9, tmp_path / "begun" / "step=3.ckpt")


def test_counts_the_tokens_of_the_training(path, tmp_path):
    _, trainer = fit(data(path), tmp_path, 5)
    whole = data(path, streaming=False)
    whole.setup("fit")
    assert trainer.datamodule.trained_tokens(1.0) == whole.reports["train"].num_tokens


def test_epochs_of_a_limited_length_go_on_in_the_stream(path, tmp_path):
    whole, _ = fit(data(path), tmp_path / "whole", 6)
    cut, _ = fit(data(path), tmp_path / "cut", 6, limit_train_batches=2)
    assert [rows for _, rows in cut] == [rows for _, rows in whole]


def test_every_kind_of_source_streams(path, tmp_path):
    expected = [c.messages for c in read_conversations(path)]
    rows = datasets.Dataset.from_list([json.loads(line) for line in Path(path).read_text().splitlines()])
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for source in (path, tmp_path / "parquet" / "train.parquet", tmp_path / "parquet", tmp_path / "saved"):
        assert [c.messages for c in stream_conversations(str(source))] == expected, source
    two = data([path, path], shuffle=False, stream_window=20)
    assert answers(batches(two, 7)[0]) == sorted(LETTERS) * 2


def test_bad_input_is_told_before_the_training(path, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"messages": talk("q", "a")}]))
    (tmp_path / "latin.jsonl").write_bytes(
        json.dumps({"messages": talk("q", "ä")}, ensure_ascii=False).encode("latin1")
    )
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "table.xlsx").write_text("a,b")
    for name, expected in {
        "list.json": "one JSON list",
        "latin.jsonl": "is not UTF-8: byte 0xe4 in line 1",
        "table.xlsx": r"has the extension '\.xlsx'; expected one of",
        "empty.jsonl": "no sample in its first 0 rows",
        "missing.jsonl": "does not exist",
    }.items():
        with pytest.raises(DataError, match=expected):
            on_rank(data(str(tmp_path / name)))
    with pytest.raises(DataError, match=r"limit_train_samples is 5, a choice among all rows"):
        data(path, limit_train_samples=5)
    with pytest.raises(DataError, match=r"needs trainer\.max_steps"):
        batches(data(path), 1, max_steps=-1)
    with pytest.raises(DataError, match=r"a whole pass over data\.train gives no batch"):
        batches(data(path, drop_last=True, batch_size=8), 1)


def test_a_preview_shows_the_first_samples(path):
    shown = data(path)
    shown.setup("fit")
    assert len(shown.dataset("train")) == 4


def test_an_image_that_comes_later_is_refused_in_packed_rows(path, monkeypatch):
    """Every window is looked at, not the first one alone."""
    ready = on_rank(data(path, packing="padding_free"))
    monkeypatch.setattr(TokenDataset, "has_images", property(lambda self: True))
    with pytest.raises(DataError, match=r"data\.packing is 'padding_free', but the training samples have images"):
        next(iter(ready.train_dataloader()))
