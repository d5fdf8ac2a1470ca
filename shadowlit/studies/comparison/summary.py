"""From the rows of a comparison to the numbers of its report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shadowlit.errors import DataError
from shadowlit.studies.arms import ARMS, TUNED, UNTOUCHED
from shadowlit.studies.comparison.selection import (
    Choice,
    choose_rate,
    choose_rate_and_scale,
    groups_of,
    halves_of,
    scored,
    scores_of,
    seeds_of,
    standings,
)
from shadowlit.studies.rows import Row, Standing, metric_names, standing_of
from shadowlit.studies.statistics import Average, Correlation, Interval, average, few_seeds, paired_bootstrap, spearman

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
"""Mean score over all evaluators minus that of the untouched Instruct, on the reported half."""
Halves = Mapping[str, tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Description:
    """The subject of a report: its heading, the configuration that was trained, and the command that makes it again."""

    title: str
    config: str = ""
    command: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two arms, each at its chosen rate, compared sample by sample and seed by seed on the reported half.

    Of ``a - b`` there is an interval by kind of score: ``<evaluator>/score``, ``mean``, ``gain`` and ``keep``; none if
    the two can't be compared, for the reason given. ``num_expected`` is the number of seeds that there should be.
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
    gain: tuple[str, ...]
    keep: tuple[str, ...]
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
    def evaluators(self) -> tuple[str, ...]:
        """All evaluators."""
        return self.gain + self.keep

    def is_chosen(self, standing: Standing) -> bool:
        """Whether it is that of its arm's chosen rate, at scale 1."""
        choice = self.choices.get(standing.arm)
        return choice is not None and standing.lr == choice.best.lr and standing.is_whole


def summarise(rows: Sequence[Row], description: Description, *, gain: Sequence[str], keep: Sequence[str]) -> Report:
    """Compare the arms by evaluators of what is to be learned (``gain``) and of what is to be kept (``keep``).

    Evaluators without scores of samples, or with scores outside of 0 to 1, are in no mean; a note says so, and their
    metrics are shown.

    Raises:
        DataError: Two rows are of the same arm, rate, seed and scale; an evaluator is named twice; no evaluator has
            scores.
    """
    _require_distinct(rows, [*gain, *keep])
    unscored = {name: why for name in (*gain, *keep) if (why := _why_unscored(rows, name))}
    gain, keep = (tuple(name for name in names if name not in unscored) for names in (gain, keep))
    if not gain + keep:
        reasons = "; ".join(f"{name}: {why}" for name, why in unscored.items())
        raise DataError(
            f"no evaluator can compare the arms ({reasons or 'none is named'}). Name one that scores its rows."
        )
    halves = {name: halves_of(rows, name) for name in gain + keep}
    shown = _shown_metrics(rows)
    rows = sorted(_complete(scored(rows, gain, keep)), key=_order)
    seeds, grid = seeds_of(rows), standings(rows)
    choices = {arm: choice for arm in TUNED if (choice := choose_rate(grid, arm))}
    chosen = {s.arm: s for s in grid if s.arm in UNTOUCHED} | {arm: choice.best for arm, choice in choices.items()}
    own, names = _chosen(rows, chosen), metric_names(rows)
    predictions = [row for row in rows if row.arm == "B2I" and row.scale == 1.0]
    scales = sorted({scale for row in rows for scale in row.line})
    return Report(
        description,
        gain,
        keep,
        {name: (len(selection), len(reported)) for name, (selection, reported) in halves.items()},
        tuple(rows),
        table=tuple(chosen.get(arm) or standing_of(arm, [], names, len(seeds) if arm in TUNED else 1) for arm in ARMS),
        grid=tuple(grid),
        shown=shown,
        choices=choices,
        best_scales=dict(_best_scales(grid)),
        comparisons=tuple(_compare(a, b, own, halves, groups_of(gain, keep), len(seeds)) for a, b in COMPARED),
        predictions=tuple(predictions),
        correlations=correlate(predictions),
        lines=tuple(standing for standing in grid if any(standing[f"line/{scale:g}"].count for scale in scales)),
        line_scales=tuple(scales),
        costs=_costs(rows),
        notes=tuple(_notes(choices, seeds, unscored)),
        missing=tuple(_missing(rows, halves, seeds)),
    )


def correlate(predictions: Sequence[Row]) -> dict[str, Correlation]:
    """The rank correlation of every fact with the gain."""
    gains = [row.metrics[OVER_INSTRUCT] for row in predictions]
    return {fact: spearman([row.facts.get(fact, math.nan) for row in predictions], gains) for fact in FACTS}


def barrier(line: Mapping[float, float]) -> float:
    """How far the loss rises above the larger end between the target (scale 0) and the graft (scale 1).

    0 means that the line never lies above its ends: they are linearly connected (Frankle et al., arXiv 1912.05671, who
    compare with the mean of the ends; the larger end asks for less, and does not count a slope as a barrier).

    Returns:
        At least 0, in nats per token; NaN if an end is missing, nothing lies between them, or a loss isn't finite.
    """
    between = [loss for scale, loss in line.items() if 0 <= scale <= 1]
    if 0.0 not in line or 1.0 not in line or len(between) < 3 or not all(map(math.isfinite, between)):
        return math.nan
    return max(between) - max(line[0.0], line[1.0])


