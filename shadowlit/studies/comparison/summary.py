"""From records to the numbers of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shadowlit.errors import DataError
from shadowlit.studies.comparison.records import ARMS, TUNED, UNTOUCHED, Record
from shadowlit.studies.comparison.selection import (
    Choice,
    choose_rate,
    choose_rate_and_scale,
    halves_of,
    mean_score,
    scores_of,
    seeds_of,
)
from shadowlit.studies.statistics import Average, Correlation, Interval, average, few_seeds, paired_bootstrap, spearman

COMPARED = (("B2I", "I2I"), ("B2I", "Instruct"), ("I2I", "Instruct"))
"""Which arms are compared: the first minus the second."""
FACTS = {
    "sigma": "σ of the pair",
    "cos_deltas": "cos(Δ_B, Δ_I)",
    "delta_over_offset": "‖Δ‖ / ‖offset‖",
    "survival": "survival in the exported dtype",
}
"""What might predict whether a graft pays, with the words for it."""
Halves = Mapping[str, tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Description:
    """What a report is about.

    Attributes:
        title: Its heading.
        config: The configuration that was trained.
        command: What makes it again.
    """

    title: str
    config: str = ""
    command: str = ""


@dataclass(frozen=True)
class Standing:
    """An arm at one rate and scale, over its seeds.

    Attributes:
        arm: One of ``ARMS``.
        lr: Learning rate; None for the untouched models, and where no training has finished.
        scale: λ; None likewise.
        scores: Of the reported half, by evaluator, 0 to 1.
        mean: Unweighted over all evaluators.
        gain: Unweighted over those of what is learned.
        keep: Unweighted over those of what is kept; NaN if there are none.
        selection: As ``mean``, on the selection half.
        metrics: Divergences and losses, over all of their rows (nats per token).
    """

    arm: str
    lr: float | None
    scale: float | None
    scores: dict[str, Average]
    mean: Average
    gain: Average
    keep: Average
    selection: Average
    metrics: dict[str, Average]


@dataclass(frozen=True)
class Comparison:
    """Two arms, each at its chosen rate, row by row and seed by seed on the reported half.

    Attributes:
        a: An arm.
        b: The arm that is subtracted.
        evaluators: Interval of each evaluator, in units of its score; empty if the two can't be compared.
        all: Of the mean over all evaluators.
        gain: Of the mean over those of what is learned.
        keep: Of the mean over those of what is kept; None if there are none.
        num_expected: Seeds that there should be.
        reason: Why the two can't be compared; else empty.
    """

    a: str
    b: str
    evaluators: dict[str, Interval]
    all: Interval | None
    gain: Interval | None
    keep: Interval | None
    num_expected: int
    reason: str = ""


@dataclass(frozen=True)
class Prediction:
    """What was known of one graft (B2I at scale 1), and what it brought.

    Attributes:
        lr: Learning rate.
        seed: Seed.
        facts: Those of ``FACTS`` that were measured.
        gain: Mean score over all evaluators minus that of the untouched Instruct, on the reported half.
    """

    lr: float
    seed: int
    facts: dict[str, float]
    gain: float


@dataclass(frozen=True)
class Line:
    """Validation losses on the line from an arm's target to the graft, at one rate.

    Attributes:
        arm: The arm.
        lr: Learning rate.
        losses: By scale, over seeds.
        barrier: See :func:`barrier`; over seeds.
    """

    arm: str
    lr: float
    losses: dict[float, Average]
    barrier: Average


@dataclass(frozen=True)
class Value:
    """One measured number, as in the CSV; ``value`` is NaN where it is missing."""

    arm: str
    lr: float | None
    seed: int | None
    scale: float | None
    metric: str
    half: str
    value: float


@dataclass(frozen=True)
class Report:
    """All numbers of a comparison.

    Attributes:
        description: What it is about.
        gain: Evaluators of what is learned.
        keep: Evaluators of what is kept.
        num_rows: Rows of each evaluator for the selection, and reported.
        seeds: All seeds that any arm has.
        table: Every arm at its chosen rate and scale 1.
        grid: Every arm at every rate and scale; the untouched models first.
        choices: By arm, of the rate at scale 1; arms without a finished training are missing.
        best_scales: By arm with several scales, of rate and scale together.
        comparisons: Of ``COMPARED``.
        predictions: One for each graft.
        correlations: By fact, with the gain.
        lines: By arm and rate.
        costs: By arm and name, over all its trainings.
        notes: What is to be kept in mind.
        missing: What should be there and is not.
        values: Everything, for the CSV.
    """

    description: Description
    gain: tuple[str, ...]
    keep: tuple[str, ...]
    num_rows: dict[str, tuple[int, int]]
    seeds: tuple[int, ...]
    table: tuple[Standing, ...]
    grid: tuple[Standing, ...]
    choices: dict[str, Choice]
    best_scales: dict[str, Standing]
    comparisons: tuple[Comparison, ...]
    predictions: tuple[Prediction, ...]
    correlations: dict[str, Correlation]
    lines: tuple[Line, ...]
    costs: dict[str, dict[str, Average]]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    values: tuple[Value, ...]

    @property
    def evaluators(self) -> tuple[str, ...]:
        """All evaluators."""
        return self.gain + self.keep


def summarise(
    records: Sequence[Record], description: Description, *, gain: Sequence[str], keep: Sequence[str]
) -> Report:
    """Compare the arms.

    Evaluators without scores of rows, or with scores outside of 0 to 1, are in no mean; it is noted, and their metrics
    are shown.

    Args:
        records: Of finished trainings and the untouched models, in any order.
        description: What the report is about.
        gain: Evaluators of what is to be learned.
        keep: Evaluators of what is to be kept.

    Raises:
        DataError: Two records are of the same arm, rate, seed and scale; an evaluator is named twice; no evaluator has
            scores.
    """
    _require_distinct(records, [*gain, *keep])
    unscored = {name: why for name in (*gain, *keep) if (why := _why_unscored(records, name))}
    gain, keep = (tuple(name for name in names if name not in unscored) for names in (gain, keep))
    if not gain + keep:
        told = "; ".join(f"{name}: {why}" for name, why in unscored.items())
        raise DataError(
            f"no evaluator can compare the arms ({told or 'none is named'}). Name one that scores its rows."
        )
    halves = {name: halves_of(records, name) for name in gain + keep}
    seeds = seeds_of(records)
    standings = _Standings(halves, gain, keep, len(seeds), _shown_metrics(records))
    choices = {arm: choice for arm in TUNED if (choice := choose_rate(records, arm, gain + keep))}
    chosen = {arm: _of_arm(records, arm, choices) for arm in ARMS}
    predictions = _predictions(records, halves)
    missing = tuple(_missing(records, halves, seeds))
    return Report(
        description,
        gain,
        keep,
        {name: (len(selection), len(reported)) for name, (selection, reported) in halves.items()},
        tuple(seeds),
        table=tuple(standings.of(arm, found) for arm, found in chosen.items()),
        grid=tuple(standings.of(arm, found) for arm, found in _groups(records)),
        choices=choices,
        best_scales=dict(_best_scales(records, standings)),
        comparisons=tuple(_compare(a, b, chosen, halves, gain, keep, len(seeds)) for a, b in COMPARED),
        predictions=predictions,
        correlations=correlate(predictions),
        lines=tuple(_lines(records)),
        costs=_costs(records),
        notes=tuple(_notes(choices, seeds, unscored)),
        missing=missing,
        values=tuple(_values(records, halves)),
    )


def correlate(predictions: Sequence[Prediction]) -> dict[str, Correlation]:
    """Rank correlation of every fact with the gain."""
    gains = [each.gain for each in predictions]
    return {fact: spearman([each.facts.get(fact, math.nan) for each in predictions], gains) for fact in FACTS}


def barrier(line: Mapping[float, float]) -> float:
    """How far the loss rises between the target (scale 0) and the graft (scale 1) above the larger end.

    0 means that the line never lies above its ends: they are linearly connected (Frankle et al., arXiv 1912.05671, who
    compare with the mean of the ends; the larger end asks for less, and does not count a slope as a barrier).

    Returns:
        At least 0, in nats per token; NaN if an end is missing, nothing lies between them, or a loss isn't finite.
    """
    between = [loss for scale, loss in line.items() if 0 <= scale <= 1]
    if 0.0 not in line or 1.0 not in line or len(between) < 3 or not all(map(math.isfinite, between)):
        return math.nan
    return max(between) - max(line[0.0], line[1.0])


@dataclass(frozen=True)
class _Standings:
    halves: Halves
    gain: tuple[str, ...]
    keep: tuple[str, ...]
    num_seeds: int
    metrics: tuple[str, ...]

    def of(self, arm: str, records: Sequence[Record]) -> Standing:
        """The standing of records that differ in their seeds alone."""
        expected = 1 if arm in UNTOUCHED else self.num_seeds

        def over(value: Callable[[Record], float]) -> Average:
            return average([value(record) for record in records], expected)

        def mean(evaluators: Sequence[str], half: int = 1) -> Average:
            if not evaluators:
                return average([])
            return over(lambda record: mean_score(record, {name: self.halves[name][half] for name in evaluators}))

        def metric(name: str) -> Average:
            return over(lambda record: record.metrics.get(name, math.nan))

        return Standing(
            arm,
            records[0].lr if records else None,
            records[0].scale if records else None,
            scores={name: mean([name]) for name in self.halves},
            mean=mean(self.gain + self.keep),
            gain=mean(self.gain),
            keep=mean(self.keep),
            selection=mean(self.gain + self.keep, half=0),
            metrics={
                name: average([r.metrics.get(name, math.nan) for r in records], expected) for name in self.metrics
            },
        )


def _require_distinct(records: Sequence[Record], evaluators: Sequence[str]) -> None:
    keys = [(record.arm, record.lr, record.seed, record.scale) for record in records]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise DataError(
            "there are two records of {}, rate {}, seed {}, scale {}. Give one of each.".format(*map(str, twice))
        )
    named = next((name for name in evaluators if evaluators.count(name) > 1), None)
    if named:
        raise DataError(f"the evaluator {named!r} is named twice; it is either to be gained or to be kept.")


def _why_unscored(records: Sequence[Record], evaluator: str) -> str:
    scores = [score for record in records for score in record.samples.get(evaluator, {}).values()]
    if not scores:
        return "it has no scores of rows"
    if any(score < 0 or score > 1 for score in scores):
        return "its scores leave the range from 0 to 1"
    if len(halves_of(records, evaluator)[1]) == 0:
        return "it has a single row, which can't be halved"
    return ""


def _shown_metrics(records: Sequence[Record]) -> tuple[str, ...]:
    """Divergences, then losses; the overall ones first."""
    names = {name for record in records for name in record.metrics}
    divergences = sorted(name for name in names if name.rsplit("/", 1)[-1].startswith("kl"))
    losses = sorted((name for name in names if name.rsplit("/", 1)[-1] == "loss"), key=lambda n: ("/" in n, n))
    return (*divergences, *losses)


def _of_arm(records: Sequence[Record], arm: str, choices: Mapping[str, Choice]) -> list[Record]:
    """An untouched model's record, or those of an arm's chosen rate at scale 1."""
    if arm in UNTOUCHED:
        return [record for record in records if record.arm == arm]
    choice = choices.get(arm)
    return [r for r in records if choice and r.arm == arm and r.lr == choice.best.lr and r.scale == 1.0]


def _groups(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Records that differ in their seeds alone, by arm, rate and scale."""
    for arm in ARMS:
        own = [record for record in records if record.arm == arm]
        for key in sorted({(record.lr or 0.0, record.scale or 0.0) for record in own}):
            yield arm, [record for record in own if (record.lr or 0.0, record.scale or 0.0) == key]


