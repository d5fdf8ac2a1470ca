"""Packing: which samples share a row, and the row that they form."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from shadowlit.data.conversation import IGNORE_INDEX

Packing = Literal["padding_free", "best_fit"]
Pack = tuple[int, ...]


class PackedOrder:
    """The packs of every epoch, each a tuple of samples; a function of the lengths, the seed and the epoch.

    Every epoch has equally many packs, and packs of the same sizes. The assignment of the samples of one length to
    their slots and the order of the packs are drawn for each epoch.

    Args:
        lengths: Tokens of each sample, ``[N]`` int, none longer than ``capacity``.
        capacity: Tokens that a pack has room for.
        seed: Seed for the order, together with the epoch.
        shuffle: Draw a new order for each epoch. Otherwise samples of one length stay in the order of the data set,
            and packs in the order in which they were begun.
    """

    def __init__(self, lengths: np.ndarray, capacity: int, seed: int = 0, shuffle: bool = True) -> None:
        self.capacity, self.seed, self.shuffle = capacity, seed, shuffle
        self._lengths = lengths
        pack_of = best_fit_decreasing(np.sort(lengths)[::-1], capacity)
        self._ranks = np.argsort(pack_of, kind="stable")  # pack after pack, the ranks of samples in the order by length
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(pack_of))])

    def __len__(self) -> int:
        """Number of packs in an epoch."""
        return len(self._ends) - 1

    def __call__(self, epoch: int) -> Packs:
        """The packs of ``epoch`` in their order; each is made when it is accessed."""
        if not self.shuffle:
            return Packs(np.argsort(-self._lengths, kind="stable")[self._ranks], np.arange(len(self)), self._ends)
        random = np.random.default_rng((self.seed, epoch))
        drawn = random.permutation(len(self._lengths))
        by_length = drawn[np.argsort(-self._lengths[drawn], kind="stable")]
        return Packs(by_length[self._ranks], random.permutation(len(self)), self._ends)

    def sizes(self, epoch: int) -> np.ndarray:
        """Return the tokens of each pack of ``epoch``, ``[len(self)]`` int64."""
        return self(epoch).sizes(self._lengths)


class Packs(Sequence[Pack]):
    """The samples of each pack, sliced from one flat array; creating a million tuples in advance would be slow.

    Args:
        samples: Samples, pack after pack, ``[N]`` int.
        packs: Order of the packs, ``[P]`` int.
        ends: End of each pack among the samples, after a 0, ``[P + 1]`` int.
    """

    def __init__(self, samples: np.ndarray, packs: np.ndarray, ends: np.ndarray) -> None:
        self._samples, self._packs, self._ends = samples, packs, ends

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        """Return the tokens of each pack, ``[P]`` int64, by the ``lengths`` of all samples."""
        return np.add.reduceat(lengths[self._samples], self._ends[:-1])[self._packs]

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._pack(pack) for pack in self._packs[index]]
        return self._pack(self._packs[index])

    def _pack(self, pack: int) -> Pack:
        return tuple(self._samples[self._ends[pack] : self._ends[pack + 1]].tolist())


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Put every sample, the longest first, into the fullest pack that still has room for it.

    It needs at most 11/9 of the smallest possible number of packs, plus four (Johnson 1973); conversations, most of
    which are short, fill all packs but the last ones. Samples of one length are placed together into all packs with
    the same room left, so the work depends on the number of distinct lengths rather than of samples.

    Args:
        lengths: Length of each sample in descending order, ``[N]`` int, each between 1 and ``capacity``.
        capacity: Tokens that a pack has room for.

    Returns:
        ``[N]`` int64: the pack of each sample, numbered from 0 without gaps.
    """
    pack_of = np.empty(len(lengths), np.int64)
    open_packs: dict[int, list[int]] = {}  # by the room that is left in them
    rooms: list[int] = []  # its keys in ascending order

    def add(packs: Sequence[int], room: int) -> None:
        if not room or not packs:
            return
        if room not in open_packs:
            open_packs[room] = []
            insort(rooms, room)
        open_packs[room].extend(packs)

    num_packs = start = 0
    distinct, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = start + count
        while start < end:
            place = bisect_left(rooms, length)
            if place == len(rooms):
                num_new = -(-(end - start) // (capacity // length))
                add(range(num_packs, num_packs + num_new), capacity)
                num_packs += num_new
            room = rooms[place]
            packs = open_packs[room]
            # A pack that has taken a sample is the fullest for the next one too, as long as that fits.
            each = room // length
            whole = min((end - start) // each, len(packs))
            full, packs[:whole] = packs[:whole], []
            pack_of[start : start + whole * each] = np.repeat(full, each)
            start += whole * each
            if packs and start < end:
                last = packs.pop(0)
                pack_of[start:end] = last
                add([last], room - (end - start) * length)
                start = end
            add(full, room - each * length)
            if not packs:
                del open_packs[room]
                rooms.remove(room)
    return pack_of


def pack_samples(samples: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Concatenate samples into a row of ``input_ids``, ``labels`` and ``position_ids``, which restart at each sample.

    The restarts separate the samples in attention. The first token of a sample is unsupervised, since it would be
    predicted from another sample. ``loss_weights`` are those of the samples, if any has some. Two samples of three and
    two tokens::

        input_ids        7    8    9    5    6
        labels         -100   8    9  -100   6
        position_ids     0    1    2    0    1
    """
    row: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
    for sample in samples:
        begin = len(row["labels"])
        row["input_ids"] += sample["input_ids"]
        row["labels"] += sample["labels"]
        row["labels"][begin] = IGNORE_INDEX
        row["position_ids"] += range(len(sample["input_ids"]))
    if any("loss_weights" in sample for sample in samples):
        row["loss_weights"] = [weight for sample in samples for weight in loss_weights(sample)]
    return row


def loss_weights(sample: dict[str, list[Any]]) -> list[float]:
    """Return the factors of a sample's losses; those of unsupervised tokens have no effect."""
    return sample.get("loss_weights") or [1.0] * len(sample["input_ids"])
