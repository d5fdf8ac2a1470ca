"""Which rate an arm is reported at: chosen on one half of the rows, reported on the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from shadowlit.studies.arms import TUNED
from shadowlit.studies.rows import Row

T = TypeVar("T")
_EQUAL = 1e-9  # scores are sums of fractions; their order of addition must not break a tie


def split(samples: Mapping[int, T]) -> tuple[dict[int, T], dict[int, T]]:
    """The two halves of an evaluator's samples: for the selection, and to be reported.

    Samples at even positions, in the order of their index, are for the selection. The halves depend on the indices
    alone, so that all arms, rates and seeds share them.
    """
    order = sorted(samples)
    return {index: samples[index] for index in order[::2]}, {index: samples[index] for index in order[1::2]}


def halves_of(rows: Iterable[Row], evaluator: str) -> tuple[list[int], list[int]]:
    """Indices of an evaluator's samples for the selection and to be reported, of all that any row has."""
    union = {index: None for row in rows for index in row.samples.get(evaluator, {})}
    selection, reported = split(union)
    return list(selection), list(reported)


def scores_of(row: Row, evaluator: str, indices: Sequence[int]) -> np.ndarray | None:
    """``[N]`` scores of the samples; None if one of them is missing or not finite, or if there are none."""
    found = np.array([row.samples.get(evaluator, {}).get(index, math.nan) for index in indices], dtype=np.float64)
    return found if len(found) and np.isfinite(found).all() else None


def mean_score(row: Row, indices: Mapping[str, Sequence[int]]) -> float:
    """The unweighted mean over evaluators of the mean over their samples; NaN if any sample lacks a score.

    Args:
        row: Row with the scores.
        indices: Samples by evaluator.
    """
    scores = [scores_of(row, evaluator, of_evaluator) for evaluator, of_evaluator in indices.items()]
    return float(np.mean([math.nan if found is None else found.mean() for found in scores])) if scores else math.nan


def seeds_of(rows: Iterable[Row]) -> list[int]:
    """All seeds that any tuned arm was trained with: the ones that every arm is expected to have."""
    return sorted({row.seed for row in rows if row.arm in TUNED and row.seed is not None})


@dataclass(frozen=True)
class Candidate:
    """An arm at one rate and scale.

    Attributes:
        lr: Learning rate.
        scale: λ; 1 for a tuned model.
        score: Mean over seeds of the mean score on the selection half, 0 to 1; NaN if no seed has one.
        num_seeds: Number of seeds that have a score.
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
        best: Best of the candidates.
        candidates: All candidates, by ascending rate and scale.
        edge: ``smallest`` or ``largest`` if the rate is that of several tried, and none in between is as good.
    """

    arm: str
    best: Candidate
    candidates: tuple[Candidate, ...]
    edge: Literal["smallest", "largest"] | None

    @property
    def note(self) -> str:
        """A remark on the range of rates; empty if there is none to make."""
        rates = {candidate.lr for candidate in self.candidates}
        if len(rates) == 1:
            return f"{self.arm} was tried at one rate only: it may be far from its best."
        if self.edge is None:
            return ""
        may = "undertuned" if self.edge == "largest" else "better at smaller ones"
        return f"{self.arm}: the best rate is the {self.edge} tried: the arm may be {may}."


def choose_rate(rows: Sequence[Row], arm: str, evaluators: Sequence[str]) -> Choice | None:
    """Choose the learning rate of an arm at scale 1 with the best mean score on the selection half.

    A mean over fewer seeds never beats one over more: only the rates with the most scored seeds are candidates for the
    best. Of equal ones, the lowest is taken.

    Args:
        rows: Rows of all arms.
        arm: Arm to choose for.
        evaluators: Evaluators whose scores are averaged, without weights.

    Returns:
        None if no training of the arm has a score.
    """
    return _choose([row for row in rows if row.is_whole], arm, evaluators, rows)


def choose_rate_and_scale(rows: Sequence[Row], arm: str, evaluators: Sequence[str]) -> Choice | None:
    """As :func:`choose_rate`, of all scales; of equal ones, the lowest rate and the scale nearest to 1."""
    return _choose(rows, arm, evaluators, rows)


def _choose(rows: Sequence[Row], arm: str, evaluators: Sequence[str], all_rows: Sequence[Row]) -> Choice | None:
    halves = {evaluator: halves_of(all_rows, evaluator)[0] for evaluator in evaluators}
    scores: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        if row.arm == arm and row.lr is not None:
            scores.setdefault((row.lr, 1.0 if row.scale is None else row.scale), []).append(mean_score(row, halves))
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
