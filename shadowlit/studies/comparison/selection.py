"""Which rate an arm is reported at: chosen on some rows, reported on others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from shadowlit.studies.arms import TUNED, UNTOUCHED
from shadowlit.studies.comparison.scoring import SHARE, Measure, Scoring
from shadowlit.studies.rows import Row, Standing, by_place, metric_names, standing_of

HALVES: tuple[Literal["selection"], Literal["reported"]] = ("selection", "reported")
_EQUAL = 1e-9  # scores are sums of fractions; their order of addition must not break a tie


def halves_of(rows: Iterable[Row], evaluator: str) -> tuple[list[int], list[int]]:
    """Return the indices of an evaluator's samples for the selection, and to be reported.

    The samples of all rows are put in an arbitrary order, by a hash of their index, and every other one is for the
    selection: files often alternate between kinds of questions, and each half should have all kinds. The halves depend
    on the indices alone, so that all arms, rates and seeds share them.
    """
    found = {index for row in rows for index in row.samples.get(evaluator, {})}
    order = sorted(found, key=lambda index: hashlib.sha256(str(index).encode()).digest())
    return sorted(order[::2]), sorted(order[1::2])


def seeds_of(rows: Iterable[Row]) -> list[int]:
    """Return all seeds that any tuned arm was trained with: the ones that every arm is expected to have."""
    return sorted({row.seed for row in rows if row.arm in TUNED and row.seed is not None})


def scored(rows: Sequence[Row], scoring: Scoring) -> list[Row]:
    """Return the rows with their scores among their metrics: those that are reported, and those that choose.

    These are ``selection/<name>/score`` and the unweighted means over scores ``selection/mean``, ``selection/gain`` and
    ``selection/keep``, likewise ``reported/…``; NaN where a score is missing. ``selection/mean`` is the mean of
    ``scoring.choose`` where that is given.
    """
    groups = scoring.groups
    result = []
    for row in rows:
        scores = {
            f"{half}/{what}": float(np.mean([scoring.value(row, name, half) for name in names]))
            for half in (HALVES[1:] if scoring.choose else HALVES)
            for what, names in groups.items()
        }
        if scoring.choose:
            scores["selection/mean"] = float(np.mean([row.metrics.get(name, math.nan) for name in scoring.choose]))
        result.append(replace(row, metrics={**row.metrics, **scores}))
    return result


def standings(rows: Sequence[Row], num_seeds: int | None = None) -> list[Standing]:
    """Return the standing of every arm at every rate and scale; all of them are expected to have ``num_seeds`` seeds,
    by default as many as any tuned arm has.
    """
    names, expected = metric_names(rows), len(seeds_of(rows)) if num_seeds is None else num_seeds
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


def choose_rate(grid: Sequence[Standing], arm: str, measure: Measure = SHARE) -> Choice | None:
    """As :func:`choose_rate_and_scale`, at scale 1."""
    return choose_rate_and_scale([standing for standing in grid if standing.is_whole], arm, measure)


def choose_rate_and_scale(grid: Sequence[Standing], arm: str, measure: Measure = SHARE) -> Choice | None:
    """Choose the rate and scale of an arm with the best ``selection/mean``; None if there is no score.

    ``measure`` says whether the highest or the lowest is best.

    A mean over fewer seeds never beats one over more: only those with the most scored seeds are candidates for the
    best. Of equal ones, the lowest rate and the scale nearest to 1 are taken.
    """
    found = sorted((s for s in grid if s.arm == arm and s.lr is not None), key=lambda s: (s.lr, s.scale or 1.0))
    scores = [standing["selection/mean"] for standing in found]
    most = max((score.count for score in scores), default=0)
    if not most:
        return None
    sign = measure.sign
    top = max(sign * score.mean for score in scores if score.count == most)
    able = [(s, sign * score.mean) for s, score in zip(found, scores, strict=True) if score.count == most]
    equal = [standing for standing, mean in able if mean > top - _EQUAL]
    best = min(equal, key=lambda s: (s.lr, abs((1.0 if s.scale is None else s.scale) - 1)))
    rates = sorted({standing.lr for standing in found if standing.lr is not None})
    edge: Literal["smallest", "largest"] | None = None
    if len(rates) > 1 and all(standing.lr in (rates[0], rates[-1]) for standing in equal):
        edge = "smallest" if best.lr == rates[0] else "largest"
    return Choice(arm, best, tuple(found), edge)
