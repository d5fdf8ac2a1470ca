"""From the rows of a comparison to the numbers of its report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from shadowlit.errors import DataError
from shadowlit.studies.arms import ARMS, TUNED, UNTOUCHED
from shadowlit.studies.comparison.scoring import Measure, Scoring
from shadowlit.studies.comparison.selection import (
    Choice,
    choose_rate,
    choose_rate_and_scale,
    halves_of,
    scored,
    seeds_of,
    standings,
)
from shadowlit.studies.rows import Row, Standing, metric_names, standing_of
from shadowlit.studies.statistics import (
    Average,
    Correlation,
    Interval,
    average,
    exact_interval,
    few_seeds,
    paired_bootstrap,
    seeds_interval,
    spearman,
)

COMPARED = (("B2I", "I2I"), ("B2I", "Instruct"), ("I2I", "Instruct"))
"""The arms that are compared: the first minus the second."""
FACTS = {
    "sigma": "σ of the pair",
    "cos_deltas": "cos(Δ_B, Δ_I)",
    "delta_over_offset": "‖Δ‖ / ‖offset‖",
    "survival": "survival in the exported dtype",
}
"""What might predict whether a graft pays, and how reports call it."""
OVER_INSTRUCT = "reported/mean_over_instruct"
"""Mean score minus that of the untouched Instruct, on the reported rows; above 0, the arm is better."""


@dataclass(frozen=True)
class Description:
    """The subject of a report: its heading, the configuration that was trained, and the command that makes it again."""

    title: str
    config: str = ""
    command: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two arms, each at its chosen rate, compared sample by sample and seed by seed on the reported rows.

    Of ``a - b`` there is an interval by kind of score: ``<name>/score``, ``mean``, ``gain`` and ``keep``; none if the
    two can't be compared, for the reason given. Where rows have no scores of their own, it is over seeds alone.
    ``num_expected`` is the number of seeds that there should be.
    """

    a: str
    b: str
    intervals: dict[str, Interval]
    num_expected: int
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """All numbers of a comparison.

    Attributes:
        scoring: What the arms are scored by.
        arms: The arms that were asked for, and the untouched models.
        num_rows: Numbers of samples of each evaluator for the selection, and reported.
        rows: All rows, with their scores on both halves, facts and losses on the line among the metrics.
        table: Standing of every arm at its chosen rate and scale 1.
        grid: Standing of every arm at every rate and scale; the untouched models first.
        shown: Divergences and losses over all samples (nats per token).
        choices: Choice of the rate at scale 1; arms without a finished training are missing.
        predictions: Row of each graft of B2I at scale 1.
        lines: Standings with losses on the way to the graft, at ``line_scales``.
    """

    description: Description
    scoring: Scoring
    arms: tuple[str, ...]
    num_rows: dict[str, tuple[int, int]]
    rows: tuple[Row, ...]
    table: tuple[Standing, ...]
    grid: tuple[Standing, ...]
    shown: tuple[str, ...]
    choices: dict[str, Choice]
    best_scales: dict[str, Standing]
    comparisons: tuple[Comparison, ...]
    predictions: tuple[Row, ...]
    correlations: dict[str, Correlation]
    lines: tuple[Standing, ...]
    line_scales: tuple[float, ...]
    costs: dict[str, dict[str, Average]]
    notes: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def gain(self) -> tuple[str, ...]:
        """Scores of what is learned."""
        return self.scoring.gain

    @property
    def keep(self) -> tuple[str, ...]:
        """Scores of what is kept."""
        return self.scoring.keep

    @property
    def scores(self) -> tuple[str, ...]:
        """All scores: evaluators, and metrics of validation sets."""
        return self.scoring.names

    def is_chosen(self, standing: Standing) -> bool:
        """Return whether it is that of its arm's chosen rate, at scale 1."""
        choice = self.choices.get(standing.arm)
        return choice is not None and standing.lr == choice.best.lr and standing.is_whole


