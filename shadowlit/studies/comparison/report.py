"""The report of a comparison: Markdown, CSV and plots, of one setting or of several."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from shadowlit.errors import DataError
from shadowlit.studies.arms import ARMS, TUNED, UNTOUCHED
from shadowlit.studies.comparison.plots import plot_predicting, plot_table, plot_trade
from shadowlit.studies.comparison.summary import (
    COMPARED,
    FACTS,
    OVER_INSTRUCT,
    Comparison,
    Description,
    Report,
    correlate,
    in_words,
    summarise,
)
from shadowlit.studies.report import NONE, bullets, markdown_table, mean_text, paragraphs, write_files
from shadowlit.studies.rows import LR, Row, Standing
from shadowlit.studies.statistics import Average, Correlation, Interval

_CORRELATED = (
    "Spearman's rank correlation with the gain of B2I (mean score minus the untouched Instruct's, reported half), over "
    "all rates and seeds."
)
_KNOWN = ("known", "ρ", "n", "values", "caution")
_MEANS = ("selection/mean", "reported/mean", "reported/gain", "reported/keep")
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "train_s": ("training (s)", lambda value: f"{value:.1f}"),
    "evaluation_s": ("evaluation (s)", lambda value: f"{value:.1f}"),
    "tokens_per_s": ("tokens per s", lambda value: f"{value:,.0f}"),
    "peak_memory_bytes": ("peak memory (MiB)", lambda value: f"{value / 2**20:,.0f}"),
    "trained_parameters": ("trained parameters", lambda value: f"{value:,.0f}"),
}


def write_report(
    rows: Sequence[Row], description: Description, *, gain: Sequence[str], keep: Sequence[str], folder: Path
) -> Path:
    """Write ``REPORT.md``, ``table.csv`` and the plots ``trade``, ``table`` and ``predicting`` into a folder.

    Args:
        rows: Rows of all finished trainings and the untouched models.
        description: Subject of the report.
        gain: Evaluators of what is to be learned.
        keep: Evaluators of what is to be kept.
        folder: Folder of the report; made if it isn't there. Older files of these names are replaced.

    Returns:
        Path of ``REPORT.md``, which is written last.

    Raises:
        DataError: See :func:`shadowlit.studies.comparison.summary.summarise`.
    """
    return _write(summarise(rows, description, gain=gain, keep=keep), folder)


def write_combined(reports: Mapping[str, Report], description: Description, folder: Path) -> Path:
    """Write the reports of several settings as one: a folder of plots for each setting, and one text.

    Args:
        reports: Reports by name of the setting.
        description: Subject of the whole.
        folder: Folder for ``REPORT.md``, ``table.csv`` of all settings (which has the axis ``setting``) and the plot
            ``predicting``.

    Returns:
        Path of ``REPORT.md``.
    """
    text = combine(reports, description)
    for name, report in reports.items():
        _write(report, folder / name)
    figure = plot_predicting({name: report.predictions for name, report in reports.items()})
    rows = [
        replace(row, setting={"setting": name, **row.setting})
        for name, report in reports.items()
        for row in report.rows
    ]
    return write_files(folder, text, rows, ("setting", LR), {"predicting": figure})


def render(report: Report, *, level: int = 1, plots: str = "") -> str:
    """A report as Markdown.

    Args:
        report: Report to write.
        level: Level of the title's heading.
        plots: Path of the plots, as a prefix of their names.
    """
    sub = "#" * (level + 1)
    parts = [
        f"{'#' * level} {report.description.title}",
        _origin(report.description),
        _legend(report),
        f"{sub} What the data say\n\n{_statements(report)}",
        f"{sub} Each arm at its chosen rate\n\n{_main_table(report)}\n\n![scores]({plots}table.png)",
        f"{sub} Paired differences\n\n{_differences(report)}",
        f"{sub} All rates\n\n{_rates(report)}\n\n{_scales(report)}",
        f"{sub} What is learned and what is kept\n\n{_trade_words(report)}\n\n![trade-off]({plots}trade.png)",
        f"{sub} What might predict the gain\n\n{_predicting(report)}\n\n![predictors]({plots}predicting.png)",
        f"{sub} The line to the graft\n\n{_line_table(report)}",
        f"{sub} Cost\n\n{_cost_table(report)}",
        f"{sub} To be kept in mind\n\n{bullets(report.notes)}",
        f"{sub} Missing\n\n{bullets(report.missing) or 'Nothing.'}",
    ]
    return paragraphs(parts)


def combine(reports: Mapping[str, Report], description: Description) -> str:
    """The reports of several settings as one in Markdown: an overview, sentences over all, a section for each.

    Args:
        reports: Reports by name of the setting, which is also the folder of its plots.
        description: Subject of the whole.

    Raises:
        DataError: There are none.
    """
    if not reports:
        raise DataError("there are no reports to combine. Give at least one setting.")
    parts = [
        f"# {description.title}",
        _origin(description),
        "Mean score over a setting's evaluators in % on the reported half of their rows, each arm at the rate that "
        "was best on the other half; mean ± standard error over seeds. Differences in points with their 95 % "
        "bootstrap interval.",
        f"## Overview\n\n{_overview(reports)}",
        "## Over all settings\n\n" + bullets([_over_all(reports, i) for i in range(len(COMPARED))]),
        f"## What might predict the gain, over all settings\n\n{_pooled(reports)}\n\n![predictors](predicting.png)",
    ]
    parts += [render(report, level=2, plots=f"{quote(name)}/") for name, report in reports.items()]
    return paragraphs([part.strip() for part in parts])


def sentence(comparison: Comparison, interval: Interval | None, evaluators: Sequence[str]) -> str:
    """What the data support about two arms, by rule: an arm is better only if the whole interval lies on its side.

    Args:
        comparison: Comparison of the two arms.
        interval: One of its intervals; None if they can't be compared.
        evaluators: Evaluators that the interval is over.
    """
    a, b = in_words(comparison.a), in_words(comparison.b)
    if interval is None:
        return f"{a} and {b} can't be compared: {comparison.reason}."
    where = evaluators[0] if len(evaluators) == 1 else f"the mean of {_listed(evaluators)}"
    told = -interval if interval.sign < 0 else interval
    seeds = _count(interval.num_seeds, "seed")
    if interval.num_seeds < comparison.num_expected:
        seeds = f"{interval.num_seeds} of {_count(comparison.num_expected, 'seed')}"
    extent = f"(95 % CI {_points(told.low)} to {_points(told.high)}, {seeds}, {_count(interval.num_rows, 'row')})"
    alone = " With one seed, this says nothing of other trainings." if interval.num_seeds == 1 else ""
    if interval.sign == 0:
        told_apart = f"No difference between {a} and {b} can be told on {where}"
        return f"{told_apart}: {_points(told.difference, signed=True)} points {extent}.{alone}"
    better, worse = (a, b) if interval.sign > 0 else (b, a)
    better = better[0].upper() + better[1:]
    return f"{better} is better than {worse} on {where} by {_points(told.difference)} points {extent}.{alone}"


def _write(report: Report, folder: Path) -> Path:
    figures = {
        "trade": plot_trade(report),
        "table": plot_table(report),
        "predicting": plot_predicting({report.description.title: report.predictions}, report.lines, report.line_scales),
    }
    return write_files(folder, render(report), report.rows, (LR,), figures)


def _origin(description: Description) -> str:
    lines = [f"Configuration: `{description.config}`"] if description.config else []
    lines += [f"Made by: `{description.command}`"] if description.command else []
    return "\n\n".join(lines)


def _legend(report: Report) -> str:
    rows = ", ".join(f"{name} {selection} + {reported}" for name, (selection, reported) in report.num_rows.items())
    return (
        "An arm is named by the source of its delta and the target of the graft: B2I is Shadow-FT, I2I the directly "
        "tuned Instruct, B2B the tuned Base, I2B the Instruct's update on the Base. Each arm's learning rate is the "
        "one with the best mean score on one half of the rows (even positions); scores are of the other half. "
        f"Rows for the choice + reported: {rows}."
    )


def _statements(report: Report) -> str:
    lines = []
    for comparison in report.comparisons:
        lines.append(f"- {sentence(comparison, comparison.intervals.get('mean'), report.evaluators)}")
        if comparison.intervals and report.gain and report.keep:
            for words, interval, names in (
                ("Learned", comparison.intervals["gain"], report.gain),
                ("Kept", comparison.intervals["keep"], report.keep),
            ):
                lines.append(f"  - {words}: {sentence(comparison, interval, names)}")
    compared = {arm for pair in COMPARED for arm in pair}
    edges = [choice.note for arm, choice in report.choices.items() if choice.edge and arm in compared]
    return "\n".join(lines + [f"- {note}" for note in edges])


def _main_table(report: Report) -> str:
    names = list(report.evaluators)
    rows = []
    for standing in report.table:
        means = [standing[f"reported/{name}/score"] for name in names] + [standing["reported/mean"]]
        rows.append([_spoken_row(standing), _rate(standing.lr), *map(_percent, means)])
    table = markdown_table(["model", "lr", *names, "mean"], rows)
    parts = [f"Scores in %, mean ± standard error over seeds.\n\n{table}"]
    metrics = report.shown
    if metrics:
        rows = [
            [_spoken_row(standing), _rate(standing.lr), *(_nats(standing[name]) for name in metrics)]
            for standing in report.table
        ]
        parts.append(
            "Divergences and losses in nats per token, of all rows: nothing is chosen by them.\n\n"
            + markdown_table(["model", "lr", *metrics], rows)
        )
    return "\n\n".join(parts)


def _differences(report: Report) -> str:
    columns = {f"{name}/score": name for name in report.evaluators} | {"mean": "mean"}
    if report.gain and report.keep:
        columns |= {"gain": "learned", "keep": "kept"}
    rows = [[f"{c.a} − {c.b}", *(_interval(c.intervals.get(what)) for what in columns)] for c in report.comparisons]
    return (
        "Points, with the 95 % interval of a paired bootstrap over rows and Student's t over seeds.\n\n"
        + markdown_table(["difference", *columns.values()], rows)
        + "\n\nThe intervals of several evaluators are not corrected for their number."
    )


def _rates(report: Report) -> str:
    rows = []
    for standing in report.grid:
        if standing.arm in TUNED and standing.is_whole:
            chosen = "chosen" if standing.lr == _chosen_rate(report, standing.arm) else ""
            rows.append([standing.arm, _rate(standing.lr), *(_percent(standing[mean]) for mean in _MEANS), chosen])
    rows += [[arm, *[NONE] * 5, "no training"] for arm in TUNED if arm not in report.choices]
    header = ["arm", "lr", "mean, selection half", "mean, reported half", "learned", "kept", ""]
    return "Scale 1; learned and kept are of the reported half.\n\n" + markdown_table(header, rows)


def _scales(report: Report) -> str:
    if not report.best_scales:
        return "No arm's evaluators measured several scales."
    rows = []
    for arm, best in report.best_scales.items():
        at_one = next(standing["reported/mean"] for standing in report.table if standing.arm == arm)
        scale = NONE if best.scale is None else f"{best.scale:g}"
        means = (best["selection/mean"], best["reported/mean"], at_one)
        rows.append([arm, _rate(best.lr), scale, *map(_percent, means)])
    header = ["arm", "lr", "scale", "mean, selection half", "mean, reported half", "the same at scale 1"]
    return (
        "With the scale chosen as well, together with the rate and on the same half; an arm that has scales to choose "
        "from has more chances than one that has none.\n\n" + markdown_table(header, rows)
    )


def _trade_words(report: Report) -> str:
    drawn = [s for s in report.grid if math.isfinite(s["reported/gain"].mean)]
    return (
        "A point is an arm at one rate and scale, over its seeds; bigger is a higher rate, open is a scale other than "
        f"1, ringed is the chosen rate. {len(drawn)} of {len(report.grid)} have scores."
    )


def _predicting(report: Report) -> str:
    rows = [_known(report.correlations, fact) for fact in FACTS]
    text = (
        f"{_CORRELATED} The runs share one pair, its rows and a few rates: such a correlation mostly says what the "
        f"rate does.\n\n{markdown_table(_KNOWN, rows)}\n\n"
    )
    if not report.predictions:
        return text + "No graft of B2I at scale 1 is finished."
    rows = []
    for each in report.predictions:
        facts = [_number(each.facts.get(fact, math.nan), ".4g") for fact in FACTS]
        rows.append([_rate(each.lr), str(each.seed), *facts, _points(each.metrics[OVER_INSTRUCT], signed=True)])
    return text + markdown_table(["lr", "seed", *FACTS.values(), "gain (points)"], rows)


def _pooled(reports: Mapping[str, Report]) -> str:
    pooled = correlate([prediction for report in reports.values() for prediction in report.predictions])
    rows = []
    for fact in FACTS:
        within = [report.correlations[fact].rho for report in reports.values()]
        within = [rho for rho in within if math.isfinite(rho)]
        median = f"{statistics.median(within):+.2f} ({len(within)})" if within else NONE
        rows.append([*_known(pooled, fact), median])
    return (
        f"{_CORRELATED} Runs of one setting share pair, rows and rates: there are fewer independent cases than runs, "
        "and what differs between settings is the task before all else. Beside it, the median of the correlations "
        f"within the settings, and of how many.\n\n{markdown_table([*_KNOWN, 'median ρ within settings'], rows)}"
    )


def _known(found: Mapping[str, Correlation], fact: str) -> list[str]:
    correlation = found[fact]
    extent = f"{correlation.low:.3g} to {correlation.high:.3g}" if correlation.count else NONE
    rho = f"{correlation.rho:+.2f}" if math.isfinite(correlation.rho) else NONE
    return [FACTS[fact], rho, str(correlation.count), extent, correlation.caution]


def _line_table(report: Report) -> str:
    if not report.lines:
        return "No losses were measured between the target and the graft."
    names = [f"line/{scale:g}" for scale in report.line_scales] + ["barrier"]
    rows = [[line.arm, _rate(line.lr), *(_nats(line[name]) for name in names)] for line in report.lines]
    return (
        "Validation loss in nats per token by scale, from the untouched target (0) to the graft (1). The barrier is "
        "the highest loss between them above the larger end; 0: none.\n\n"
        + markdown_table(["arm", "lr", *(f"{scale:g}" for scale in report.line_scales), "barrier"], rows)
    )


def _cost_table(report: Report) -> str:
    names = [name for name in _COSTS if any(name in costs for costs in report.costs.values())]
    if not names:
        return "No costs were measured."
    rows = []
    for arm, costs in report.costs.items():
        runs = max(cost.expected for cost in costs.values())
        cells = [mean_text(costs[name], _COSTS[name][1]) if name in costs else NONE for name in names]
        rows.append([arm, str(runs), *cells])
    return (
        "Mean ± standard error over all trainings of an arm. B2B and B2I share their trainings, as do I2I and I2B.\n\n"
        + markdown_table(["arm", "trainings", *(_COSTS[name][0] for name in names)], rows)
    )


def _overview(reports: Mapping[str, Report]) -> str:
    rows = []
    for name, report in reports.items():
        means = {standing.arm: _percent(standing["reported/mean"]) for standing in report.table}
        differences = [_interval(comparison.intervals.get("mean")) for comparison in report.comparisons]
        rows.append([name, *(means[arm] for arm in ARMS), *differences])
    return markdown_table(["setting", *ARMS, *(f"{a} − {b}" for a, b in COMPARED)], rows)


def _over_all(reports: Mapping[str, Report], index: int) -> str:
    """In how many settings the one arm is better, in how many the other."""
    a, b = map(in_words, COMPARED[index])
    intervals = {name: report.comparisons[index].intervals.get("mean") for name, report in reports.items()}
    compared = {name: interval for name, interval in intervals.items() if interval is not None}
    groups = {sign: [name for name, interval in compared.items() if interval.sign == sign] for sign in (1, -1, 0)}
    absent = [name for name in reports if name not in compared]

    def told(names: Sequence[str]) -> str:
        return f" ({', '.join(names)})" if names else ""

    text = (
        f"{a} is better than {b} in {len(groups[1])} of {_count(len(compared), 'setting')}{told(groups[1])}, worse in "
        f"{len(groups[-1])}{told(groups[-1])}; no difference can be told in {len(groups[0])}{told(groups[0])}."
    )
    if absent:
        text += f" Not comparable in {len(absent)}{told(absent)}."
    return text + (
        f" By chance alone, about {0.05 * len(compared):.1f} of {len(compared)} intervals of 95 % would leave out zero."
        if len(compared) > 1
        else ""
    )


def _chosen_rate(report: Report, arm: str) -> float | None:
    choice = report.choices.get(arm)
    return choice.best.lr if choice else None


def _spoken_row(standing: Standing) -> str:
    return f"{standing.arm}, untouched" if standing.arm in UNTOUCHED else standing.arm


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _percent(found: Average) -> str:
    return mean_text(found, lambda value: f"{100 * value:.1f}")


def _nats(found: Average) -> str:
    return mean_text(found, lambda value: f"{value:.4f}")


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else NONE


def _points(value: float, *, signed: bool = False) -> str:
    """Percentage points with a true minus sign."""
    if not math.isfinite(value):
        return NONE
    rounded = round(100 * value, 1) + 0.0  # no minus zero
    return (f"{rounded:+.1f}" if signed and rounded else f"{rounded:.1f}").replace("-", "−")


def _interval(found: Interval | None) -> str:
    if found is None:
        return NONE
    return f"{_points(found.difference, signed=True)} ({_points(found.low)} to {_points(found.high)})"


def _rate(lr: float | None) -> str:
    """1.5e-4 rather than 0.00015."""
    if lr is None:
        return NONE
    mantissa, exponent = f"{lr:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
