"""Sources in proportion to their weights: the order in which they take turns, and the samples of each epoch.

Sources take turns in a fixed order in which each is never a whole row away from its share (Tijdeman 1980, *The
chairman assignment problem*). Weights 2 and 1 give ``0 1 0 0 1 0 …``.

An epoch is the longest in which no source gives more samples than it has: it ends when the first source has been used
up once. The other sources continue where they stopped in the next epoch, so no sample is left out for good, and none is
used again before all samples of its source have been used. ``datasets.interleave_datasets`` ends an epoch at the same
place, but draws the sources at random and takes the same beginning of the larger ones every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count, islice
from math import gcd, lcm

import numpy as np

from shadowlit.data.packing import PackedOrder, Packs, best_fit_decreasing
from shadowlit.errors import DataError, counted


def take_turns(weights: Sequence[float], taken: Sequence[int] | None = None) -> Iterator[int]:
    """Yield the source of one row after another, without end.

    After any ``n`` rows, source ``i`` has given ``n · weights[i] / Σ weights`` of them, rounded up or down: the
    difference is at most ``1 − 1 / (2k − 2)`` for ``k > 1`` sources. So any stretch of rows has its proportions to
    within two rows per source, or one row with two sources.

    Args:
        weights: Weights of the sources, above 0.
        taken: Rows that each source has given before; None for none.
    """
    shares = _as_integers(weights)
    total, parts = sum(shares), max(1, 2 * len(shares) - 2)
    scale = lcm(*shares)
    given = [0] * len(shares) if taken is None else list(taken)
    for number in count(1 + sum(given)):
        # Of the sources whose next row may come by now, that whose row must come first: at (given + 1 − 1/parts)/share.
        waiting = [i for i, share in enumerate(shares) if number * share * parts >= (given[i] * parts + 1) * total]
        source = min(waiting, key=lambda i: ((given[i] + 1) * parts - 1) * (scale // shares[i]))
        given[source] += 1
        yield source


def _as_integers(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the proportions of the weights, as these are written in decimal."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return [weight // gcd(*whole) for weight in whole]


class Mixture:
    """The samples of every epoch, of sources that take turns by weight.

    An epoch has ``len(mixture)`` samples, the most with which no source gives more than it has.

    Args:
        source_of: Number of the source of each sample, ``[N]`` int.
        weights: Weight of each source.
        seed: Seed for the order in which the samples of a source are used.

    Attributes:
        sizes: Samples of each source.
        counts: Samples of each source in an epoch, ``[k]`` int64.

    Raises:
        DataError: A source has no sample, or none in an epoch.
    """

    def __init__(self, source_of: np.ndarray, weights: Sequence[float], seed: int = 0) -> None:
        self._seed = seed
        self._members = [np.flatnonzero(source_of == i) for i in range(len(weights))]
        shares = _as_integers(weights)
        self.sizes = sizes = [len(members) for members in self._members]
        if not all(sizes):
            raise DataError(
                f"data.train[{sizes.index(0)}] has no sample to mix with the other sources. Correct or remove it."
            )
        total = sum(shares)
        size = min(count * total // share for count, share in zip(sizes, shares, strict=True))
        period = np.fromiter(islice(take_turns(weights), min(size, total)), np.int64)  # it repeats after the total
        self._turns = np.resize(period, size)
        self.counts = np.bincount(self._turns, minlength=len(weights))
        if not self.counts.all():
            last = int(np.argmin([count / share for count, share in zip(sizes, shares, strict=True)]))
            raise DataError(
                f"data.train[{int(self.counts.argmin())}] has so small a weight that none of its samples is among the "
                f"{size:,} of an epoch, which ends when data.train[{last}] is used up, after "
                f"{counted(sizes[last], 'sample')}. "
                "Give it a larger weight, or more rows to the other source."
            )

    def __len__(self) -> int:
        """Number of samples in an epoch."""
        return len(self._turns)

    def __call__(self, epoch: int, shuffle: bool = True) -> np.ndarray:
        """The samples of ``epoch`` in their order, ``[len(self)]`` int64; without ``shuffle``, sources take turns."""
        samples = self.samples(epoch * len(self), len(self), shuffle)
        return np.random.default_rng((self._seed, epoch)).permutation(samples) if shuffle else samples

    def samples(self, start: int, count: int, shuffle: bool = True) -> np.ndarray:
        """``count`` samples of the endless order from number ``start``, in which sources take turns.

        Returns:
            ``[count]`` int64 indices. The samples of each source are those of one permutation after another, or in the
            order of the source without ``shuffle``.
        """
        found = np.empty(count, np.int64)
        whole, rest = divmod(start, len(self))
        turns = self._turns[np.arange(start, start + count) % len(self)]
        for source, members in enumerate(self._members):
            first = whole * int(self.counts[source]) + np.count_nonzero(self._turns[:rest] == source)
            mine = turns == source
            end, size = first + np.count_nonzero(mine), len(members)
            rounds = [self._round(source, number, shuffle) for number in range(first // size, -(-end // size))]
            found[mine] = members[np.concatenate([*rounds, np.zeros(0, np.int64)])[first % size :][: end - first]]
        return found

    def _round(self, source: int, number: int, shuffle: bool) -> np.ndarray:
        """All samples of a source once, in the order of their use."""
        size = len(self._members[source])
        # Not (seed, number, source): numpy takes a last 0 for none, and epochs have seeds of two numbers.
        return np.random.default_rng((self._seed, number, source + 1)).permutation(size) if shuffle else np.arange(size)


class MixedPacks(PackedOrder):
    """Packs of the samples of a mixture, equally many in each epoch.

    The first epoch has the samples of the mixture's first epoch. Every other one begins with the sample at which the
    one before it ended, and has as many samples as the mixture, or as many fewer as needed to have no more packs than
    the first. Where they fill fewer packs, some packs are divided.

    Args:
        mixture: Samples of every epoch.
        lengths: Tokens of each sample, as for :class:`PackedOrder`.
        capacity: Tokens that a pack has room for.
        seed: Seed for the order, together with the epoch.
        shuffle: Draw a new order for each epoch.
    """

    def __init__(
        self, mixture: Mixture, lengths: np.ndarray, capacity: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.capacity, self.seed, self.shuffle = capacity, seed, shuffle
        self._lengths, self._mixture = lengths, mixture
        self._starts = {False: [0], True: [0]}  # of the epochs, with and without shuffle
        self._num_packs = len(mixture)
        self._num_packs = int(self._pack(0)[1].max()) + 1

    def __len__(self) -> int:
        """Number of packs in an epoch."""
        return self._num_packs

    def __call__(self, epoch: int) -> Packs:
        """The packs of ``epoch`` in their order; each is made when it is accessed."""
        starts = self._starts[self.shuffle]
        while len(starts) <= epoch:
            starts.append(starts[-1] + len(self._pack(starts[-1])[0]))
        samples, pack_of = self._pack(starts[epoch])
        ends = np.concatenate([[0], np.cumsum(np.bincount(pack_of))])
        within = np.setdiff1d(np.arange(1, len(samples)), ends)  # where a pack can be divided
        ends = np.sort(np.concatenate([ends, within[: len(self) + 1 - len(ends)]]))
        order = (
            np.random.default_rng((self.seed, epoch)).permutation(len(self)) if self.shuffle else np.arange(len(self))
        )
        return Packs(samples[np.argsort(pack_of, kind="stable")], order, ends)

    def _pack(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of the epoch that begins with number ``start``, the longest first, and the pack of each."""
        count = len(self._mixture)
        while True:
            samples = self._mixture.samples(start, count, self.shuffle)
            samples = samples[np.argsort(-self._lengths[samples], kind="stable")]
            pack_of = best_fit_decreasing(self._lengths[samples], self.capacity)
            excess = int(pack_of.max()) + 1 - self._num_packs
            if excess <= 0:
                return samples, pack_of
            count -= max(1, excess * count // (self._num_packs + excess))