def _best_scales(records: Sequence[Record], standings: _Standings) -> Iterator[tuple[str, Standing]]:
    for arm in TUNED:
        choice = choose_rate_and_scale(records, arm, standings.gain + standings.keep)
        if choice and len({candidate.scale for candidate in choice.candidates if candidate.num_seeds}) > 1:
            best = choice.best
            own = [r for r in records if (r.arm, r.lr, r.scale) == (arm, best.lr, best.scale)]
            yield arm, standings.of(arm, own)


def _compare(
    a: str,
    b: str,
    chosen: Mapping[str, Sequence[Record]],
    halves: Halves,
    gain: tuple[str, ...],
    keep: tuple[str, ...],
    num_expected: int,
) -> Comparison:
    def stacked(arm: str) -> dict[int | None, dict[str, np.ndarray]]:
        """Scores of the seeds that have all of them."""
        found = {r.seed: {name: scores_of(r, name, rows[1]) for name, rows in halves.items()} for r in chosen[arm]}
        return {
            seed: {name: row for name, row in scores.items() if row is not None}
            for seed, scores in found.items()
            if all(row is not None for row in scores.values())
        }

    first, second = stacked(a), stacked(b)
    absent = [_spoken(arm) for arm, found in ((a, first), (b, second)) if not found]
    shared = sorted(seed for seed in first if seed is not None and (b in UNTOUCHED or seed in second))
    if absent or not shared:
        reason = f"no finished measurement of {' and of '.join(absent)}" if absent else "they have no seed in common"
        return Comparison(a, b, {}, None, None, None, num_expected, reason)
    differences = {
        name: np.stack([first[seed][name] - second[None if b in UNTOUCHED else seed][name] for seed in shared])
        for name in halves
    }
    groups = [[name] for name in halves] + [list(group) for group in (gain + keep, gain, keep) if group]
    intervals = [_possible(interval) for interval in paired_bootstrap(differences, groups)]
    of_groups = iter(intervals[len(halves) :])
    every = next(of_groups)
    return Comparison(
        a,
        b,
        dict(zip(halves, intervals, strict=False)),
        every,
        next(of_groups) if gain else None,
        next(of_groups) if keep else None,
        num_expected,
    )