def summarise(
    rows: Sequence[Row],
    description: Description,
    *,
    gain: Sequence[str] = (),
    keep: Sequence[str] = (),
    score: Mapping[str, Measure] = MappingProxyType({}),
    choose: Mapping[str, Measure] = MappingProxyType({}),
    arms: Sequence[str] = TUNED,
    rates: Mapping[str, Sequence[float]] = MappingProxyType({}),
    seeds: Sequence[int] = (),
    agreements: Sequence[str] = (),
) -> Report:
    """Compare the arms by what they should learn and what they should keep.

    Evaluators without scores of samples, or with scores outside of 0 to 1, and metrics that were not logged are in no
    mean; a note says so, and the evaluators' metrics are shown. The agreement with the Instruct chooses no rate.

    Args:
        rows: Rows of the comparison.
        description: Subject of the report.
        gain: Evaluators of what is to be learned.
        keep: Evaluators of what is to be kept.
        score: Metrics of the last validation, of what is to be learned.
        choose: Metrics whose mean chooses the rates; empty for the scores themselves.
        arms: Arms that were asked for; rows of others are left out.
        rates: Learning rates of each arm that were asked for, which may lack a finished training.
        seeds: Seeds that were asked for, likewise.
        agreements: Evaluators that compare with the Instruct; those that log an ``agreement`` needn't be named.

    Raises:
        DataError: Two rows are of the same arm, rate, seed and scale; a score is named twice; nothing has scores.
    """
    asked = (*UNTOUCHED, *(arm for arm in TUNED if arm in arms))
    rows = [row for row in rows if row.arm in asked]
    _require_distinct(rows, [*score, *gain, *keep])
    unscored = {name: why for name in (*gain, *keep) if (why := _why_unscored(rows, name))}
    unscored |= {name: "it was not logged" for name in (*score, *choose) if not _is_logged(rows, name)}
    gain, keep = (tuple(name for name in names if name not in unscored) for names in ((*score, *gain), keep))
    scoring = Scoring(
        gain,
        keep,
        {name: measure for name, measure in score.items() if name not in unscored},
        {name: measure for name, measure in choose.items() if name not in unscored},
        frozenset(
            name
            for name in (*gain, *keep)
            if name in agreements or any(f"{name}/agreement" in row.metrics for row in rows)
        ),
        {name: halves_of(rows, name) for name in (*gain, *keep) if name not in score},
    )
    if not scoring.mean:
        reasons = "; ".join(f"{name}: {why}" for name, why in unscored.items())
        raise DataError(
            f"no evaluator can compare the arms ({reasons or 'none is named'}). Name one that scores its rows, or a "
            "metric of the validation as score."
        )
    shown = _shown_metrics(rows, scoring)
    rows = sorted(_complete(scored(rows, scoring), scoring.whole), key=_order)
    found, seeds = seeds_of(rows), sorted({*seeds, *seeds_of(rows)})
    grid = standings(rows, len(seeds))
    choices = {arm: choice for arm in asked if (choice := choose_rate(grid, arm, scoring.choice))}
    chosen = {s.arm: s for s in grid if s.arm in UNTOUCHED} | {arm: choice.best for arm, choice in choices.items()}
    own, names = _chosen(rows, chosen), metric_names(rows)
    predictions = [row for row in rows if row.arm == "B2I" and row.scale == 1.0]
    scales = sorted({scale for row in rows for scale in row.line})
    compared = [(a, b) for a, b in COMPARED if a in asked and b in asked]
    return Report(
        description,
        scoring,
        asked,
        {name: (len(selection), len(reported)) for name, (selection, reported) in scoring.halves.items()},
        tuple(rows),
        table=tuple(chosen.get(arm) or standing_of(arm, [], names, len(seeds) if arm in TUNED else 1) for arm in asked),
        grid=tuple(grid),
        shown=shown,
        choices=choices,
        best_scales=dict(_best_scales(grid, scoring.choice)),
        comparisons=tuple(_compare(a, b, own, scoring, len(seeds)) for a, b in compared),
        predictions=tuple(predictions),
        correlations=correlate(predictions),
        lines=tuple(standing for standing in grid if any(standing[f"line/{scale:g}"].count for scale in scales)),
        line_scales=tuple(scales),
        costs=_costs(rows),
        notes=tuple(_notes(choices, found, unscored, scoring)),
        missing=tuple(_missing(rows, asked, scoring, rates, seeds)),
    )


def correlate(predictions: Sequence[Row]) -> dict[str, Correlation]:
    """Return the rank correlation of every fact with the gain."""
    gains = [row.metrics[OVER_INSTRUCT] for row in predictions]
    return {fact: spearman([row.facts.get(fact, math.nan) for row in predictions], gains) for fact in FACTS}


def barrier(line: Mapping[float, float]) -> float:
    """Return how far the loss rises above the larger end between the target (scale 0) and the graft (scale 1).

    0 means that the line never lies above its ends: they are linearly connected (Frankle et al., arXiv 1912.05671, who
    compare with the mean of the ends; the larger end asks for less, and does not count a slope as a barrier).

    Returns:
        At least 0, in nats per token; NaN if an end is missing, nothing lies between them, or a loss isn't finite.
    """
    between = [loss for scale, loss in line.items() if 0 <= scale <= 1]
    if 0.0 not in line or 1.0 not in line or len(between) < 3 or not all(map(math.isfinite, between)):
        return math.nan
    return max(between) - max(line[0.0], line[1.0])


