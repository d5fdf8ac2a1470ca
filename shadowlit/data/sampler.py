"""The samples in each batch of each rank, as a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, Final

import numpy as np
from torch.utils.data import Sampler

from shadowlit.errors import DataError, counted


class Filler(Enum):
    """Type of :data:`FILLER`."""

    FILLER = "filler"


FILLER: Final = Filler.FILLER
"""Index of the filler: a sample without supervision that a rank gets where no sample is left for it."""

FILLER_ROW = -1
"""What a batch has for a filler instead of the index of a sample or row."""

_MEGABATCH = 64  # global batches whose samples are sorted together by length

Order = Callable[[int], Sequence[Any] | np.ndarray]
"""Function from an epoch to its items in order; every epoch has the same number of items."""


class ShardedBatchSampler(Sampler[list[Any]]):
    """Splits every global batch over the ranks, without duplicates and with the same number of batches on each rank.

    A global batch is ``num_replicas · batch_size`` consecutive items of the epoch's order; rank ``r`` takes every
    ``num_replicas``-th of them, beginning with number ``r``. So one process with batches of 2B and two with batches of
    B see the same global batches. The last global batch may be smaller; a rank for which it has one sample too few gets
    the index :data:`FILLER` instead. There are fewer than ``num_replicas`` fillers per epoch, all in the last batch.
    For 5 samples, 2 ranks, batches of 2 and no shuffling::

        global batch   rank 0    rank 1
        0 1 2 3        0 2       1 3
        4              4         FILLER

    Args:
        num_samples: Size of the data set, or the number of items of an epoch where ``order`` is given.
        batch_size: Samples per rank and batch.
        num_replicas: Number of ranks.
        rank: Rank of this process, from 0.
        seed: Seed for the order, together with the epoch.
        shuffle: Draw a new order for each epoch instead of keeping that of the data set.
        drop_last: Leave out an incomplete last global batch.
        order: Function that gives the items of an epoch instead: packs, or samples grouped by length.

    Raises:
        DataError: A number is out of its range, or ``drop_last`` leaves nothing.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        order: Order | None = None,
    ) -> None:
        if num_samples < 1 or batch_size < 1 or num_replicas < 1 or not 0 <= rank < num_replicas or seed < 0:
            raise DataError(
                f"can't make batches of {batch_size} from {counted(num_samples, 'sample')} for rank {rank} of "
                f"{num_replicas} with seed {seed}; expected at least one sample, batches of at least 1, ranks from 0 "
                "to the number of ranks − 1, and a seed of at least 0."
            )
        if drop_last and num_samples < num_replicas * batch_size:
            raise DataError(
                f"with data.drop_last nothing is left of {counted(num_samples, 'sample')}: a whole global batch has "
                f"{counted(num_replicas, 'rank')} × {batch_size}. Lower data.batch_size or set data.drop_last=false."
            )
        self.num_samples, self.batch_size = num_samples, batch_size
        self.num_replicas, self.rank = num_replicas, rank
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = self.start = 0
        self._order = order

    @property
    def global_batch_size(self) -> int:
        """Samples per batch, over all ranks."""
        return self.num_replicas * self.batch_size

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        whole, rest = divmod(self.num_samples, self.global_batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def seek(self, epoch: int, start: int = 0) -> None:
        """Make the next iteration begin with batch ``start`` of ``epoch``."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[Any]]:
        """This rank's batches of the current epoch, from the current start."""
        return self.batches(self.epoch, self.start)

    def order(self, epoch: int) -> Sequence[Any] | np.ndarray:
        """Return the items of ``epoch`` in order, over all ranks."""
        if self._order is not None:
            return self._order(epoch)
        return epoch_order(self.num_samples, self.seed, epoch, self.shuffle)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Any]]:
        """This rank's batches of ``epoch``, from number ``start``."""
        order = self.order(epoch)
        for number in range(start, len(self)):
            first = number * self.global_batch_size
            together = order[first : first + self.global_batch_size]
            own = together[self.rank :: self.num_replicas]
            missing = -(-len(together) // self.num_replicas) - len(own)
            yield [*(own.tolist() if isinstance(own, np.ndarray) else own), *[FILLER] * missing]


def epoch_order(num_samples: int, seed: int, epoch: int = 0, shuffle: bool = True) -> np.ndarray:
    """Return the order of an epoch: ``[num_samples]`` int64 indices, a permutation drawn from ``(seed, epoch)``."""
    if not shuffle:
        return np.arange(num_samples)
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


def grouped_order(lengths: np.ndarray, global_batch_size: int, seed: int, epoch: int = 0) -> np.ndarray:
    """Return an order in which the samples of a global batch have similar lengths.

    A permutation is split into chunks of 64 global batches, and each chunk is sorted by length. The resulting batches
    are shuffled over the whole epoch, so that there is no trend in their lengths. The incomplete last batch is a random
    choice. ``lengths`` are the tokens of each sample, ``[N]`` int; the result is a permutation, ``[N]`` int64.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    whole = len(order) - len(order) % global_batch_size
    body = order[:whole]
    stretch = np.arange(whole) // (_MEGABATCH * global_batch_size)
    batches = body[np.lexsort((lengths[body], stretch))].reshape(-1, global_batch_size)
    return np.concatenate([random.permutation(batches).reshape(-1), order[whole:]])


def evaluation_order(lengths: np.ndarray, global_batch_size: int) -> np.ndarray:
    """Return a fixed order in which the lengths within a global batch are as similar as possible.

    Whole batches are ordered by the smallest index in each, so that the first batch has the first sample of the set
    rather than the longest samples. The shortest samples come last where they don't fill a batch. Arguments and result
    are as for :func:`grouped_order`.
    """
    order = np.argsort(-lengths, kind="stable")
    whole = len(order) - len(order) % global_batch_size
    batches = order[:whole].reshape(-1, global_batch_size)
    return np.concatenate([batches[np.argsort(batches.min(1))].reshape(-1), order[whole:]])


def count_slots(
    sizes: np.ndarray, batch_size: int, num_replicas: int = 1, multiple: int | None = None, flatten: bool = False
) -> int:
    """Return the number of positions that all ranks compute in an epoch, where every batch is padded to its longest
    row.

    ``sizes`` are the tokens of each row in the order of the epoch, ``[N]`` int. The length of a batch is rounded up to
    a ``multiple``. With ``flatten``, the rows of a batch are concatenated into one.
    """
    rows = batch_size * num_replicas
    grid = np.zeros((-(-len(sizes) // rows), batch_size, num_replicas), np.int64)
    grid.reshape(-1)[: len(sizes)] = sizes
    lengths, rows_of = (grid.sum(1), 1) if flatten else (grid.max(1), (grid > 0).sum(1))
    if multiple is not None:
        lengths = -(-lengths // multiple) * multiple
    return int((lengths * rows_of).sum())