def _possible(interval: Interval) -> Interval:
    """Scores lie between 0 and 1, so that their differences can't leave -1 to 1."""
    return replace(interval, low=max(-1.0, interval.low), high=min(1.0, interval.high))


def _spoken(arm: str) -> str:
    return f"the untouched {arm}" if arm in UNTOUCHED else arm


def _predictions(records: Sequence[Record], halves: Halves) -> tuple[Prediction, ...]:
    reported = {name: rows[1] for name, rows in halves.items()}
    start = next((mean_score(record, reported) for record in records if record.arm == "Instruct"), math.nan)
    own = [record for record in records if record.arm == "B2I" and record.scale == 1.0]
    return tuple(
        Prediction(
            record.lr,
            record.seed,
            {name: value for name, value in record.facts.items() if name in FACTS},
            mean_score(record, reported) - start,
        )
        for record in sorted(own, key=lambda record: (record.lr or 0.0, record.seed or 0))
        if record.lr is not None and record.seed is not None
    )


def _lines(records: Sequence[Record]) -> Iterator[Line]:
    drawn = [record for record in records if record.line and record.lr is not None]
    for arm, lr in sorted({(record.arm, record.lr) for record in drawn if record.lr is not None}):
        own = [record for record in drawn if (record.arm, record.lr) == (arm, lr)]
        scales = sorted({scale for record in own for scale in record.line})
        losses = {scale: average([record.line.get(scale, math.nan) for record in own]) for scale in scales}
        yield Line(arm, lr, losses, average([barrier(record.line) for record in own]))


