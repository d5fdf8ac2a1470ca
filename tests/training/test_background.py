"""Checkpoints that are written while the training goes on: the same files, the same numbers, the same guarantees."""

import errno
import json
import math
import os
import threading
from collections import OrderedDict
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from shadowlit.callbacks.checkpoint import CheckpointCallback
from shadowlit.checkpoint.saved import find_whole, write_file
from shadowlit.errors import CheckpointError, ShadowlitError
from shadowlit.files import remove
from shadowlit.training import checkpoints
from shadowlit.training.background import Background
from tests.distributed import run_ranks
from tests.tiny import save_pair
from tests.training.test_distributed import fit_rows, require_rest, write_rows


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_copy_is_what_was_saved_and_holds_equal_tensors_once():
    weight, moment, paths = torch.arange(6.0).view(2, 3), torch.ones(4), ["a"]
    weights = OrderedDict(a=weight, tied=weight.detach(), half=torch.ones(2, dtype=torch.bfloat16))
    weights._metadata = {"version": 1}
    content = {"state_dict": weights, "callbacks": {"paths": paths}, "optimizer": [{"state": {0: {"m": moment}}}]}
    background = Background()
    first = background.copied(content)
    weight.add_(1)
    paths.append("b")
    second = background.copied(content)
    assert torch.equal(first["state_dict"]["a"], torch.arange(6.0).view(2, 3)) and first["callbacks"]["paths"] == ["a"]
    assert torch.equal(second["state_dict"]["a"], weight) and second["callbacks"]["paths"] == ["a", "b"]
    for one in (first, second):
        assert one["state_dict"]["tied"] is one["state_dict"]["a"] and one["state_dict"]._metadata == {"version": 1}
    assert first["optimizer"][0]["state"][0]["m"] is second["optimizer"][0]["state"][0]["m"] is not moment
    background.close()


def test_what_follows_an_error_is_neither_written_nor_removed(tmp_path):
    background, old, new = Background(), tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    go = threading.Event()
    old.touch()
    background.begin(1)
    background.submit(old, lambda: go.wait(20) and None, exists=True)
    background.submit(new, full, exists=True)
    background.submit(old, lambda: remove(old), exists=False)
    background.look()  # nothing is finished
    assert background.step == 1 and background.exists == {str(new): True, str(old): False}
    go.set()
    with pytest.raises(CheckpointError, match=r"new.ckpt can't be written \(No space left on device\). Earlier"):
        background.begin(2)
    assert old.exists() and not new.exists()
    background.begin(2)
    background.submit(new, new.touch, exists=True)
    background.close()
    assert not new.exists()


class Goes(Callback):
    """Lets a checkpoint be written only when the next one is asked for, or at the training's end."""

    def __init__(self):
        self.condition, self.asked, self.steps = threading.Condition(), 0.0, 0

    def on_train_batch_end(self, trainer, *_):
        self.steps = trainer.global_step

    def on_save_checkpoint(self, trainer, *_):
        self.ask(trainer.global_step)

    def on_train_end(self, *_):
        self.ask(math.inf)

    def ask(self, step):
        with self.condition:
            self.asked = step
            self.condition.notify_all()

    def write(self, path, content):
        with self.condition:
            assert self.condition.wait_for(lambda: self.asked > content["global_step"], 60)
        write_file(path, content)


