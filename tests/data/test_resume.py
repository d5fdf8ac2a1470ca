"""Interrupted and resumed by Lightning, a run sees exactly the batches that it would have seen."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from shadowlit.data.module import ShadowData
from shadowlit.data.order import check_order
from shadowlit.errors import DataError
from tests.data.templates import talk
from tests.distributed import run_ranks
from tests.tiny import CHATML, make_tokenizer

PAIR = SimpleNamespace(tokenizer=lambda: make_tokenizer(CHATML))
NUM_ROWS, BATCH_SIZE, EPOCHS = 10, 3, 3
PER_EPOCH = 4


class Recorder(LightningModule):
    """Writes down which samples each training batch holds."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch_idx, [answer(row) for row in batch["labels"]]))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def answer(labels):
    """The answer of a row, a letter; of a packed row all of them."""
    return make_tokenizer().decode(labels[labels != -100]).replace("<|im_end|>", "")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"messages": talk("x" * (1 + i % 3), chr(ord("a") + i))} for i in range(NUM_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_stem("val").write_text(json.dumps({"messages": talk("v", "v")}) + "\n")
    return str(path)


def data(path, **options):
    held_out = path.replace("train", "val")
    return ShadowData(PAIR, path, validation=held_out, **{"batch_size": BATCH_SIZE, "seed": 1, **options})


def fit(data, *, ckpt_path=None, callbacks=(), **options):
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, enable_checkpointing=bool(callbacks), callbacks=list(callbacks),
        num_sanity_val_steps=0, **{"devices": 1, "max_epochs": EPOCHS, **options},
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module.seen, trainer


@pytest.fixture(scope="module")
def whole(path):
    """The uninterrupted run."""
    seen = fit(data(path))[0]
    assert [i for i, _ in seen] == [*range(PER_EPOCH)] * EPOCHS
    epochs = ["".join(sorted("".join(b) for _, batch in seen[e * 4 : e * 4 + 4] for b in batch)) for e in range(EPOCHS)]
    assert epochs == ["abcdefghij"] * EPOCHS
    assert len({str(seen[e * 4 : e * 4 + 4]) for e in range(EPOCHS)}) == EPOCHS
    return seen


SAVES = {
    "every step": {"every_n_train_steps": 1},
    "epoch end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation end": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
}


@pytest.mark.parametrize("saves", SAVES)
@pytest.mark.parametrize("num_workers, options", [
    (0, {}), (2, {}), (0, {"val_check_interval": 2}),
    pytest.param(0, {"max_epochs": -1, "max_steps": 12}, marks=pytest.mark.slow),
])  # fmt: skip
def test_resumed_sees_what_uninterrupted_sees(path, whole, tmp_path, saves, num_workers, options):
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **SAVES[saves])
    assert fit(data(path, num_workers=num_workers), callbacks=[saver], **options)[0] == whole
    files = {int(file.stem.removeprefix("step=")): file for file in tmp_path.glob("*.ckpt")}
    expected = {"every step": set(range(1, 13)), "epoch end": {4, 8, 12}, "validation end": {4, 8, 12}}[saves]
    assert expected <= set(files)
    for step in sorted(files) if num_workers == 0 else (min(files), sorted(files)[-2]):
        seen, trainer = fit(data(path, num_workers=num_workers), ckpt_path=files[step], **options)
        assert seen == whole[step:], f"resumed at {step}"
        assert trainer.global_step == 12


ORDERS = {
    "best fit": {"packing": "best_fit", "max_length": 64, "pack_length": 100, "batch_size": 1},
    "padding-free": {"packing": "padding_free"},
    "grouped": {"group_by_length": True},
}


@pytest.mark.parametrize("order", ORDERS)
def test_resumed_in_the_middle_of_packed_and_grouped_epochs(path, whole, tmp_path, order):
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    seen, trainer = fit(data(path, **ORDERS[order]), callbacks=[saver])
    assert trainer.global_step == len(seen) and len(seen) % EPOCHS == 0
    size = len(seen) // EPOCHS
    letters = [
        "".join(sorted("".join(r for _, b in seen[e * size : (e + 1) * size] for r in b))) for e in range(EPOCHS)
    ]
    assert letters == ["abcdefghij"] * EPOCHS
    if order == "padding-free":  # the same samples in the same steps, as one row
        assert [(i, "".join(rows)) for i, rows in seen] == [(i, "".join(rows)) for i, rows in whole]
    else:
        assert len({str(seen[e * size : (e + 1) * size]) for e in range(EPOCHS)}) == EPOCHS
    for step in range(1, len(seen)):
        workers = 2 if step in (2, size) else 0
        resumed = fit(data(path, num_workers=workers, **ORDERS[order]), ckpt_path=tmp_path / f"step={step}.ckpt")[0]
        assert resumed == seen[step:], f"resumed at {step}"