def _complete(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows with everything else among their metrics that standings, plots and ``table.csv`` show."""
    start = next((row.metrics["reported/mean"] for row in rows if row.arm == "Instruct"), math.nan)
    for row in rows:
        more = {OVER_INSTRUCT: row.metrics["reported/mean"] - start, **row.facts}
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
        raise DataError(f"the evaluator {named!r} is named twice; name it under gain or under keep.")


def _why_unscored(rows: Sequence[Row], evaluator: str) -> str:
    scores = [score for row in rows for score in row.samples.get(evaluator, {}).values()]
    if not scores:
        return "it has no scores of rows"
    if any(score < 0 or score > 1 for score in scores):
        return "its scores leave the range from 0 to 1"
    if len(halves_of(rows, evaluator)[1]) == 0:
        return "it has a single row, which can't be halved"
    return ""


def _shown_metrics(rows: Sequence[Row]) -> tuple[str, ...]:
    """Divergences, then losses; the overall ones first."""
    names = metric_names(rows)
    divergences = [name for name in names if name.rsplit("/", 1)[-1].startswith("kl")]
    losses = sorted((name for name in names if name.rsplit("/", 1)[-1] == "loss"), key=lambda n: ("/" in n, n))
    return (*divergences, *losses)


def _chosen(rows: Sequence[Row], chosen: Mapping[str, Standing]) -> dict[str, list[Row]]:
    """The rows that the chosen standings are from."""
    places = {arm: (arm, found.scale, found.setting) for arm, found in chosen.items()}
    return {arm: [row for row in rows if (row.arm, row.scale, row.setting) == place] for arm, place in places.items()}


def _best_scales(grid: Sequence[Standing]) -> Iterator[tuple[str, Standing]]:
    for arm in TUNED:
        choice = choose_rate_and_scale(grid, arm)
        if choice and len({each.scale for each in choice.candidates if each["selection/mean"].count}) > 1:
            yield arm, choice.best


def _compare(
    a: str,
    b: str,
    chosen: Mapping[str, Sequence[Row]],
    halves: Halves,
    groups: Mapping[str, tuple[str, ...]],
    num_expected: int,
) -> Comparison:
    def stacked(arm: str) -> dict[int | None, dict[str, np.ndarray]]:
        """Scores of the seeds that have all of them."""
        found = {}
        for row in chosen.get(arm, []):
            scores = {name: scores_of(row, name, reported) for name, (_, reported) in halves.items()}
            known = {name: own for name, own in scores.items() if own is not None}
            if len(known) == len(halves):
                found[row.seed] = known
        return found

    first, second = stacked(a), stacked(b)
    absent = [in_words(arm) for arm, found in ((a, first), (b, second)) if not found]
    shared = sorted(seed for seed in first if seed is not None and (b in UNTOUCHED or seed in second))
    if absent or not shared:
        reason = f"no finished measurement of {' and of '.join(absent)}" if absent else "they have no seed in common"
        return Comparison(a, b, {}, num_expected, reason)
    differences = {
        name: np.stack([first[seed][name] - second[None if b in UNTOUCHED else seed][name] for seed in shared])
        for name in halves
    }
    intervals = zip(groups, paired_bootstrap(differences, list(groups.values())), strict=True)
    # Scores lie between 0 and 1, so that their differences can't leave -1 to 1.
    possible = {what: replace(i, low=max(-1.0, i.low), high=min(1.0, i.high)) for what, i in intervals}
    return Comparison(a, b, possible, num_expected)


def in_words(arm: str) -> str:
    """An arm within a sentence."""
    return f"the untouched {arm}" if arm in UNTOUCHED else arm


def _costs(rows: Sequence[Row]) -> dict[str, dict[str, Average]]:
    costs: dict[str, dict[str, Average]] = {}
    for arm in ARMS:
        own = [row for row in rows if row.arm == arm and row.is_whole]
        names = dict.fromkeys(name for row in own for name in row.cost)
        if names:
            costs[arm] = {name: average([row.cost.get(name, math.nan) for row in own]) for name in names}
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


def _missing(rows: Sequence[Row], halves: Halves, seeds: Sequence[int]) -> Iterator[str]:
    for arm in ARMS:
        own = [row for row in rows if row.arm == arm and row.is_whole]
        if not own:
            what = "no measurement" if arm in UNTOUCHED else "no finished training at scale 1"
            yield f"{arm}: {what}"
        for lr in sorted({row.lr for row in own if row.lr is not None}):
            absent = sorted(set(seeds) - {row.seed for row in own if row.lr == lr})
            if absent:
                yield f"{arm} at {lr:g}: no finished training of seed {', '.join(map(str, absent))}"
        for row in own:
            where = arm if row.lr is None else f"{arm} at {row.lr:g}, seed {row.seed}"
            for name, of_halves in halves.items():
                scores, wanted = row.samples.get(name, {}), [index for half in of_halves for index in half]
                count = sum(math.isfinite(scores.get(index, math.nan)) for index in wanted)
                if count < len(wanted):
                    yield f"{where}: {name} has scores of {count} of {len(wanted)} rows"
