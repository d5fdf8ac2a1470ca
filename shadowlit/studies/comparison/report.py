"""The report of a comparison: Markdown, CSV and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shadowlit.errors import counted
from shadowlit.studies.arms import TUNED, UNTOUCHED
from shadowlit.studies.comparison.plots import plot_predicting, plot_table, plot_trade
from shadowlit.studies.comparison.summary import (
    COMPARED,
    FACTS,
    OVER_INSTRUCT,
    Comparison,
    Description,
    Report,
    in_words,
)
from shadowlit.studies.report import NONE, bullets, markdown_table, mean_text, paragraphs, write_files
from shadowlit.studies.rows import LR, Standing
from shadowlit.studies.statistics import Average, Correlation, Interval

CORRELATED = (
    "Spearman's rank correlation with the gain of B2I (mean score minus the untouched Instruct's, reported half), over "
    "all rates and seeds."
)
CORRELATION = ("known", "ρ", "n", "values", "caution")
_MEANS = ("selection/mean", "reported/mean", "reported/gain", "reported/keep")
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "train_s": ("training (s)", lambda value: f"{value:.1f}"),
    "evaluation_s": ("evaluation (s)", lambda value: f"{value:.1f}"),
    "tokens_per_s": ("tokens per s", lambda value: f"{value:,.0f}"),
    "peak_memory_bytes": ("peak memory (MiB)", lambda value: f"{value / 2**20:,.0f}"),
    "trained_parameters": ("trained parameters", lambda value: f"{value:,.0f}"),
}


def write(report: Report, folder: Path) -> Path:
    """Write ``table.csv``, the plots ``trade``, ``table`` and ``predicting``, and at last ``REPORT.md``."""
    figures = {
        "trade": plot_trade(report),
        "table": plot_table(report),
        "predicting": plot_predicting({report.description.title: report.predictions}, report.lines, report.line_scales),
    }
    return write_files(folder, render(report), report.rows, (LR,), figures)


def render(report: Report, *, level: int = 1, plots: str = "") -> str:
    """A report as Markdown, with a title of this level; ``plots`` is a prefix of the names of its plots."""
    sub = "#" * (level + 1)
    parts = [
        f"{'#' * level} {report.description.title}",
        origin(report.description),
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


def sentence(comparison: Comparison, interval: Interval | None, evaluators: Sequence[str]) -> str:
    """What the data support about two arms, by rule: an arm is better only if the whole interval lies on its side.

    The interval is one of the comparison's, over these evaluators; None if the arms can't be compared.
    """
    a, b = in_words(comparison.a), in_words(comparison.b)
    if interval is None:
        return f"{a} and {b} can't be compared: {comparison.reason}."
    where = evaluators[0] if len(evaluators) == 1 else f"the mean of {_listed(evaluators)}"
    told = -interval if interval.sign < 0 else interval
    seeds = counted(interval.num_seeds, "seed")
    if interval.num_seeds < comparison.num_expected:
        seeds = f"{interval.num_seeds} of {counted(comparison.num_expected, 'seed')}"
    extent = f"(95 % CI {_points(told.low)} to {_points(told.high)}, {seeds}, {counted(interval.num_rows, 'row')})"
    alone = " With one seed, this says nothing of other trainings." if interval.num_seeds == 1 else ""
    if interval.sign == 0:
        no_difference = f"No difference between {a} and {b} could be shown on {where}"
        return f"{no_difference}: {_points(told.difference, signed=True)} points {extent}.{alone}"
    better, worse = (a, b) if interval.sign > 0 else (b, a)
    better = better[0].upper() + better[1:]
    return f"{better} is better than {worse} on {where} by {_points(told.difference)} points {extent}.{alone}"


def origin(description: Description) -> str:
    """Configuration and command, as paragraphs."""
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
        rows.append([_spoken_row(standing), _rate(standing.lr), *map(percent, means)])
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
    rows = [[f"{c.a} − {c.b}", *(interval_text(c.intervals.get(what)) for what in columns)] for c in report.comparisons]
    return (
        "Points, with the 95 % interval of a paired bootstrap over rows and Student's t over seeds.\n\n"
        + markdown_table(["difference", *columns.values()], rows)
        + "\n\nThe intervals of several evaluators are not corrected for their number."
    )


def _rates(report: Report) -> str:
    rows = []
    for standing in report.grid:
        if standing.arm in TUNED and standing.is_whole:
            chosen = "chosen" if report.is_chosen(standing) else ""
            rows.append([standing.arm, _rate(standing.lr), *(percent(standing[mean]) for mean in _MEANS), chosen])
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
        rows.append([arm, _rate(best.lr), scale, *map(percent, means)])
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
    rows = [correlation_row(report.correlations, fact) for fact in FACTS]
    text = (
        f"{CORRELATED} The runs share one pair, its rows and a few rates: such a correlation mostly says what the "
        f"rate does.\n\n{markdown_table(CORRELATION, rows)}\n\n"
    )
    if not report.predictions:
        return text + "No graft of B2I at scale 1 is finished."
    rows = []
    for each in report.predictions:
        known = [each.facts.get(fact, math.nan) for fact in FACTS]
        facts = [f"{value:.4g}" if math.isfinite(value) else NONE for value in known]
        rows.append([_rate(each.lr), str(each.seed), *facts, _points(each.metrics[OVER_INSTRUCT], signed=True)])
    return text + markdown_table(["lr", "seed", *FACTS.values(), "gain (points)"], rows)


def correlation_row(found: Mapping[str, Correlation], fact: str) -> list[str]:
    """The cells under :data:`CORRELATION`."""
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


def _spoken_row(standing: Standing) -> str:
    return f"{standing.arm}, untouched" if standing.arm in UNTOUCHED else standing.arm


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def percent(found: Average) -> str:
    """A mean score in per cent, with its standard error."""
    return mean_text(found, lambda value: f"{100 * value:.1f}")


def _nats(found: Average) -> str:
    return mean_text(found, lambda value: f"{value:.4f}")


def _points(value: float, *, signed: bool = False) -> str:
    """Percentage points with a true minus sign."""
    if not math.isfinite(value):
        return NONE
    rounded = round(100 * value, 1) + 0.0  # no minus zero
    return (f"{rounded:+.1f}" if signed and rounded else f"{rounded:.1f}").replace("-", "−")


def interval_text(found: Interval | None) -> str:
    """A difference in points with the ends of its interval."""
    if found is None:
        return NONE
    return f"{_points(found.difference, signed=True)} ({_points(found.low)} to {_points(found.high)})"


def _rate(lr: float | None) -> str:
    """1.5e-4 rather than 0.00015."""
    if lr is None:
        return NONE
    mantissa, exponent = f"{lr:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
