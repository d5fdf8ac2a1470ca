"""Where checkpoints can't be written: ranks that share no disk, and disks without room, found before the first step."""

import os
import re
import shutil
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.distributed import on_all_ranks, on_first_rank
from shadowlit.errors import CheckpointError, ExportError
from shadowlit.text import size as shown_size
from shadowlit.training import disks
from tests.distributed import run_ranks
from tests.synthetic import RandomData
from tests.tiny import save_pair
from tests.training.test_distributed import make_module, make_trainer


class Begun(Exception):
    pass


class NeverTrains(Callback):
    def on_train_batch_start(self, *_):
        raise Begun


def begin(folders, strategy, world_size, *callbacks, **options):
    """The error before the first step, or Begun."""
    trainer = make_trainer(strategy, world_size, [GraftCallback(), NeverTrains(), *callbacks], **options)
    with pytest.raises((CheckpointError, ExportError, Begun)) as error:
        trainer.fit(make_module(folders, "full"), RandomData(8))
    return str(error.value) if error.type is not Begun else Begun


def nodes(folders, out):
    """Each rank has a disk of its own: the path that leads through its working folder leads elsewhere on the other."""
    torch.distributed.init_process_group("gloo")
    rank = dist.get_rank()
    (out / str(rank)).mkdir()
    os.chdir(out / str(rank))
    root, best = {"default_root_dir": "/proc/self/cwd"}, {"monitor": "val/grafted/loss"}
    export = ExportCallback(folder=str(out / "export"))
    whole = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    with patch.object(disks, "_PATIENCE_S", 0.2):
        found = [
            begin(folders, "fsdp2", 2, ModelCheckpoint(), **root),
            begin(folders, "ddp", 2, ModelCheckpoint(**best), export, **root),
            begin(folders, "ddp", 2, ModelCheckpoint(), export, **root),  # exports the last weights
            begin(folders, whole, 2, ModelCheckpoint(**best), **root),  # rank 0 writes all, and nothing is loaded
            begin(folders, "fsdp2", 2, ModelCheckpoint(), default_root_dir=str(out)),
        ]
    late = [False, False]  # as through the cache of a network file system
    with patch.object(disks, "_sees", lambda file: late.pop() if rank and late else file.exists()):
        found.append(begin(folders, "fsdp2", 2, ModelCheckpoint(), default_root_dir=str(out)))
    left = [name for _, _, files in os.walk(out) for name in files]

    def fails():
        raise ExportError(f"of {rank}")

    for call in (on_all_ranks, on_first_rank):
        with pytest.raises(ExportError, match="of 0"):
            call(fails)
    with pytest.raises(ExportError, match="of 1"):
        on_all_ranks(lambda: fails() if rank == 1 else None)
    on_first_rank(lambda: pytest.fail() if rank else None)
    return found, late, left


@pytest.mark.skipif(not os.path.exists("/proc/self/cwd"), reason="Linux")
def test_ranks_that_share_no_disk_are_found_before_the_first_step(tmp_path):
    one, other = run_ranks(nodes, 2, save_pair(tmp_path, "qwen3"), tmp_path)
    (sharded, best, *rest), late, left = one
    assert other == (one[0], [], left) and len(late) == 2 and rest == [Begun] * 4
    assert [name for name in left if "probe" in name or name.endswith(".ckpt")] == []
    message = r"what rank 0 writes to /proc/self/cwd/checkpoints can't be seen by rank 1 \(.+\), but each "
    assert re.match(f"{message}writes its shards of a checkpoint to it. Set run.root ", sharded)
    assert re.match(f"{message}loads the best checkpoint for the export. Set", best)


SAVERS = [  # on a run of 4 steps, and how many checkpoints there can be at the same time
    ({"save_top_k": 1, "every_n_train_steps": 1, "save_last": True}, 3),
    ({"save_top_k": -1, "every_n_train_steps": 2}, 3),
    ({"save_top_k": 5, "every_n_train_steps": 2, "monitor": "loss"}, 3),  # no more are ever saved
    ({"save_top_k": 2, "monitor": "loss", "save_last": "link"}, 3),
    ({"save_top_k": -1, "every_n_epochs": 1}, 2),  # how many is not known
    ({"save_top_k": 0}, 0),
]


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    """By the bytes of all weights and moments, together with the export."""
    folders, free = save_pair(tmp_path, "qwen3"), 10**9
    saver = ModelCheckpoint(tmp_path / "runs", every_n_train_steps=1, save_last=True)
    trainer = make_trainer("auto", 1, [saver], max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(folders, "full"), RandomData(8))
    content = torch.load(tmp_path / "runs/last.ckpt", weights_only=True)
    states = (t for state in content["optimizer_states"][0]["state"].values() for n, t in state.items() if n != "step")
    size = sum({t.data_ptr(): t.nbytes for t in (*content["state_dict"].values(), *states)}.values())
    trainer.fit_loop.epoch_loop.max_steps = 4
    for options, number in SAVERS:
        trainer.callbacks = [ModelCheckpoint(tmp_path / "new", **options)]
        needed = [num_bytes for _, num_bytes, _ in disks._checkpoints(trainer)]
        assert needed == ([number * size] if number else []), options
    trainer.callbacks = [ModelCheckpoint(tmp_path / "new", every_n_train_steps=n, filename=f"{n}") for n in (1, 2)]
    assert [num_bytes for _, num_bytes, _ in disks._checkpoints(trainer)] == [2 * size, 2 * size]  # in one folder
    trainer.callbacks = [saver]  # of a run that is resumed: its two are replaced, one after the other
    assert [num_bytes for _, num_bytes, _ in disks._checkpoints(trainer)] == [size]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))
    free = size - 1
    found = begin(folders, "auto", 1, saver)
    assert (
        found.startswith(f"1 checkpoint of {shown_size(size)} in ")
        and f"runs will take {size:,} bytes, but only {free:,} " in found
    )
    free = size
    assert begin(folders, "auto", 1, saver) is Begun
    both = begin(folders, "auto", 1, saver, ExportCallback(folder=str(tmp_path / "export")))
    assert both.startswith("the export to ") and "B) and 1 checkpoint of " in both
