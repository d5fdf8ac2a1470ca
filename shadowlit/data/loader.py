"""A DataLoader with a position in the data, from which it can resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from shadowlit.data.sampler import ShardedBatchSampler
from shadowlit.signals import end_by_parent, running


class ResumableLoader(DataLoader):
    """Iterates over one epoch after another; its state is the position of the next batch.

    A batch counts when it is handed to the training loop; batches that workers have prefetched don't. With the last
    batch of an epoch, the state becomes the start of the next epoch. ``len`` is always that of a whole epoch: after a
    resume at batch b Lightning continues to count from b, and the loader yields the remaining batches.

    Lightning saves and restores the state of a training loader by itself, except in checkpoints from the end of an
    epoch, whose loader states it saves but doesn't restore (``_FitLoop._load_combined_loader_states`` asks for
    ``restarting``). ``ShadowData`` therefore keeps the position in its own state too.

    An iterator that is abandoned before its end (an epoch cut short) is not resumed: the next iterator begins the next
    epoch, as with any other loader.

    Args:
        dataset: Map-style data set that has a filler for :data:`~shadowlit.data.sampler.FILLER`.
        batch_sampler: Sampler that decides the batches.
        epoch: First epoch.
        batches_per_epoch: Number of batches after which the training loop ends an epoch, if it doesn't take all
            (``limit_train_batches``); at most ``len``.
        options: Options of ``torch.utils.data.DataLoader``.
    """

    batch_sampler: ShardedBatchSampler

    def __init__(
        self,
        dataset: Dataset,
        batch_sampler: ShardedBatchSampler,
        *,
        epoch: int = 0,
        batches_per_epoch: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **quiet(options))
        self._epoch, self._batch = epoch, 0
        self._exact = True  # the position was set, and isn't that of an abandoned iterator
        self._last = min(batches_per_epoch or len(batch_sampler), len(batch_sampler))

    def state_dict(self) -> dict[str, int]:
        """``{"epoch", "batch"}`` of the next batch, both from 0."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a position that :meth:`state_dict` returned."""
        self._epoch, self._batch = state_dict["epoch"], state_dict["batch"]
        self._exact = True

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the rest of the epoch. A generator, since Lightning creates iterators early and drops them unused."""
        if self._batch and not self._exact:
            self._epoch, self._batch = self._epoch + 1, 0
        self._exact = False
        epoch, start = self._epoch, self._batch
        self.batch_sampler.seek(epoch, start)
        for number, batch in enumerate(super().__iter__(), start + 1):
            self._epoch, self._batch = (epoch, number) if number < self._last else (epoch + 1, 0)
            yield batch


def make_loader(dataset: Dataset, batch_sampler: ShardedBatchSampler, **options: Any) -> DataLoader:
    """Return a plain loader for this rank's part of an evaluation set, in the order of the sampler.

    It has a sampler and a batch size instead of the batch sampler, which Lightning can't rebuild for ``predict``. All
    batches but the last are full, so splitting the flat list gives the same batches.
    """
    own = [index for batch in batch_sampler for index in batch]
    return DataLoader(dataset, sampler=own, batch_size=batch_sampler.batch_size, **quiet(options))


def quiet(options: dict[str, Any]) -> dict[str, Any]:
    """Give the loader its own generator: otherwise every iteration draws from the global one, and changes dropout.

    In a command that signals end at a boundary, workers survive the signals: the batches up to it are still needed.
    """
    survives = {"worker_init_fn": end_by_parent} if running() and options.get("num_workers") else {}
    return {"generator": torch.Generator().manual_seed(0), **survives, **options}
