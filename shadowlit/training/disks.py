"""Whether the checkpoints of a training can be written, asked before its first step: by every rank, and by size."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Adam

from shadowlit import text
from shadowlit.checkpoint.folder import require_room
from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.saved import explained
from shadowlit.distributed import local, of_all_ranks, on_first_rank, rank
from shadowlit.errors import CheckpointError, counted
from shadowlit.files import partial_path, require_writable
from shadowlit.training.checkpoints import ShardedStrategy
from shadowlit.training.schedules import step_count

_PATIENCE_S = 10.0  # for caches of network file systems

Needed = tuple[Path, int, str]
"""What will be written: to which folder, which may not exist yet, how many bytes, and its name for an error."""


def require_disks(trainer: Trainer) -> None:
    """Raise before the first step if a checkpoint could not be written, by a trainer that is set up; a collective.

    A callback may have a method ``needs_room(trainer, module)``, which returns a list of :class:`Needed`.

    Raises:
        CheckpointError: A rank doesn't see the folder to which it would write its shards, or it can't be written.
        ExportError: A disk has no room for the checkpoints that will be kept, the next one, and what callbacks write.
    """
    if isinstance(trainer.strategy, ShardedStrategy) and trainer.strategy._save_distributed_checkpoint:
        require_shared(trainer, "each writes its shards of a checkpoint to it")
    needed: list[Needed] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if needs_room := getattr(callback, "needs_room", None):
            needed += needs_room(trainer, trainer.lightning_module)
    needed += _checkpoints(trainer)

    def check() -> None:
        disks = [require_writable(folder).stat().st_dev for folder, _, _ in needed]
        for disk, (folder, _, _) in zip(disks, needed, strict=True):
            here = [one for one, other in zip(needed, disks, strict=True) if other == disk]
            require_room(partial_path(folder / "new"), sum(n for _, n, _ in here), " and ".join(w for *_, w in here))

    on_first_rank(explained(needed[-1][0])(check) if needed else lambda: None)


def require_shared(trainer: Trainer, why: str) -> None:
    """Raise unless every rank sees what rank 0 writes to the folders of the checkpoints; a collective.

    Raises:
        CheckpointError: With the folder, and the ranks and hosts that don't see it.
    """
    for folder in sorted({folder for folder, _ in _savers(trainer)}) if trainer.world_size > 1 else ():
        probe: list[Path] = []

        def write(folder: Path = folder, probe: list[Path] = probe) -> None:
            file = partial_path(require_writable(folder) / "probe")
            file.touch()
            probe.append(file)

        try:
            on_first_rank(explained(folder)(write))
            (file,) = of_all_ranks(probe)
            end = time.monotonic() + _PATIENCE_S
            while not (seen := _sees(file)) and time.monotonic() < end:
                time.sleep(0.2)
            blind = of_all_ranks([] if seen else [f"{rank()} ({platform.node()})"])
        finally:
            for file in probe:
                file.unlink(missing_ok=True)
        if blind:
            raise CheckpointError(
                f"what rank 0 writes to {folder} can't be seen by rank {some_of(blind)}, but {why}. Set run.root (in "
                "Python default_root_dir or the logger's save_dir) or ModelCheckpoint's dirpath to a folder that all "
                "nodes share, or train on one node."
            )


def _sees(file: Path) -> bool:
    """Whether a file is listed in its folder; unlike a look-up of its name, this is not answered by a cache of NFS."""
    try:
        return file.name in os.listdir(file.parent)
    except OSError:
        return False


def _savers(trainer: Trainer) -> list[tuple[Path, ModelCheckpoint]]:
    """What saves a trainer's checkpoints, each with its folder on this machine."""
    savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    never = trainer.fast_dev_run  # type: ignore[attr-defined]
    return [(Path(s.dirpath), s) for s in savers if s.dirpath and "://" not in str(s.dirpath) and not never]


def _checkpoints(trainer: Trainer) -> Iterator[Needed]:
    """The room for the checkpoints that will be kept and for the next one, as far as it is known before the first."""
    tensors = trainer.lightning_module.state_dict().values()
    weights = sum({local(tensor).data_ptr(): tensor.nbytes for tensor in tensors}.values())  # tied ones once
    groups = [group for each in trainer.optimizers if isinstance(each, Adam) for group in each.param_groups]
    moments = 2 * sum(parameter.nbytes for group in groups for parameter in group["params"])
    for folder, saver in _savers(trainer):
        every = saver._every_n_train_steps
        times = step_count(trainer) / every if every else math.inf
        kept = min(saver.save_top_k if saver.save_top_k >= 0 else times, times)
        kept = (int(kept) if kept < math.inf else 1) + (saver.save_last is True)
        number = max(0, kept - len(list(folder.glob("*.ckpt")))) + 1
        size = weights + (0 if saver.save_weights_only else moments)
        if kept:
            yield folder, number * size, f"{counted(number, 'checkpoint')} of {text.size(size)} in {folder}"
