"""Which rate an arm is reported at: chosen on one half of the rows, reported on the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from shadowlit.studies.comparison.records import TUNED, Record

T = TypeVar("T")
_EQUAL = 1e-9  # scores are sums of fractions; their order of addition must not break a tie


def split(samples: Mapping[int, T]) -> tuple[dict[int, T], dict[int, T]]:
    """The two halves of an evaluator's rows: for the selection, and to be reported.

    Rows at even positions, in the order of their index, are for the selection. The halves depend on the rows alone, so
    that all arms, rates and seeds share them.
    """
    rows = sorted(samples)
    return {row: samples[row] for row in rows[::2]}, {row: samples[row] for row in rows[1::2]}


def halves_of(records: Iterable[Record], evaluator: str) -> tuple[list[int], list[int]]:
    """Indices of an evaluator's rows for the selection and to be reported: of all rows that any record has."""
    union = {row: None for record in records for row in record.samples.get(evaluator, {})}
    selection, reported = split(union)
    return list(selection), list(reported)


def scores_of(record: Record, evaluator: str, rows: Sequence[int]) -> np.ndarray | None:
    """``[N]`` scores of the rows; None if one of them is missing or not finite, or if there are none."""
    found = np.array([record.samples.get(evaluator, {}).get(row, math.nan) for row in rows], dtype=np.float64)
    return found if len(found) and np.isfinite(found).all() else None


def mean_score(record: Record, halves: Mapping[str, Sequence[int]]) -> float:
    """The unweighted mean over evaluators of the mean over their rows; NaN if any row lacks a score.

    Args:
        record: Whose scores.
        halves: Rows by evaluator.
    """
    scores = [scores_of(record, evaluator, rows) for evaluator, rows in halves.items()]
    return float(np.mean([math.nan if found is None else found.mean() for found in scores])) if scores else math.nan


def seeds_of(records: Iterable[Record]) -> list[int]:
    """All seeds that any tuned arm was trained with: the ones every arm is expected to have."""
    return sorted({record.seed for record in records if record.arm in TUNED and record.seed is not None})


@dataclass(frozen=True)
class Candidate:
    """An arm at one rate and scale.

    Attributes:
        lr: Learning rate.
        scale: λ.
        score: Mean over seeds of the mean score on the selection half, 0 to 1; NaN if no seed has one.
        num_seeds: Seeds that have a score.
    """

    lr: float
    scale: float
    score: float
    num_seeds: int


@dataclass(frozen=True)
class Choice:
    """What was chosen for an arm.

    Attributes:
        arm: The arm.
        best: Of the candidates.
        candidates: By ascending rate and scale.
        edge: ``smallest`` or ``largest`` if the rate is that of several tried, and none in between is as good.
    """

    arm: str
    best: Candidate
    candidates: tuple[Candidate, ...]
    edge: Literal["smallest", "largest"] | None

    @property
    def note(self) -> str:
        """What is to be said of the range of rates; empty if nothing."""
        rates = {candidate.lr for candidate in self.candidates}
        if len(rates) == 1:
            return f"{self.arm} was tried at one rate only: it may be far from its best."
        if self.edge is None:
            return ""
        may = "undertuned" if self.edge == "largest" else "better at smaller ones"
        return f"{self.arm}: the best rate is the {self.edge} tried: the arm may be {may}."


def choose_rate(records: Sequence[Record], arm: str, evaluators: Sequence[str]) -> Choice | None:
    """The learning rate of an arm at scale 1 with the best mean score on the selection half.

    A mean over fewer seeds never beats one over more: only the rates with the most scored seeds are candidates for the
    best. Of equal ones, the lowest is taken.

    Args:
        records: Of all arms.
        arm: To choose for.
        evaluators: Whose scores are averaged, without weights.

    Returns:
        None if no training of the arm has a score.
    """
    return _choose([record for record in records if record.scale in (None, 1.0)], arm, evaluators, records)


def choose_rate_and_scale(records: Sequence[Record], arm: str, evaluators: Sequence[str]) -> Choice | None:
    """As :func:`choose_rate`, of all scales; of equal ones, the lowest rate and the scale nearest to 1."""
    return _choose(records, arm, evaluators, records)


def _choose(
    records: Sequence[Record], arm: str, evaluators: Sequence[str], all_records: Sequence[Record]
) -> Choice | None:
    halves = {evaluator: halves_of(all_records, evaluator)[0] for evaluator in evaluators}
    scores: dict[tuple[float, float], list[float]] = {}
    for record in records:
        if record.arm == arm and record.lr is not None and record.scale is not None:
            scores.setdefault((record.lr, record.scale), []).append(mean_score(record, halves))
    candidates = []
    for (lr, scale), found in sorted(scores.items()):
        finite = [score for score in found if math.isfinite(score)]
        candidates.append(Candidate(lr, scale, float(np.mean(finite)) if finite else math.nan, len(finite)))
    most = max((candidate.num_seeds for candidate in candidates), default=0)
    if not most:
        return None
    eligible = [candidate for candidate in candidates if candidate.num_seeds == most]
    top = max(candidate.score for candidate in eligible)
    equal = [candidate for candidate in eligible if candidate.score > top - _EQUAL]
    best = min(equal, key=lambda candidate: (candidate.lr, abs(candidate.scale - 1)))
    rates = sorted({candidate.lr for candidate in candidates})
    edge: Literal["smallest", "largest"] | None = None
    if len(rates) > 1 and all(candidate.lr in (rates[0], rates[-1]) for candidate in equal):
        edge = {rates[0]: "smallest", rates[-1]: "largest"}.get(best.lr)  # type: ignore[assignment]
    return Choice(arm, best, tuple(candidates), edge)