def _complete(rows: Sequence[Row], measure: Measure) -> Iterator[Row]:
    """The rows with everything else among their metrics that standings, plots and ``table.csv`` show."""
    start = next((row.metrics["reported/mean"] for row in rows if row.arm == "Instruct"), math.nan)
    for row in rows:
        more = {OVER_INSTRUCT: measure.sign * (row.metrics["reported/mean"] - start), **row.facts}
        if row.line:
            more |= {"barrier": barrier(row.line), **{f"line/{scale:g}": loss for scale, loss in row.line.items()}}
        yield replace(row, metrics={**row.metrics, **more})


def _order(row: Row) -> tuple[int, float, float, int]:
    return ARMS.index(row.arm), row.lr or 0.0, row.scale or 0.0, row.seed or 0


def _require_distinct(rows: Sequence[Row], evaluators: Sequence[str]) -> None:
    keys = [(row.arm, row.lr, row.seed, row.scale) for row in rows]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise DataError("there are two rows of {}, rate {}, seed {}, scale {}. Give one of each.".format(*twice))
    named = next((name for name in evaluators if evaluators.count(name) > 1), None)
    if named:
        raise DataError(f"the score {named!r} is named twice; name it once, under score, gain or keep.")


def _why_unscored(rows: Sequence[Row], evaluator: str) -> str:
    scores = [score for row in rows for score in row.samples.get(evaluator, {}).values()]
    if not scores:
        return "it has no scores of rows"
    if any(score < 0 or score > 1 for score in scores):
        return "its scores leave the range from 0 to 1"
    if len(halves_of(rows, evaluator)[1]) == 0:
        return "it has a single row, which can't be halved"
    return ""


def _is_logged(rows: Sequence[Row], metric: str) -> bool:
    return any(math.isfinite(row.metrics.get(metric, math.nan)) for row in rows)


def _shown_metrics(rows: Sequence[Row], scoring: Scoring) -> tuple[str, ...]:
    """Divergences, then losses that are no scores; the overall ones first."""
    names = [name for name in metric_names(rows) if name not in scoring.metrics]
    divergences = [name for name in names if name.rsplit("/", 1)[-1].startswith("kl")]
    losses = sorted((name for name in names if name.rsplit("/", 1)[-1] == "loss"), key=lambda n: ("/" in n, n))
    return (*divergences, *losses)


def _chosen(rows: Sequence[Row], chosen: Mapping[str, Standing]) -> dict[str, list[Row]]:
    """The rows that the chosen standings are from."""
    places = {arm: (arm, found.scale, found.setting) for arm, found in chosen.items()}
    return {arm: [row for row in rows if (row.arm, row.scale, row.setting) == place] for arm, place in places.items()}


def _best_scales(grid: Sequence[Standing], measure: Measure) -> Iterator[tuple[str, Standing]]:
    for arm in TUNED:
        choice = choose_rate_and_scale(grid, arm, measure)
        if choice and len({each.scale for each in choice.candidates if each["selection/mean"].count}) > 1:
            yield arm, choice.best


def _compare(a: str, b: str, chosen: Mapping[str, Sequence[Row]], scoring: Scoring, num_expected: int) -> Comparison:
    def by_seed(arm: str) -> dict[int | None, Row]:
        """The rows that have all scores."""
        needed = [f"reported/{name}/score" for name in scoring.names]
        return {row.seed: row for row in chosen.get(arm, []) if all(math.isfinite(row.metrics[n]) for n in needed)}

    first, second = by_seed(a), by_seed(b)
    absent = [in_words(arm) for arm, found in ((a, first), (b, second)) if not found]
    shared = sorted(seed for seed in first if seed is not None and (b in UNTOUCHED or seed in second))
    if absent or not shared:
        reason = f"no finished measurement of {' and of '.join(absent)}" if absent else "they have no seed in common"
        return Comparison(a, b, {}, num_expected, reason)
    pairs = [(first[seed], second[None if b in UNTOUCHED else seed]) for seed in shared]
    return Comparison(a, b, _intervals(pairs, scoring), num_expected)


