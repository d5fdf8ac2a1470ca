"""Which samples stand in which batch of which rank: a function of the seed and the epoch, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from shadowlit.errors import DataError

FILLER = -1


class ShardedBatchSampler(Sampler[list[int]]):
    """Splits every global batch over the ranks, without duplicates and with equally many batches on each.

    A global batch is ``num_replicas · batch_size`` consecutive items of the epoch's order; rank ``r`` takes every
    ``num_replicas``-th of them from the ``r``-th on. So one process with batches of 2B and two with batches of B see
    the same global batches. In the last one, which may be smaller, a rank that comes off short gets the index
    :data:`FILLER`: fewer than ``num_replicas`` per epoch, always in the last batch. For 5 samples, 2 ranks,
    batches of 2 and no shuffling::

        global batch   rank 0    rank 1
        0 1 2 3        0 2       1 3
        4              4         FILLER

    Args:
        num_samples: Size of the data set.
        batch_size: Samples per rank and batch.
        num_replicas: Number of ranks.
        rank: This process, from 0.
        seed: With the epoch it decides the order.
        shuffle: A new order each epoch; else the data set's own.
        drop_last: Leave an incomplete last global batch out.

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
    ) -> None:
        if num_samples < 1 or batch_size < 1 or num_replicas < 1 or not 0 <= rank < num_replicas or seed < 0:
            raise DataError(
                f"can't make batches of {batch_size} from {num_samples} samples for rank {rank} of {num_replicas} "
                f"with seed {seed}; expected at least one sample, batches of at least 1, ranks from 0 to the number "
                "of ranks − 1, and a seed of at least 0."
            )
        if drop_last and num_samples < num_replicas * batch_size:
            raise DataError(
                f"{num_samples} samples make no whole global batch of {num_replicas} ranks × {batch_size}, and "
                "data.drop_last leaves nothing. Lower data.batch_size or set data.drop_last=false."
            )
        self.num_samples, self.batch_size = num_samples, batch_size
        self.num_replicas, self.rank = num_replicas, rank
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = self.start = 0

    @property
    def global_batch_size(self) -> int:
        """Samples that all ranks take together in one batch."""
        return self.num_replicas * self.batch_size

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        whole, rest = divmod(self.num_samples, self.global_batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def seek(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration begin with batch ``start`` of ``epoch``."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches of the epoch, from the start on."""
        return self.batches(self.epoch, self.start)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """This rank's batches of ``epoch`` from number ``start`` on."""
        order = epoch_order(self.num_samples, self.seed, epoch, self.shuffle)
        for number in range(start, len(self)):
            first = number * self.global_batch_size
            together = order[first : first + self.global_batch_size]
            own = together[self.rank :: self.num_replicas]
            missing = -(-len(together) // self.num_replicas) - len(own)
            yield [*own.tolist(), *[FILLER] * missing]


def epoch_order(num_samples: int, seed: int, epoch: int = 0, shuffle: bool = True) -> np.ndarray:
    """The order of an epoch: ``[num_samples]`` int64 indices, a permutation drawn from ``(seed, epoch)``."""
    if not shuffle:
        return np.arange(num_samples)
    return np.random.default_rng((seed, epoch)).permutation(num_samples)
