"""Data sets and batches with the student's and the teacher's view of samples; see :mod:`shadowlit.data.contexts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from shadowlit.data.collate import Collate, PackCollate, Sample
from shadowlit.data.dataset import SequencePairs
from shadowlit.data.packing import Pack
from shadowlit.data.sampler import FILLER, Filler

_PREFIX = "teacher_"  # of the teacher's tensors in a batch


def teachers_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of the teacher's view of a batch; empty where it has none."""
    return {name.removeprefix(_PREFIX): value for name, value in batch.items() if name.startswith(_PREFIX)}


def with_teachers(batch: Mapping[str, Any], teachers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with the tensors of its teacher's view."""
    return {**batch, **{_PREFIX + name: value for name, value in teachers.items()}}


class ContextDataset(SequencePairs):
    """Samples of TokenDataset, those that the student sees, each with the teacher's view of it as ``teacher``.

    Args:
        sequences: Data set with the student's and the teacher's sequence of sample ``i`` at ``2 i`` and ``2 i + 1``.
    """

    def __getitem__(self, index: int | Pack | Filler) -> Any:
        """A sample, the samples of a pack, or the filler."""
        if isinstance(index, tuple):
            return [self[sample] for sample in index]
        if index is FILLER:
            return {**self.sequences[FILLER], "teacher": self.sequences[FILLER]}
        number = range(len(self))[index]
        return {**self.sequences[2 * number], "teacher": self.sequences[2 * number + 1]}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer view of each sample, ``[len(self)]`` int64, so that either fits where these fit."""
        return self.longest

    def hashes(self) -> np.ndarray:
        """Return the hashes of both views of each sample, ``[len(self)]`` uint64."""
        student, teacher = self.sequences.hashes().reshape(-1, 2).T
        return student * np.uint64(0x9E3779B97F4A7C15) + teacher


@dataclass(frozen=True)
class ContextCollate:
    """Builds a batch of the student's sequences, with the tensors of the teacher's under ``teacher_<name>``."""

    collate: Collate | PackCollate

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Return the two batches in one; ``items`` are samples, or packs of them."""
        return with_teachers(self.collate(items), self.collate([_teacher(item) for item in items]))


def _teacher(item: Sample | list[Sample]) -> Any:
    return [sample["teacher"] for sample in item] if isinstance(item, list) else item["teacher"]
