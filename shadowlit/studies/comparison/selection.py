"""Which rate an arm is reported at: chosen on one half of the rows, reported on the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from shadowlit.studies.arms import TUNED, UNTOUCHED
from shadowlit.studies.rows import Row, Standing, by_place, metric_names, standing_of

_EQUAL = 1e-9  # scores are sums of fractions; their order of addition must not break a tie


def halves_of(rows: Iterable[Row], evaluator: str) -> tuple[list[int], list[int]]:
    """Indices of an evaluator's samples for the selection, and to be reported.

    Samples at even positions, in the order of their index among all that any row has, are for the selection. The
    halves depend on the indices alone, so that all arms, rates and seeds share them.
    """
    order = sorted({index for row in rows for index in row.samples.get(evaluator, {})})
    return order[::2], order[1::2]


def groups_of(gain: Sequence[str], keep: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The evaluators that each kind of score is a mean of: ``<evaluator>/score``, ``mean``, ``gain`` and ``keep``."""
    groups = {f"{name}/score": (name,) for name in (*gain, *keep)}
    means = {"mean": (*gain, *keep), "gain": tuple(gain), "keep": tuple(keep)}
    return groups | {what: names for what, names in means.items() if names}


def scores_of(row: Row, evaluator: str, indices: Sequence[int]) -> np.ndarray | None:
    """``[N]`` scores of the samples; None if one of them is missing or not finite, or if there are none."""
    found = np.array([row.samples.get(evaluator, {}).get(index, math.nan) for index in indices], dtype=np.float64)
    return found if len(found) and np.isfinite(found).all() else None


def mean_score(row: Row, indices: Mapping[str, Sequence[int]]) -> float:
    """The unweighted mean over evaluators of the mean over these samples; NaN if any sample lacks a score."""
    scores = [scores_of(row, evaluator, of_evaluator) for evaluator, of_evaluator in indices.items()]
    return float(np.mean([math.nan if found is None else found.mean() for found in scores])) if scores else math.nan


def seeds_of(rows: Iterable[Row]) -> list[int]:
    """All seeds that any tuned arm was trained with: the ones that every arm is expected to have."""
    return sorted({row.seed for row in rows if row.arm in TUNED and row.seed is not None})


def scored(rows: Sequence[Row], gain: Sequence[str], keep: Sequence[str] = ()) -> list[Row]:
    """The rows with the scores of their samples among their metrics, on both halves.

    These are ``selection/<evaluator>/score`` and the unweighted means over evaluators ``selection/mean``,
    ``selection/gain`` and ``selection/keep``, likewise ``reported/…``; NaN where a sample lacks its score.
    """
    halves, groups = {name: halves_of(rows, name) for name in (*gain, *keep)}, groups_of(gain, keep)
    result = []
    for row in rows:
        scores = {
            f"{half}/{what}": mean_score(row, {name: halves[name][number] for name in of_group})
            for number, half in enumerate(("selection", "reported"))
            for what, of_group in groups.items()
        }
        result.append(replace(row, metrics={**row.metrics, **scores}))
    return result


def standings(rows: Sequence[Row]) -> list[Standing]:
    """The standing of every arm at every rate and scale; all of them are expected to have all seeds."""
    names, expected = metric_names(rows), len(seeds_of(rows))
    groups = [(found[0].arm, found) for found in by_place(rows)]
    return [standing_of(arm, found, names, 1 if arm in UNTOUCHED else expected) for arm, found in groups]


@dataclass(frozen=True)
class Choice:
    """The best of an arm's candidates by ``selection/mean``; they are in ascending order of rate and scale.

    ``edge`` is ``smallest`` or ``largest`` if the rate is that of several tried, and none in between is as good.
    """

    arm: str
    best: Standing
    candidates: tuple[Standing, ...]
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


def choose_rate(grid: Sequence[Standing], arm: str) -> Choice | None:
    """As :func:`choose_rate_and_scale`, at scale 1."""
    return choose_rate_and_scale([standing for standing in grid if standing.is_whole], arm)


def choose_rate_and_scale(grid: Sequence[Standing], arm: str) -> Choice | None:
    """Choose the rate and scale of an arm with the best mean score on the selection half; None if there is no score.

    A mean over fewer seeds never beats one over more: only those with the most scored seeds are candidates for the
    best. Of equal ones, the lowest rate and the scale nearest to 1 are taken.
    """
    found = sorted((s for s in grid if s.arm == arm and s.lr is not None), key=lambda s: (s.lr, s.scale or 1.0))
    scores = [standing["selection/mean"] for standing in found]
    most = max((score.count for score in scores), default=0)
    if not most:
        return None
    top = max(score.mean for score in scores if score.count == most)
    equal = [s for s, score in zip(found, scores, strict=True) if score.count == most and score.mean > top - _EQUAL]
    best = min(equal, key=lambda s: (s.lr, abs((1.0 if s.scale is None else s.scale) - 1)))
    rates = sorted({standing.lr for standing in found if standing.lr is not None})
    edge: Literal["smallest", "largest"] | None = None
    if len(rates) > 1 and all(standing.lr in (rates[0], rates[-1]) for standing in equal):
        edge = "smallest" if best.lr == rates[0] else "largest"
    return Choice(arm, best, tuple(found), edge)