class Logs(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.log("step_so_far", float(trainer.global_step))


def content(folder):
    """All that the checkpoints of a folder hold, without paths and times."""
    found = {}
    for path in sorted(folder.glob("*.ckpt")):
        whole = torch.load(find_whole(path, resumes=True), weights_only=True)
        found[path.name] = {name: whole[name] for name in whole if name not in ("callbacks", "state_dict")}
        found[path.name] |= {f"{name} {i}": one.tolist() for i, (name, one) in enumerate(whole["state_dict"].items())}
    return found


@pytest.mark.parametrize("options", [
    {"save_top_k": 2, "monitor": "step_so_far", "mode": "max", "filename": "same", "save_last": True},
    {"save_top_k": 1, "filename": "{step}"},
])  # fmt: skip
def test_the_training_goes_on_meanwhile_and_all_is_the_same(tmp_path, options):
    """Names too, which ModelCheckpoint chooses by what is there: same.ckpt and same-v1.ckpt, by turns."""
    folders = save_pair(tmp_path, "qwen3")
    write_rows(tmp_path)

    def saver(name):
        return ModelCheckpoint(tmp_path / name, every_n_train_steps=1, **options)

    before, _ = fit_rows(folders, "full", tmp_path, "auto", 1, callbacks=[saver("before"), Logs()])
    goes = Goes()
    callbacks = [saver("after"), Logs(), goes, CheckpointCallback(True)]
    with patch.object(checkpoints, "write_file", goes.write):
        after, _ = fit_rows(folders, "full", tmp_path, "auto", 1, callbacks=callbacks)
    require_rest(after, before, 0)
    assert str(content(tmp_path / "after")) == str(content(tmp_path / "before"))
    names = ["last.ckpt", "same-v1.ckpt", "same.ckpt"] if "save_last" in options else ["step=4.ckpt"]
    assert sorted(os.listdir(tmp_path / "after")) == names
    assert torch.load(tmp_path / "after" / names[0], weights_only=True)["global_step"] == 4


def test_an_error_is_raised_after_the_next_batch(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    write_rows(tmp_path)
    goes, saver = Goes(), ModelCheckpoint(tmp_path / "runs", filename="{step}", every_n_train_steps=1)

    def write(path, content):
        (full if content["global_step"] == 2 else write_file)(path, content)

    with (
        patch.object(checkpoints, "write_file", write),
        pytest.raises(CheckpointError, match=r"step=2.ckpt can't be written \(No space left on device\)"),
    ):
        fit_rows(folders, "full", tmp_path, "auto", 1, callbacks=[saver, goes, CheckpointCallback(True)])
    assert goes.steps in (2, 3)  # it may have begun the next one
    assert os.listdir(tmp_path / "runs") == ["step=1.ckpt"]


@pytest.mark.parametrize(("save_last", "plugins", "message"), [
    ("link", [], "save_last of ModelCheckpoint is 'link'"),
    (True, [AsyncCheckpointIO()], "checkpoints are written by SingleDeviceStrategy with AsyncCh"),
])  # fmt: skip
def test_what_it_does_not_go_with_is_refused(tmp_path, save_last, plugins, message):
    folders = save_pair(tmp_path, "qwen3")
    write_rows(tmp_path)
    saver = ModelCheckpoint(tmp_path, save_last=save_last)
    with pytest.raises(ShadowlitError, match=f"^checkpoint.asynchronous is true, but {message}"):
        fit_rows(folders, "full", tmp_path, "auto", 1, callbacks=[saver, CheckpointCallback(True)], plugins=plugins)


_COLLECTIVES = (
    "all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "all_gather", "all_reduce",
    "gather", "scatter", "broadcast", "barrier", "all_gather_into_tensor", "reduce_scatter_tensor",
)  # fmt: skip


class Heard:
    """The collectives that threads other than the main one begin, with their groups."""

    def __init__(self):
        self.groups, self.patches = [], []
        for module in (dist, dist.distributed_c10d):
            for name in _COLLECTIVES:
                self.patches.append(patch.object(module, name, self.wrap(getattr(module, name))))

    def wrap(self, function):
        def heard(*args, **kwargs):
            if threading.current_thread() is not threading.main_thread():
                groups = [each for each in (*args, *kwargs.values()) if isinstance(each, dist.ProcessGroup)]
                self.groups.append((function.__name__, groups[0].group_name if groups else None))
            return function(*args, **kwargs)

        return heard

    def __enter__(self):
        for each in self.patches:
            each.start()
        return self

    def __exit__(self, *_):
        for each in self.patches:
            each.stop()


def shards(path):
    files = json.loads((path / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".distcp")}


def train_meanwhile(folders, out, strategy):
    rank = int(os.environ["RANK"])

    def run(name, *callbacks):
        saver = ModelCheckpoint(out / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return fit_rows(folders, "full", out, strategy, 2, callbacks=[saver, *callbacks], limit_val_batches=0)[0]

    before = run("before")
    slow, checksums, meanwhile = threading.Event(), checkpoints.checksums, CheckpointCallback(True)

    def late(*args):  # the threads of the ranks lag behind one another, and behind the training
        slow.wait(0.3 * rank)
        return checksums(*args)

    with Heard() as heard, patch.object(checkpoints, "checksums", late):
        after = run("after", meanwhile)
    require_rest(after, before, 0)
    own = meanwhile._background.group.group_name
    what, on = ("checksums", 1) if strategy == "fsdp2" else ("write_file", 0)
    goes = Goes()
    with (
        patch.object(checkpoints, what, full if rank == on else getattr(checkpoints, what)),
        pytest.raises(CheckpointError) as error,
    ):
        run("failed", goes, CheckpointCallback(True))
    return {name for name, _ in heard.groups}, {group == own for _, group in heard.groups}, str(error.value), goes.steps


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_collectives_of_the_thread_do_not_meet_those_of_the_training(tmp_path, strategy):
    """The ranks train to the same bits, write the same shards, and fail at the same step."""
    folders = save_pair(tmp_path, "qwen3")
    write_rows(tmp_path)
    one, other = run_ranks(train_meanwhile, 2, folders, tmp_path, strategy)
    assert one == other and "step=1.ckpt can't be written (No space left on device)" in one[2]
    names = [f"step={step}.ckpt" for step in range(1, 5)]
    assert sorted(os.listdir(tmp_path / "after")) == sorted(os.listdir(tmp_path / "before")) == names
    assert list(tmp_path.glob("failed/*")) == []
    if strategy == "fsdp2":
        assert one[1] == {True} and {"all_gather_object", "gather_object"} <= one[0]
        assert all(shards(tmp_path / "after" / name) == shards(tmp_path / "before" / name) for name in names)
    else:
        assert str(content(tmp_path / "after")) == str(content(tmp_path / "before"))