def _intervals(pairs: Sequence[tuple[Row, Row]], scoring: Scoring) -> dict[str, Interval]:
    """The interval of every kind of score, from the rows of two arms by seed."""
    differences, weights, is_constant = {}, {}, {}
    for name in scoring.names:
        num_rows = len(pairs[0][0].samples.get(name, {}))
        found = [scoring.rows(row, name, num_rows) for pair in pairs for row in pair]
        known = [each for each in found if each is not None]
        if len(known) == len(found) and all(np.array_equal(own, known[0][1]) for _, own in known):
            scores = np.stack([scores for scores, _ in known])
            differences[name], weights[name] = scores[::2] - scores[1::2], known[0][1]
            is_binary = np.isin(scores, (0.0, 1.0)).all()
            is_constant[name] = bool(is_binary and (differences[name] == differences[name].flat[0]).all())
    by_rows = {what: names for what, names in scoring.groups.items() if all(name in differences for name in names)}
    intervals = {}
    if by_rows:
        drawn = paired_bootstrap(differences, list(by_rows.values()), weights=weights)
        intervals = dict(zip(by_rows, drawn, strict=True))
    for what, names in scoring.groups.items():
        if what not in intervals:
            key = f"reported/{what}"
            intervals[what] = seeds_interval([one.metrics[key] - other.metrics[key] for one, other in pairs])
        elif intervals[what].is_degenerate and all(is_constant[name] for name in names):
            ends = [exact_interval(differences[name].flat[0], differences[name].shape[1]) for name in names]
            low, high = np.mean(ends, axis=0).tolist()
            intervals[what] = replace(intervals[what], low=low, high=high, exact=True)
        if scoring.measure_of(what).unit == "share":  # whose differences can't leave -1 to 1
            own = intervals[what]
            low, high = (min(1.0, max(-1.0, end)) if math.isfinite(end) else end for end in (own.low, own.high))
            intervals[what] = replace(own, low=low, high=high)
    return {what: intervals[what] for what in scoring.groups}


def in_words(arm: str) -> str:
    """Return an arm within a sentence."""
    return f"the untouched {arm}" if arm in UNTOUCHED else arm


def _costs(rows: Sequence[Row]) -> dict[str, dict[str, Average]]:
    costs: dict[str, dict[str, Average]] = {}
    for arm in ARMS:
        own = [row for row in rows if row.arm == arm and row.is_whole]
        names = dict.fromkeys(name for row in own for name in row.cost)
        if names:
            costs[arm] = {name: average([row.cost.get(name, math.nan) for row in own]) for name in names}
    return costs


def _notes(
    choices: Mapping[str, Choice], seeds: Sequence[int], unscored: Mapping[str, str], scoring: Scoring
) -> Iterator[str]:
    yield few_seeds(len(seeds))
    yield from (choice.note for choice in choices.values() if choice.note)
    tried = {arm: len({candidate.lr for candidate in choice.candidates}) for arm, choice in choices.items()}
    if len(set(tried.values())) > 1:
        told = ", ".join(f"{arm} {count}" for arm, count in tried.items())
        yield f"The arms were tried at unequal numbers of rates ({told}): more rates are more chances."
    if scoring.sharing:
        yield (
            f"The rates are chosen on the same rows that {' and '.join(scoring.sharing)} report, which flatters the "
            "arms, and those with more rates most: give a second validation set, and choose by it."
        )
    else:
        yield (
            "Rates are chosen on other rows than the reported ones, but on the same trainings: of many rates that do "
            "equally well, the luckiest seeds are taken."
        )
    yield from (
        f"{name} measures the agreement with the Instruct, so that it has no say in the choice and in the mean."
        for name in scoring.names
        if name in scoring.forgetting
    )
    yield from (f"{name} is in no mean: {why}." for name, why in unscored.items())


def _missing(
    rows: Sequence[Row],
    arms: Sequence[str],
    scoring: Scoring,
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
) -> Iterator[str]:
    for arm in arms:
        own = [row for row in rows if row.arm == arm and row.is_whole]
        if not own:
            what = "no measurement" if arm in UNTOUCHED else "no finished training at scale 1"
            yield f"{arm}: {what}"
        asked = rates.get(arm, ()) if own else ()
        for lr in sorted({*asked, *(row.lr for row in own if row.lr is not None)}):
            absent = sorted(set(seeds) - {row.seed for row in own if row.lr == lr})
            if absent:
                yield f"{arm} at {lr:g}: no finished training of seed {', '.join(map(str, absent))}"
        for row in own:
            where = arm if row.lr is None else f"{arm} at {row.lr:g}, seed {row.seed}"
            for name, of_halves in scoring.halves.items():
                scores, wanted = row.samples.get(name, {}), [index for half in of_halves for index in half]
                count = sum(math.isfinite(scores.get(index, math.nan)) for index in wanted)
                if count < len(wanted):
                    yield f"{where}: {name} has scores of {count} of {len(wanted)} rows"
            for name in dict.fromkeys((*scoring.metrics, *scoring.choose)):
                if not math.isfinite(row.metrics.get(name, math.nan)):
                    yield f"{where}: {name} is missing or not finite"
