"""Preference data: data sets and batches that keep the two token sequences of a sample together.

A sample has two token sequences: the chosen and the rejected answer to its prompt, or a labelled answer and another one
to the same prompt (see :mod:`shadowlit.data.preference_formats`). They share a batch and, where rows are packed, a row,
and they are neighbours in everything that holds sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shadowlit.data.collate import Collate, PackCollate
from shadowlit.data.dataset import SequencePairs, TokenDataset
from shadowlit.data.packing import Pack, Packing
from shadowlit.data.sampler import FILLER, FILLER_ROW, Filler


class PreferenceDataset(SequencePairs):
    """Preference samples, made of a data set of sequences; an item is a list of samples.

    ``data[3]`` is a list of one sample, ``data[(3, 1)]`` a pack of two, ``data[FILLER]`` the filler. A sample is
    ``{"answers": [two samples of TokenDataset], "sample": its index, "desirable": bool}``; the filler's index is -1.

    Args:
        sequences: Data set that has the two sequences of sample ``i`` at ``2 i`` and ``2 i + 1``.
    """

    def __init__(self, sequences: TokenDataset) -> None:
        super().__init__(sequences)
        self._desirable = sequences.desirable[::2]

    def __getitem__(self, index: int | Pack | Filler) -> list[dict[str, Any]]:
        """The samples of a pack, or a single sample in a list."""
        return [self._sample(sample) for sample in (index if isinstance(index, tuple) else (index,))]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, both of its sequences, ``[len(self)]`` int64."""
        return self.sequences.lengths.reshape(-1, 2).sum(1)

    def hashes(self) -> np.ndarray:
        """Return the hashes of the samples' tokens and labels, ``[len(self)]`` uint64."""
        first, second = self.sequences.hashes().reshape(-1, 2).T
        return first * np.uint64(0x9E3779B97F4A7C15) + second * np.uint64(3) + self._desirable.astype(np.uint64)

    def _sample(self, index: int | Filler) -> dict[str, Any]:
        if index is FILLER:
            return {"answers": [self.sequences[FILLER]] * 2, "sample": FILLER_ROW, "desirable": False}
        number = range(len(self))[index]
        answers = [self.sequences[2 * number], self.sequences[2 * number + 1]]
        return {"answers": answers, "sample": number, "desirable": bool(self._desirable[number])}


@dataclass(frozen=True)
class PreferenceCollate:
    """Builds a batch of the sequences of preference samples, with the sample of each; see :class:`Collate`.

    Attributes:
        packing: None for a row per sequence, padding_free for one row, best_fit for a row per item.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    packing: Packing | None = None

    def __call__(self, items: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """Return the batch of :class:`Collate` or :class:`PackCollate`, with four more tensors.

        ``sequence`` ``[B, T]``: the number of the sequence that a token belongs to, -1 for none; sample ``i`` has
        ``2 i`` and ``2 i + 1``. ``sample`` ``[N]``: the index of each sample in the data set, -1 for a filler.
        ``desirable`` ``[N]`` bool. ``valid`` ``[V]``: positions of the samples that aren't fillers.
        """
        samples = [sample for item in items for sample in item]
        lines = [[answer] for sample in samples for answer in sample["answers"]]
        batch: dict[str, Tensor]
        if self.packing is None:
            batch = Collate(self.pad_token_id, self.pad_to_multiple_of)([line[0] for line in lines])
        else:
            if self.packing == "padding_free":
                lines = [[answer for line in lines for answer in line]]
            else:
                lines = [[answer for sample in item for answer in sample["answers"]] for item in items]
            batch = PackCollate(self.pad_token_id, self.pad_to_multiple_of)(lines)
        sequence = np.full(batch["input_ids"].shape, -1, np.int64)
        number = 0
        for numbers, line in zip(sequence, lines, strict=True):
            begin = 0
            for answer in line:
                end = begin + len(answer["input_ids"])
                numbers[begin:end] = number
                begin, number = end, number + 1
        index = torch.tensor([sample["sample"] for sample in samples])
        return {
            **batch,
            "sequence": torch.from_numpy(sequence),
            "sample": index,
            "desirable": torch.tensor([sample["desirable"] for sample in samples]),
            "valid": (index != FILLER_ROW).nonzero().flatten(),
        }
