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
from shadowlit.studies.comparison.summary import FACTS, OVER_INSTRUCT, Report
from shadowlit.studies.plots import COLOURS, MARKERS, arm_style, legend_of
from shadowlit.studies.rows import Row, Standing
from shadowlit.studies.statistics import Average

_SIZES = (4.0, 11.0)  # of the markers of the lowest and the highest rate, in points


def plot_trade(report: Report) -> Figure:
    """What is learned against what is kept: a point for each arm, rate and scale, over seeds.

    A bigger marker is a higher rate; an open one is a scale other than 1; the chosen rate has a ring. If no evaluator
    is named for what is kept, the divergence from the Instruct is drawn instead, downwards.
    """
    figure, (axis,) = panels(1, 1, 7.4, 5.0)
    divergence = next((name for name in report.shown if "kl" in name), None)
    by_keep = bool(report.keep) or divergence is None
    rates = sorted({standing.lr for standing in report.grid if standing.lr is not None})
    for standing in report.grid:
        x = _percent(standing["reported/gain"])
        y = _percent(standing["reported/keep"]) if by_keep else standing[str(divergence)]
        if not (math.isfinite(x.mean) and math.isfinite(y.mean)):
            continue
        size = _size(standing.lr, rates)
        style = {**arm_style(standing.arm), "markersize": size, "elinewidth": 0.8, "alpha": 0.85, "linestyle": "none"}
        if not standing.is_whole:
            style["markerfacecolor"] = "white"
        axis.errorbar(x.mean, y.mean, xerr=_error(x), yerr=_error(y), **style)
        if report.is_chosen(standing):
            axis.plot(x.mean, y.mean, "o", markersize=size + 7, markerfacecolor="none", color="0.35", markeredgewidth=1)
    axis.set_xlabel(
        f"learned: mean of {', '.join(report.gain)} (%)" if report.gain else "nothing to be learned is named"
    )
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
    """The main table as dots with standard errors, by evaluator; the untouched models are lines."""
    names = [*report.evaluators, "mean"]
    figure, (axis,) = panels(1, 1, max(5.0, 1.6 + 1.25 * len(names)), 3.8)
    for standing in report.table:
        means = [standing[f"reported/{name}/score"] for name in report.evaluators] + [standing["reported/mean"]]
        cells = [_percent(mean) for mean in means]
        colour = COLOURS[standing.arm]
        for i, cell in enumerate(cells):
            if standing.arm in UNTOUCHED:
                style = "--" if standing.arm == "Instruct" else ":"
                axis.hlines(cell.mean, i - 0.4, i + 0.4, color=colour, linestyle=style, linewidth=1.4)
            else:
                place = i + 0.17 * (TUNED.index(standing.arm) - 1.5)
                marker = MARKERS[standing.arm]
                axis.errorbar(place, cell.mean, yerr=_error(cell), fmt=marker, color=colour, markersize=6, capsize=2)
    axis.set_xticks(range(len(names)), names)
    axis.axvline(len(names) - 1.5, color="0.8", linewidth=0.8)
    axis.set_ylabel("score on the reported half (%)")
    axis.set_ylim(-3, 103)
    axis.grid(axis="y", alpha=0.25)
    handles = [_handle(arm) for arm in TUNED]
    handles += [
        Line2D([], [], color=COLOURS["Instruct"], linestyle="--", label="Instruct, untouched"),
        Line2D([], [], color=COLOURS["Base"], linestyle=":", label="Base, untouched"),
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def plot_predicting(
    predictions: Mapping[str, Sequence[Row]], lines: Sequence[Standing] = (), scales: Sequence[float] = ()
) -> Figure:
    """Plot what was known about a graft against what it gained, by setting; a single setting has no legend.

    Standings with losses at these scales, on the line to the graft, get a panel for each arm.
    """
    arms = list(dict.fromkeys(line.arm for line in lines))
    columns = 3 if arms else 2
    figure, axes = panels(len(FACTS) + len(arms), columns, 3.7 * columns, 3.1)
    palette = list(COLOURS.values())
    for axis, (fact, words) in zip(axes, FACTS.items(), strict=False):
        for i, (setting, found) in enumerate(predictions.items()):
            points = [(row.facts.get(fact, math.nan), 100 * row.metrics[OVER_INSTRUCT]) for row in found]
            points = [point for point in points if all(map(math.isfinite, point))]
            if points:
                marker = list(MARKERS.values())[(i // len(palette)) % len(MARKERS)] if len(predictions) > 1 else "o"
                colour = palette[i % len(palette)] if len(predictions) > 1 else COLOURS["B2I"]
                known, gains = zip(*points, strict=True)
                axis.scatter(known, gains, s=22, color=colour, marker=marker, alpha=0.8, label=setting)
        if not axis.collections:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.4")
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xlabel(words)
        axis.set_ylabel("B2I − Instruct (points)")
        axis.grid(alpha=0.25)
    for axis, arm in zip(axes[len(FACTS) :], arms, strict=False):
        _draw_lines(axis, [line for line in lines if line.arm == arm], scales)
    if len(predictions) > 1:
        handles, labels = legend_of(axes[: len(FACTS)])
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


def _percent(found: Average) -> Average:
    return Average(100 * found.mean, 100 * found.standard_error, found.count, found.expected)


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
