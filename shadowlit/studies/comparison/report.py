"""The report of a comparison: Markdown, CSV and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shadowlit.errors import counted
from shadowlit.studies.arms import TUNED, UNTOUCHED
from shadowlit.studies.comparison.plots import drawable, plot_predicting, plot_table, plot_trade
from shadowlit.studies.comparison.scoring import SHARE, Measure
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
    "Spearman's rank correlation with the gain of B2I (mean score minus the untouched Instruct's, reported rows), over "
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
    """Write ``table.csv``, the plots ``trade``, ``table`` and ``predicting``, and at last ``REPORT.md``.

    A plot that would show fewer than two points is left out.
    """
    draw = {
        "trade": lambda: plot_trade(report),
        "table": lambda: plot_table(report),
        "predicting": lambda: plot_predicting(
            {report.description.title: report.predictions}, report.lines, report.line_scales, report.scoring.whole
        ),
    }
    shown = drawable(report)
    figures = {stem: figure() if stem in shown else None for stem, figure in draw.items()}
    return write_files(folder, render(report), report.rows, (LR,), figures)


def render(report: Report, *, level: int = 1, plots: str = "") -> str:
    """Return a report as Markdown, with a title of this level; ``plots`` is a prefix of the names of its plots."""
    sub, shown = "#" * (level + 1), drawable(report)

    def plot(title: str, stem: str) -> str:
        return f"\n\n![{title}]({plots}{stem}.png)" if stem in shown else ""

    parts = [
        f"{'#' * level} {report.description.title}",
        origin(report.description),
        _legend(report),
        f"{sub} What the data say\n\n{_statements(report)}",
        f"{sub} Each arm at its chosen rate\n\n{_main_table(report)}{plot('scores', 'table')}",
        f"{sub} Paired differences\n\n{_differences(report)}",
        f"{sub} All rates\n\n{_rates(report)}\n\n{_scales(report)}",
        f"{sub} What is learned and what is kept\n\n{_trade_words(report)}{plot('trade-off', 'trade')}",
        f"{sub} What might predict the gain\n\n{_predicting(report)}{plot('predictors', 'predicting')}",
        f"{sub} The line to the graft\n\n{_line_table(report)}",
        f"{sub} Cost\n\n{_cost_table(report)}",
        f"{sub} To be kept in mind\n\n{bullets(report.notes)}",
        f"{sub} Missing\n\n{bullets(report.missing) or 'Nothing.'}",
    ]
    return paragraphs(parts)


def sentence(comparison: Comparison, interval: Interval | None, names: Sequence[str], measure: Measure = SHARE) -> str:
    """Return what the data support about two arms, by rule: an arm is better only if the whole interval lies on its
    side.

    The interval is one of the comparison's, over these scores, which ``measure`` says how to read; None if the arms
    can't be compared.
    """
    a, b = in_words(comparison.a), in_words(comparison.b)
    if interval is None:
        return f"{a} and {b} can't be compared: {comparison.reason}."
    where = names[0] if len(names) == 1 else f"the mean of {_listed(names)}"
    told = -interval if interval.sign < 0 else interval
    seeds = counted(interval.num_seeds, "seed")
    if interval.num_seeds < comparison.num_expected:
        seeds = f"{interval.num_seeds} of {counted(comparison.num_expected, 'seed')}"
    measured = f"{seeds}, {counted(interval.num_rows, 'row')}" if interval.num_rows else seeds
    extent = f"({_extent(told, measure)}, {measured})"
    alone = " With one seed, this says nothing of other trainings." if interval.num_seeds == 1 else ""
    unit = {"share": " points", "nats": " nats", "number": ""}[measure.unit]
    if interval.sign == 0:
        no_difference = f"No difference between {a} and {b} could be shown on {where}"
        return f"{no_difference}: {_difference(told.difference, measure, signed=True)}{unit} {extent}.{alone}"
    better, worse = (a, b) if interval.sign == measure.sign else (b, a)
    better = better[0].upper() + better[1:]
    return (
        f"{better} is better than {worse} on {where} by {_difference(told.difference, measure)}{unit} {extent}.{alone}"
    )


def _extent(interval: Interval, measure: Measure) -> str:
    """What is known of where a difference lies."""
    if math.isnan(interval.low):
        return "no interval: nothing is known of rows"
    if interval.is_degenerate:
        return f"no interval: no spread between {_without_spread(interval)}"
    ends = f"{_difference(interval.low, measure)} to {_difference(interval.high, measure)}"
    return f"{'exact ' if interval.exact else ''}95 % CI {ends}"


def _without_spread(interval: Interval) -> str:
    parts = ["seeds"] * (interval.num_seeds > 1) + ["rows"] * (interval.num_rows > 0)
    return " or ".join(parts)


def origin(description: Description) -> str:
    """Configuration and command, as paragraphs."""
    lines = [f"Configuration: `{description.config}`"] if description.config else []
    lines += [f"Made by: `{description.command}`"] if description.command else []
    return "\n\n".join(lines)


def _legend(report: Report) -> str:
    scoring, rows = report.scoring, ""
    text = (
        "An arm is named by the source of its delta and the target of the graft: B2I is Shadow-FT, I2I the directly "
        "tuned Instruct, B2B the tuned Base, I2B the Instruct's update on the Base. "
    )
    if report.num_rows:
        counts = (f"{name} {selection} + {reported}" for name, (selection, reported) in report.num_rows.items())
        rows = f" Rows for the choice + reported: {', '.join(counts)}."
    if not scoring.metrics and not scoring.choose:
        return text + (
            "Each arm's learning rate is the one with the best mean score on one half of the rows, drawn by a "
            f"hash of their positions; scores are of the other half.{rows}"
        )
    by, way = scoring.choose or scoring.mean, "highest" if scoring.choice.higher else "lowest"
    chosen = next(iter(by)) if len(by) == 1 else f"mean of {_listed(list(by))}"
    text += f"Each arm's learning rate is the one with the {way} {chosen}, over seeds. "
    if scoring.metrics:
        read = ", ".join(
            f"{name} ({'higher' if m.higher else 'lower'} is better)" for name, m in scoring.metrics.items()
        )
        text += f"Scores are metrics of the last validation, each of the arm's own model: {read}."
    if scoring.evaluators:
        text += " Evaluators have the scores of one half of their rows, drawn by a hash of their positions."
    if scoring.sharing:
        text += f" The choice and {' and '.join(scoring.sharing)} share rows: the reported scores flatter the arms."
    return text + rows


def _statements(report: Report) -> str:
    lines = []
    scoring, groups = report.scoring, report.scoring.groups
    for comparison in report.comparisons:
        found = comparison.intervals
        lines.append(f"- {sentence(comparison, found.get('mean'), scoring.mean, scoring.whole)}")
        kinds = []
        if found and report.gain and report.keep:
            kinds = [("Learned", "gain"), ("Kept", "keep")]
        others = [name for name in scoring.metrics if name not in scoring.mean] if found else []
        for words, what in [*kinds, *((name, f"{name}/score") for name in others)]:
            told = sentence(comparison, found[what], groups[what], scoring.measure_of(what))
            lines.append(f"  - {words}: {told}")
    compared = {arm for pair in COMPARED for arm in pair}
    edges = [choice.note for arm, choice in report.choices.items() if choice.edge and arm in compared]
    return "\n".join(lines + [f"- {note}" for note in edges]) or "No two arms that were asked for are compared."


def _main_table(report: Report) -> str:
    scoring = report.scoring
    columns = _columns(report)
    rows = []
    for standing in report.table:
        cells = (score_text(standing[f"reported/{what}"], scoring.measure_of(what)) for what in columns)
        rows.append([_spoken_row(standing), _rate(standing.lr), *cells])
    table = markdown_table(["model", "lr", *columns.values()], rows)
    parts = [f"{_units(report)}, mean ± standard error over seeds.\n\n{table}"]
    metrics = report.shown
    if metrics:
        rows = [
            [_spoken_row(standing), _rate(standing.lr), *(_nats(standing[name]) for name in metrics)]
            for standing in report.table
        ]
        chosen = [name for name in metrics if name in scoring.choose]
        parts.append(
            "Divergences and losses in nats per token, of all rows: "
            + (f"only {_listed(chosen)} chooses.\n\n" if chosen else "nothing is chosen by them.\n\n")
            + markdown_table(["model", "lr", *metrics], rows)
        )
    return "\n\n".join(parts)


def _columns(report: Report) -> dict[str, str]:
    """Kinds of scores, and the headings of their columns: each score, and their mean if there are several."""
    return {f"{name}/score": name for name in report.scores} | {"mean": _mean_words(report)}


def _mean_words(report: Report) -> str:
    mean = report.scoring.mean
    whole = set(mean) | report.scoring.forgetting
    return "mean" if set(report.scores) <= whole else f"mean of {', '.join(mean)}"


def _units(report: Report) -> str:
    units = {report.scoring.measure(name).unit for name in report.scores}
    named = {"share": "shares in %", "nats": "losses in nats per token", "number": "others as they are"}
    if units == {"share"}:
        return "Scores in %"
    return "Scores (" + ", ".join(words for unit, words in named.items() if unit in units) + ")"


def _differences(report: Report) -> str:
    columns = _columns(report)
    if report.gain and report.keep:
        columns |= {"gain": "learned", "keep": "kept"}
    rows = [
        [
            f"{c.a} − {c.b}",
            *(interval_text(c.intervals.get(what), report.scoring.measure_of(what)) for what in columns),
        ]
        for c in report.comparisons
    ]
    of_metrics = (
        ""
        if not report.scoring.metrics
        else (" A metric of whose rows nothing is known has an interval over seeds alone. Below 0, a loss is better.")
    )
    points = "Points" if not report.scoring.metrics else "Points, for losses nats per token"
    return (
        f"{points}, with the 95 % interval of a paired bootstrap over rows and Student's t over seeds.{of_metrics}\n\n"
        + markdown_table(["difference", *columns.values()], rows)
        + "\n\nThe intervals of several evaluators are not corrected for their number."
    )


def _rates(report: Report) -> str:
    scoring = report.scoring
    measures = [scoring.choice, scoring.whole, scoring.measure_of("gain"), scoring.measure_of("keep")]
    rows = []
    for standing in report.grid:
        if standing.arm in TUNED and standing.is_whole:
            chosen = "chosen" if report.is_chosen(standing) else ""
            means = (score_text(standing[mean], measure) for mean, measure in zip(_MEANS, measures, strict=True))
            rows.append([standing.arm, _rate(standing.lr), *means, chosen])
    absent = [arm for arm in report.arms if arm in TUNED and arm not in report.choices]
    rows += [[arm, *[NONE] * 5, "no training"] for arm in absent]
    header = ["arm", "lr", *_halves(report), "learned", "kept", ""]
    return f"Scale 1; learned and kept are of the reported {_rows_words(report)}.\n\n" + markdown_table(header, rows)


def _rows_words(report: Report) -> str:
    return "half" if report.scoring.evaluators == report.scores else "rows"


def _halves(report: Report) -> tuple[str, str]:
    """Headings of the mean that chooses, and of the one that is reported."""
    if report.scoring.evaluators == report.scores and not report.scoring.choose:
        return "mean, selection half", "mean, reported half"
    by = report.scoring.choose or report.scoring.mean
    return f"chosen by: {', '.join(by)}", f"reported: {', '.join(report.scoring.mean)}"


def _scales(report: Report) -> str:
    if not report.best_scales:
        return "No arm was scored at several scales."
    rows, scoring = [], report.scoring
    for arm, best in report.best_scales.items():
        at_one = next(standing["reported/mean"] for standing in report.table if standing.arm == arm)
        scale = NONE if best.scale is None else f"{best.scale:g}"
        means = [score_text(best["selection/mean"], scoring.choice)]
        means += [score_text(mean, scoring.whole) for mean in (best["reported/mean"], at_one)]
        rows.append([arm, _rate(best.lr), scale, *means])
    header = ["arm", "lr", "scale", *_halves(report), "the same at scale 1"]
    same = "" if scoring.sharing or _rows_words(report) == "rows" else " and on the same half"
    return (
        f"With the scale chosen as well, together with the rate{same}; an arm that has scales to choose "
        "from has more chances than one that has none.\n\n" + markdown_table(header, rows)
    )


def _trade_words(report: Report) -> str:
    if "trade" not in drawable(report):
        return "What is learned and what is kept are known together of fewer than two models: nothing is drawn."
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
    rows, measure = [], report.scoring.whole
    for each in report.predictions:
        known = [each.facts.get(fact, math.nan) for fact in FACTS]
        facts = [f"{value:.4g}" if math.isfinite(value) else NONE for value in known]
        gain = _difference(each.metrics[OVER_INSTRUCT], measure, signed=True)
        rows.append([_rate(each.lr), str(each.seed), *facts, gain])
    unit = {"share": " (points)", "nats": " (nats)", "number": ""}[measure.unit]
    return text + markdown_table(["lr", "seed", *FACTS.values(), f"gain{unit}"], rows)


def correlation_row(found: Mapping[str, Correlation], fact: str) -> list[str]:
    """Return the cells under :data:`CORRELATION`."""
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
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def score_text(found: Average, measure: Measure = SHARE) -> str:
    """Return a mean score with its standard error; a share in per cent."""
    return mean_text(found, lambda value: f"{100 * value:.1f}" if measure.unit == "share" else f"{value:.4f}")


def _nats(found: Average) -> str:
    return score_text(found, Measure(unit="nats"))


def _difference(value: float, measure: Measure = SHARE, *, signed: bool = False) -> str:
    """A difference with a true minus sign; of shares in percentage points."""
    if not math.isfinite(value):
        return NONE
    scaled, digits = (100 * value, 1) if measure.unit == "share" else (value, 4)
    rounded = round(scaled, digits) + 0.0  # no minus zero
    return (f"{rounded:+.{digits}f}" if signed and rounded else f"{rounded:.{digits}f}").replace("-", "−")


def interval_text(found: Interval | None, measure: Measure = SHARE) -> str:
    """Return a difference with the ends of its interval; of shares in points."""
    if found is None:
        return NONE
    difference = _difference(found.difference, measure, signed=True)
    if math.isnan(found.low):
        return difference
    if found.is_degenerate:
        return f"{difference} (no spread between {_without_spread(found)})"
    ends = f"{_difference(found.low, measure)} to {_difference(found.high, measure)}"
    return f"{difference} ({'exact: ' if found.exact else ''}{ends})"


def _rate(lr: float | None) -> str:
    """1.5e-4 rather than 0.00015."""
    if lr is None:
        return NONE
    mantissa, exponent = f"{lr:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