def test_no_resume_in_the_middle_of_other_packs(path, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(data(path, batch_size=2), callbacks=[saver], max_epochs=1)
    middle, end = tmp_path / "step=2.ckpt", tmp_path / "step=5.ckpt"
    with pytest.raises(
        DataError, match=r"num_samples 10 → 3, packing None → best_fit, pack_length None → 100\. Resume with"
    ):
        fit(data(path, **{**ORDERS["best fit"], "batch_size": 2}), ckpt_path=middle)
    with pytest.raises(DataError, match=r"in an order that these data don't give: loss_on None → last\."):
        fit(data(path, batch_size=2, loss_on="last"), ckpt_path=middle)
    with pytest.raises(DataError, match=r"in an order that these data don't give: group_by_length None → True\."):
        fit(data(path, batch_size=2, group_by_length=True), ckpt_path=middle)
    fit(data(path, batch_size=2, packing="padding_free"), ckpt_path=middle)  # the same order
    with pytest.warns(UserWarning, match="resumes with other data or batches than before: group_by_length None → True"):
        fit(data(path, batch_size=2, group_by_length=True), ckpt_path=end)


def test_no_resume_with_other_rows_under_the_same_path(path, tmp_path):
    """As many of them; between epochs it is a warning."""
    file, rows = tmp_path / "train.jsonl", Path(path).read_text()
    file.write_text(rows)
    shutil.copy(Path(path).with_stem("val"), tmp_path)
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(data(str(file), batch_size=2), callbacks=[saver], max_epochs=1)
    file.write_text(rows.replace('"a"', '"z"'))
    with pytest.raises(DataError, match=r"these data don't give: checksum of the samples \w+ → \w+\. Resume with"):
        fit(data(str(file), batch_size=2), ckpt_path=tmp_path / "step=2.ckpt")
    with pytest.warns(UserWarning, match="other data or batches than before: checksum of the samples"):
        fit(data(str(file), batch_size=2), ckpt_path=tmp_path / "step=5.ckpt")
    before = {"num_samples": 10}  # of an earlier version
    check_order(before, {**before, "checksum of the samples": "0"}, {"batch": 2})


def test_saved_after_the_end_of_max_steps(path, whole, tmp_path):
    """Lightning counts the epoch as finished and begins at 0 again; the data go on where they were."""
    _, trainer = fit(data(path), max_epochs=-1, max_steps=6)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    seen = fit(data(path), ckpt_path=tmp_path / "a.ckpt", max_epochs=-1, max_steps=12)[0]
    assert [batch for _, batch in seen] == [batch for _, batch in whole[6:]]


def test_epochs_cut_short_by_limit_train_batches(path, whole, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    seen = fit(data(path), callbacks=[saver], limit_train_batches=3)[0]
    assert seen == whole[:3] + whole[4:7] + whole[8:11]
    for step in (2, 3, 4):
        assert fit(data(path), ckpt_path=tmp_path / f"step={step}.ckpt", limit_train_batches=3)[0] == seen[step:]
    assert fit(data(path), limit_train_batches=0.5)[0] == whole[:2] + whole[4:6] + whole[8:10]


def test_reloaded_loaders_go_on_with_the_next_epoch(path, whole):
    assert fit(data(path), reload_dataloaders_every_n_epochs=1)[0] == whole


def test_a_second_fit_starts_over(path, whole):
    same = data(path)
    assert fit(same)[0] == whole
    assert fit(same)[0] == whole


def test_overfitting_takes_the_same_batches_each_epoch(path):
    seen = fit(data(path), overfit_batches=2)[0]
    assert seen[:2] == seen[2:4] == seen[4:] and seen[0][1] == ["a", "b", "c"]


def test_no_resume_in_the_middle_of_another_order(path, tmp_path, caplog):
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(data(path), callbacks=[saver])
    with pytest.raises(
        DataError, match=r"after 2 batches of an epoch.*global_batch_size 3 → 5, seed 1 → 2\. Resume with"
    ):
        fit(data(path, batch_size=5, seed=2), ckpt_path=tmp_path / "step=2.ckpt")
    with pytest.warns(UserWarning, match="resumes with other data or batches than before: seed 1 → 2"):
        fit(data(path, seed=2), ckpt_path=tmp_path / "step=4.ckpt")


def test_a_checkpoint_to_validate_with_says_nothing_to_a_later_fit(path, whole, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(data(path), callbacks=[saver])
    same, module = data(path), Recorder()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=EPOCHS,
                      enable_checkpointing=False, num_sanity_val_steps=0, enable_model_summary=False)  # fmt: skip
    trainer.validate(module, same, ckpt_path=tmp_path / "step=2.ckpt")
    trainer.fit(module, same)
    assert module.seen == whole


def fit_on_ranks(path, folder, options):
    """What this rank sees under DDP, and the validation labels it gets."""
    pair = SimpleNamespace(tokenizer=lambda: make_tokenizer(CHATML))
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    own = ShadowData(pair, path, validation=path.replace("train", "val"), **{"batch_size": 2, "seed": 1, **options})
    seen, _ = fit(own, callbacks=[saver], devices=2, strategy="ddp", max_epochs=2)
    return seen, [(batch["labels"] != -100).any(1).tolist() for batch in own.val_dataloader()[0]]


def test_two_processes_see_the_global_batches_of_one(path, tmp_path):
    """10 samples in global batches of 4: the last two are one for each rank. One of them resumes alone."""
    (left, left_val), (right, right_val) = run_ranks(fit_on_ranks, 2, path, tmp_path, {})
    alone = fit(data(path, batch_size=4), max_epochs=2)[0]
    assert [i for i, _ in left] == [i for i, _ in right] == [i for i, _ in alone] == [0, 1, 2] * 2
    together = [sorted(a + b) for (_, a), (_, b) in zip(left, right, strict=True)]
    assert together == [sorted(batch) for _, batch in alone]
    assert [left_val, right_val] == [[[True]], [[False]]]
    resumed = fit(data(path, batch_size=4), ckpt_path=tmp_path / "step=2.ckpt", max_epochs=2)[0]
    assert [sorted(batch) for _, batch in resumed] == together[2:]


@pytest.mark.parametrize("order", ORDERS)
def test_two_processes_see_the_packs_and_groups_of_one(path, tmp_path, order):
    """Equally many batches each, and together what one process sees with batches twice as large."""
    batch_size = ORDERS[order].get("batch_size", 2)
    (left, _), (right, _) = run_ranks(fit_on_ranks, 2, path, tmp_path, ORDERS[order])
    alone = fit(data(path, **{**ORDERS[order], "batch_size": 2 * batch_size}), max_epochs=2)[0]
    assert [i for i, _ in left] == [i for i, _ in right] == [i for i, _ in alone]
    together = [[*a, *b] for (_, a), (_, b) in zip(left, right, strict=True)]
    if order == "padding-free":
        together, alone = [["".join(rows)] for rows in together], [(i, ["".join(rows)]) for i, rows in alone]
        assert [sorted(row) for (row,) in together] == [sorted(row) for _, (row,) in alone]
        return
    assert [sorted(filter(None, rows)) for rows in together] == [sorted(rows) for _, rows in alone]
    resumed = fit(
        data(path, **{**ORDERS[order], "batch_size": 2 * batch_size}), ckpt_path=tmp_path / "step=2.ckpt", max_epochs=2
    )[0]
    assert resumed == alone[2:]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_stream_and_a_whole_data_set_do_not_resume_each_other(path, tmp_path, streamed):
    """In the middle of an order, and at its beginning."""
    same = data(path, streaming=streamed)
    _, trainer = fit(same, max_epochs=-1, max_steps=4)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    states = [same.state_dict(), {**same.state_dict(), **dict.fromkeys(("epoch", "batch", "number", "window"), 0)}]
    was, now = str(streamed).lower(), str(not streamed).lower()
    message = f"taken with data.streaming={was}, and this run has {now}: .* Set data.streaming={was} to resume, or"
    with pytest.raises(DataError, match=message):
        fit(data(path, streaming=not streamed), ckpt_path=tmp_path / "end.ckpt", max_epochs=-1, max_steps=8)
    other = data(path, streaming=not streamed)
    _, trainer = fit(other, max_epochs=-1, max_steps=1)
    for state in states:
        other.load_state_dict(state)
        with pytest.raises(DataError, match=message):
            other.train_dataloader()
