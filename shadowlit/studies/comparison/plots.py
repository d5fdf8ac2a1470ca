"""The plots of a comparison; what is missing is left out, never drawn as a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from shadowlit.plotting import panels
from shadowlit.studies.arms import ARMS, TUNED, UNTOUCHED
from shadowlit.studies.comparison.scoring import SHARE, Measure
from shadowlit.studies.comparison.summary import FACTS, OVER_INSTRUCT, Report
from shadowlit.studies.plots import COLOURS, MARKERS, arm_style, legend_of
from shadowlit.studies.rows import Row, Standing
from shadowlit.studies.statistics import Average

_UNITS = {"share": "%", "nats": "nats per token", "number": "as it is"}
_SIZES = (4.0, 11.0)  # of the markers of the lowest and the highest rate, in points


def drawable(report: Report) -> list[str]:
    """Stems of the plots that have at least two points to show."""
    panels_of_facts = facts_shown({"": report.predictions})
    found = {
        "trade": len(_trade_points(report)) > 1,
        "table": sum(math.isfinite(standing["reported/mean"].mean) for standing in report.table) > 1,
        "predicting": bool(panels_of_facts or _lines_shown(report.lines, report.line_scales)),
    }
    return [stem for stem, is_shown in found.items() if is_shown]


def _trade_points(report: Report) -> list[tuple[Standing, Average, Average]]:
    """What is learned and what is kept, of each standing of which both are known."""
    by_keep, divergence = _kept_by(report)
    points = []
    for standing in report.grid:
        y = _scaled(standing["reported/keep"], SHARE) if by_keep else standing[divergence]
        x = _scaled(standing["reported/gain"], report.scoring.measure_of("gain"))
        if math.isfinite(x.mean) and math.isfinite(y.mean):
            points.append((standing, x, y))
    return points


def _kept_by(report: Report) -> tuple[bool, str]:
    """Whether evaluators say what is kept; otherwise the name of the divergence that does."""
    divergence = next((name for name in report.shown if "kl" in name), "")
    return bool(report.keep) or not divergence, divergence


def plot_trade(report: Report) -> Figure:
    """Plot what is learned against what is kept: a point for each arm, rate and scale, over seeds.

    A bigger marker is a higher rate; an open one is a scale other than 1; the chosen rate has a ring. If no evaluator
    is named for what is kept, the divergence from the Instruct is drawn instead, downwards. A loss is drawn leftwards:
    further to the right is better.
    """
    figure, (axis,) = panels(1, 1, 7.4, 5.0)
    by_keep, divergence = _kept_by(report)
    rates = sorted({standing.lr for standing in report.grid if standing.lr is not None})
    for standing, x, y in _trade_points(report):
        size = _size(standing.lr, rates)
        style = {**arm_style(standing.arm), "markersize": size, "elinewidth": 0.8, "alpha": 0.85, "linestyle": "none"}
        if not standing.is_whole:
            style["markerfacecolor"] = "white"
        axis.errorbar(x.mean, y.mean, xerr=_error(x), yerr=_error(y), **style)
        if report.is_chosen(standing):
            axis.plot(x.mean, y.mean, "o", markersize=size + 7, markerfacecolor="none", color="0.35", markeredgewidth=1)
    measure, names = report.scoring.measure_of("gain"), report.scoring.groups.get("gain", ())
    what = names[0] if len(names) == 1 else f"mean of {', '.join(names)}"
    axis.set_xlabel(f"learned: {what} ({_UNITS[measure.unit]})" if names else "nothing to be learned is named")
    if not measure.higher:
        axis.invert_xaxis()
    if by_keep:
        axis.set_ylabel(
            f"kept: mean of {', '.join(report.keep)} (%)" if report.keep else "nothing to be kept is measured"
        )
    else:
        axis.set_ylabel(f"{divergence} (nats per token), less is better")
        axis.invert_yaxis()
    axis.grid(alpha=0.25)
    handles = [_handle(arm) for arm in ARMS if any(standing.arm == arm for standing in report.grid)]
    if rates:
        ends = dict.fromkeys((rates[0], rates[-1]))
        handles += [_grey(f"lr {rate:g}", markersize=_size(rate, rates)) for rate in ends]
    if any(not standing.is_whole for standing in report.grid):
        handles.append(_grey("scale ≠ 1", markerfacecolor="white"))
    handles.append(_grey("chosen", markersize=11, markerfacecolor="none"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def plot_table(report: Report) -> Figure:
    """Plot the main table as dots with standard errors, by score; the untouched models are lines. A panel for each
    unit.
    """
    scoring = report.scoring
    measures = list(dict.fromkeys(map(scoring.measure, report.scores)))
    columns = {measure: [name for name in report.scores if scoring.measure(name) == measure] for measure in measures}
    names = {measure: [f"{name}/score" for name in found] for measure, found in columns.items()}
    names[scoring.whole].append("mean")
    count = sum(map(len, names.values()))
    figure, axes = panels(
        len(measures), len(measures), max(5.0, 1.6 + 1.25 * count), 3.8, width_ratios=[len(n) for n in names.values()]
    )
    for axis, (measure, kinds) in zip(axes, names.items(), strict=True):
        _draw_table(axis, report, measure, kinds)
    handles = [_handle(arm) for arm in report.arms if arm in TUNED]
    handles += [
        Line2D([], [], color=COLOURS["Instruct"], linestyle="--", label="Instruct, untouched"),
        Line2D([], [], color=COLOURS["Base"], linestyle=":", label="Base, untouched"),
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _draw_table(axis: Axes, report: Report, measure: Measure, kinds: Sequence[str]) -> None:
    """The scores of one unit; ``mean`` is the last of them where they are averaged."""
    for standing in report.table:
        cells = [_scaled(standing[f"reported/{kind}"], measure) for kind in kinds]
        colour = COLOURS[standing.arm]
        for i, cell in enumerate(cells):
            if standing.arm in UNTOUCHED:
                style = "--" if standing.arm == "Instruct" else ":"
                axis.hlines(cell.mean, i - 0.4, i + 0.4, color=colour, linestyle=style, linewidth=1.4)
            else:
                place = i + 0.17 * (TUNED.index(standing.arm) - 1.5)
                marker = MARKERS[standing.arm]
                axis.errorbar(place, cell.mean, yerr=_error(cell), fmt=marker, color=colour, markersize=6, capsize=2)
    axis.set_xticks(range(len(kinds)), [kind.removesuffix("/score") for kind in kinds])
    if kinds[-1] == "mean":
        axis.axvline(len(kinds) - 1.5, color="0.8", linewidth=0.8)
    if measure.unit == "share":
        where = "half" if report.scoring.evaluators == report.scores else "rows"
        axis.set_ylabel(f"score on the reported {where} (%)")
        axis.set_ylim(-3, 103)
    else:
        axis.set_ylabel(f"score ({_UNITS[measure.unit]}), {'more' if measure.higher else 'less'} is better")
    axis.grid(axis="y", alpha=0.25)


def facts_shown(predictions: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return the facts that are known together with the gains of at least two grafts."""
    rows = [row for found in predictions.values() for row in found]
    return [fact for fact in FACTS if sum(len(_fact_points([row], fact)) for row in rows) > 1]