def _costs(records: Sequence[Record]) -> dict[str, dict[str, Average]]:
    costs: dict[str, dict[str, Average]] = {}
    for arm in ARMS:
        own = [record for record in records if record.arm == arm and record.scale in (None, 1.0)]
        names = dict.fromkeys(name for record in own for name in record.cost)
        if names:
            costs[arm] = {name: average([record.cost.get(name, math.nan) for record in own]) for name in names}
    return costs


def _notes(choices: Mapping[str, Choice], seeds: Sequence[int], unscored: Mapping[str, str]) -> Iterator[str]:
    yield few_seeds(len(seeds))
    yield from (choice.note for choice in choices.values() if choice.note)
    tried = {arm: len({candidate.lr for candidate in choice.candidates}) for arm, choice in choices.items()}
    if len(set(tried.values())) > 1:
        told = ", ".join(f"{arm} {count}" for arm, count in tried.items())
        yield f"The arms were tried at unequal numbers of rates ({told}): more rates are more chances."
    yield (
        "Rates are chosen on other rows than the reported ones, but on the same trainings: of many rates that do "
        "equally well, the luckiest seeds are taken."
    )
    yield from (f"{name} is in no mean: {why}." for name, why in unscored.items())


def _missing(records: Sequence[Record], halves: Halves, seeds: Sequence[int]) -> Iterator[str]:
    for arm in ARMS:
        own = [record for record in records if record.arm == arm and record.scale in (None, 1.0)]
        if not own:
            what = "no measurement" if arm in UNTOUCHED else "no finished training at scale 1"
            yield f"{arm}: {what}"
        for lr in sorted({record.lr for record in own if record.lr is not None}):
            absent = sorted(set(seeds) - {record.seed for record in own if record.lr == lr})
            if absent:
                yield f"{arm} at {lr:g}: no finished training of seed {', '.join(map(str, absent))}"
        for record in own:
            where = arm if record.lr is None else f"{arm} at {record.lr:g}, seed {record.seed}"
            for name, rows in halves.items():
                scores = record.samples.get(name, {})
                count = sum(math.isfinite(scores.get(row, math.nan)) for half in rows for row in half)
                if count < sum(map(len, rows)):
                    yield f"{where}: {name} has scores of {count} of {sum(map(len, rows))} rows"


def _values(records: Sequence[Record], halves: Halves) -> Iterator[Value]:
    for record in sorted(records, key=lambda r: (ARMS.index(r.arm), r.lr or 0.0, r.seed or 0, r.scale or 0.0)):
        key = (record.arm, record.lr, record.seed, record.scale)
        for name, rows in halves.items():
            for half, of_half in zip(("selection", "reported"), rows, strict=True):
                yield Value(*key, f"{name}/score", half, mean_score(record, {name: of_half}))
        for group in (record.metrics, record.cost, record.facts):
            yield from (Value(*key, metric, "all", value) for metric, value in group.items())
        yield from (Value(*key, f"line/{scale:g}", "all", loss) for scale, loss in record.line.items())
