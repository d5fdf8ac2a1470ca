"""Whether the checkpoints of a training can be written, asked before its first step: by every rank, and by size."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Adam

from shadowlit.checkpoint.folder import Needed, require_free
from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.saved import explained
from shadowlit.distributed import local, of_all_ranks, on_first_rank, rank
from shadowlit.errors import CheckpointError
from shadowlit.files import partial_path, require_writable
from shadowlit.training.checkpoints import ShardedStrategy

_PATIENCE_S = 10.0  # for caches of network file systems


@runtime_checkable
class NeedsRoom(Protocol):
    """A callback that writes files whose size is known before the first step."""

    def needs_room(self, trainer: Trainer, pl_module: LightningModule) -> list[Needed]:
        """What it will write; called on every rank."""


def require_disks(trainer: Trainer) -> None:
    """Raise before the first step if a checkpoint could not be written, by a trainer that is set up; a collective.

    Raises:
        CheckpointError: A rank doesn't see the folder to which it would write its shards, or it can't be written.
        ExportError: A disk has no room for the checkpoints that will be kept, the next one, and what callbacks write.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ShardedStrategy) and strategy._save_distributed_checkpoint:
        require_shared(trainer, "each writes its shards of a checkpoint to it")
    callbacks = [each for each in trainer.callbacks if isinstance(each, NeedsRoom)]  # type: ignore[attr-defined]
    needed = [need for each in callbacks for need in each.needs_room(trainer, trainer.lightning_module)]
    needed += _checkpoints(trainer)
    on_first_rank(explained(needed[-1].folder)(lambda: require_free(needed)) if needed else lambda: None)


def require_shared(trainer: Trainer, why: str) -> None:
    """Raise unless every rank sees what rank 0 writes to the folders of the checkpoints; a collective.

    Network file systems are given some seconds to show it.

    Raises:
        CheckpointError: With the folder, and the ranks and hosts that don't see it.
    """
    for folder in _folders(trainer) if trainer.world_size > 1 else ():
        probe: list[str] = []

        def write(folder: Path = folder, probe: list[str] = probe) -> None:
            file = partial_path(require_writable(folder) / "probe")
            file.touch()
            probe.append(str(file))

        try:
            on_first_rank(explained(folder)(write))
            (path,) = of_all_ranks(probe)
            end = time.monotonic() + _PATIENCE_S
            while not (seen := _sees(Path(path))) and time.monotonic() < end:
                time.sleep(0.2)
            blind = of_all_ranks([] if seen else [f"{rank()} ({platform.node()})"])
        finally:
            for path in probe:
                Path(path).unlink(missing_ok=True)
        if blind:
            raise CheckpointError(
                f"what rank 0 ({platform.node()}) writes to {folder} can't be seen by rank {some_of(blind)}, but {why}."
                " Set trainer.default_root_dir, the logger's save_dir or ModelCheckpoint's dirpath to a folder that "
                "all nodes share, or train on one node."
            )


def _sees(file: Path) -> bool:
    """Whether a file is listed in its folder; unlike a look-up of its name, this is not answered by a cache of NFS."""
    try:
        return file.name in os.listdir(file.parent)
    except OSError:
        return False


def _folders(trainer: Trainer) -> dict[Path, ModelCheckpoint]:
    """The local folders of a trainer's checkpoints; none where it writes none."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return {}
    savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return {Path(each.dirpath): each for each in savers if each.dirpath and "://" not in str(each.dirpath)}


def _checkpoints(trainer: Trainer) -> Iterator[Needed]:
    """The room for the checkpoints that will be kept and for the next one, as far as it is known before the first."""
    tensors = trainer.lightning_module.state_dict().values()
    weights = sum({local(tensor).data_ptr(): tensor.nbytes for tensor in tensors}.values())  # tied ones once
    groups = [group for each in trainer.optimizers if isinstance(each, Adam) for group in each.param_groups]
    moments = 2 * sum(parameter.nbytes for group in groups for parameter in group["params"])
    for folder, saver in _folders(trainer).items():
        every = saver._every_n_train_steps
        times = trainer.estimated_stepping_batches / every if every else math.inf
        kept = min(saver.save_top_k if saver.save_top_k >= 0 else times, times)
        kept = (int(kept) if kept < math.inf else 1) + (saver.save_last is True)
        number = max(0, kept - len(list(folder.glob("*.ckpt")))) + 1
        size = weights + (0 if saver.save_weights_only else moments)
        what = f"{number} checkpoint{'s' * (number > 1)} of {size / 1e9:.3f} GB in {folder}"
        if kept:
            yield Needed(folder, number * size, what)