def _fact_points(rows: Sequence[Row], fact: str, factor: float = 1.0) -> list[tuple[float, float]]:
    points = [(row.facts.get(fact, math.nan), factor * row.metrics[OVER_INSTRUCT]) for row in rows]
    return [point for point in points if all(map(math.isfinite, point))]


def _lines_shown(lines: Sequence[Standing], scales: Sequence[float]) -> list[Standing]:
    """The standings with losses at two scales at least."""
    return [s for s in lines if sum(math.isfinite(s[f"line/{scale:g}"].mean) for scale in scales) > 1]


def plot_predicting(
    predictions: Mapping[str, Sequence[Row]],
    lines: Sequence[Standing] = (),
    scales: Sequence[float] = (),
    measure: Measure = SHARE,
) -> Figure:
    """Plot what was known about a graft against what it gained, by setting; a single setting has no legend.

    Standings with losses at these scales, on the line to the graft, get a panel for each arm. Facts of which fewer than
    two points are known have no panel. ``measure`` is that of the gain.
    """
    facts, lines = facts_shown(predictions), _lines_shown(lines, scales)
    arms = list(dict.fromkeys(line.arm for line in lines))
    columns = min(3 if arms else 2, len(facts) + len(arms))
    figure, axes = panels(len(facts) + len(arms), columns, 3.7 * columns, 3.1)
    palette = list(COLOURS.values())
    factor, unit = (100, " (points)") if measure.unit == "share" else (1, "")
    for axis, fact in zip(axes, facts, strict=False):
        for i, (setting, found) in enumerate(predictions.items()):
            if points := _fact_points(found, fact, factor):
                marker = list(MARKERS.values())[(i // len(palette)) % len(MARKERS)] if len(predictions) > 1 else "o"
                colour = palette[i % len(palette)] if len(predictions) > 1 else COLOURS["B2I"]
                known, gains = zip(*points, strict=True)
                axis.scatter(known, gains, s=22, color=colour, marker=marker, alpha=0.8, label=setting)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xlabel(FACTS[fact])
        axis.set_ylabel(f"B2I − Instruct{unit}" if measure.higher else f"Instruct − B2I{unit}")
        axis.grid(alpha=0.25)
    for axis, arm in zip(axes[len(facts) :], arms, strict=False):
        _draw_lines(axis, [line for line in lines if line.arm == arm], scales)
    if len(predictions) > 1:
        handles, labels = legend_of(axes[: len(facts)])
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _draw_lines(axis: Axes, lines: Sequence[Standing], scales: Sequence[float]) -> None:
    colours = matplotlib.colormaps["viridis"]
    for i, line in enumerate(lines):
        losses = {scale: line[f"line/{scale:g}"].mean for scale in scales}
        points = [point for point in losses.items() if math.isfinite(point[1])]
        colour = colours(0.9 * i / max(1, len(lines) - 1))
        axis.plot(*zip(*points, strict=True), marker=".", color=colour, label=f"lr {line.lr:g}")
    axis.set_title(f"{'Instruct' if lines[0].arm[-1] == 'I' else 'Base'} → {lines[0].arm}", fontsize="medium")
    axis.set_xlabel("scale λ")
    axis.set_ylabel("validation loss (nats)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small", frameon=False)


def _scaled(found: Average, measure: Measure) -> Average:
    """In per cent, where it is a share."""
    factor = 100 if measure.unit == "share" else 1
    return Average(factor * found.mean, factor * found.standard_error, found.count, found.expected)


def _error(found: Average) -> float | None:
    return found.standard_error if math.isfinite(found.standard_error) else None


def _size(rate: float | None, rates: Sequence[float]) -> float:
    if rate is None:
        return 9.0
    low, high = _SIZES
    return low + (high - low) * (rates.index(rate) / (len(rates) - 1) if len(rates) > 1 else 0.5)


def _handle(arm: str) -> Line2D:
    label = f"{arm}, untouched" if arm in UNTOUCHED else arm
    return Line2D([], [], linestyle="", **arm_style(arm), markersize=7, label=label)


def _grey(label: str, **style: Any) -> Line2D:
    return Line2D([], [], linestyle="", marker="o", color="0.5", label=label, **style)
