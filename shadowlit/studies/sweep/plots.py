"""The plots of a sweep: main effects with intervals, how two axes act together, trials while they ran."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shadowlit.plotting import DOUBLE, SEQUENTIAL, SINGLE, hide, panels, series_style, styled
from shadowlit.studies.plots import arm_style, legend_of
from shadowlit.studies.rows import SCALE
from shadowlit.studies.statistics import average
from shadowlit.studies.sweep.table import Level, Table, is_numeric

_HEIGHT = 2.1
_WIDE = 15  # numbers that lie further apart than this factor are drawn on a logarithmic axis


@styled
def main_effects(table: Table, metrics: Sequence[str] | None = None, axes: Sequence[str] | None = None) -> Figure:
    """Plot a panel for each metric and axis: the mean of each arm at each level, with its 95 % interval over seeds.

    Each mean is over the settings that all levels of its axis share. Dashed and dotted lines are the untouched
    Instruct and Base, where they are near. An axis of drawn numbers shows a point for each trial instead.
    Example: ``main_effects(table)``.

    Args:
        table: Table of the sweep.
        metrics: Metrics of the rows; None for those of the report.
        axes: Axes of the columns; None for all with several levels. A single one has its metrics side by side.
    """
    metrics, axes = list(metrics or table.shown()), list(axes or table.varied)
    shown = [(metric, axis) for metric in metrics for axis in axes]
    columns = len(axes) if len(axes) > 1 else min(3, len(metrics))
    width = min(DOUBLE, max(SINGLE, 2.4 * columns))
    figure, found = panels(len(shown), columns, width, _HEIGHT, 0.3, sharey="row" if len(axes) > 1 else False)
    for number, (panel, (metric, axis)) in enumerate(zip(found, shown, strict=True)):
        for arm in table.arms:
            if axis in table.ranges:
                _scatter(panel, table, axis, metric, arm)
            else:
                _line(panel, table.effects(axis, metric, arm), arm)
        _untouched(panel, table, metric)
        if number + columns >= len(shown):
            panel.set_xlabel(_axis_label(table, axis))
        if number % len(axes) == 0:
            panel.set_ylabel(unit(metric))
        panel.grid(True)
    handles, labels = legend_of(found)
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, max(1, len(labels))))
    return figure


@styled
def draw_interaction(
    table: Table, x: str | None = None, y: str | None = None, metric: str | None = None, arm: str | None = None
) -> Figure:
    """Plot how two axes act together: the mean over seeds and the other axes, for each pair of their levels.

    Example: ``draw_interaction(table)``.

    Args:
        table: Table of the sweep.
        x: Axis of the columns; None for the one with the most levels.
        y: Axis of the rows; None for the next.
        metric: Metric to show; None for what trials are judged by.
        arm: Arm to show; None for the first.
    """
    left = [axis for axis in table.axes if axis not in table.ranges and axis not in (x, y)]
    left.sort(key=lambda axis: -len(table.levels(axis)))
    x = x or next(iter(left), None)
    y = y or next((axis for axis in left if axis != x), None)
    if x is None or y is None or not table.arms:
        figure, axes = panels(1, 1, SINGLE, 0.6)
        hide(axes)
        axes[0].set_title("nothing to draw: fewer than two axes of named values, or no trial", fontsize=7)
        return figure
    metric, arm = metric or table.shown()[0], arm or table.arms[0]
    columns = [level.value for level in table.effects(x, metric, arm)]
    rows = [level.value for level in table.effects(y, metric, arm)]
    values = np.full((len(rows), len(columns)), math.nan)
    found_rows = table.rows if SCALE in (x, y) else table.of(arm)
    every = [row for row in found_rows if row.arm == arm and row.state == "complete"]
    for i, of_row in enumerate(rows):
        for j, of_column in enumerate(columns):
            cell = [row.metrics.get(metric, math.nan) for row in every
                    if row.level(y) == of_row and row.level(x) == of_column]  # fmt: skip
            values[i, j] = average(cell).mean
    figure, (panel,) = panels(1, 1, SINGLE, 0.8 + 0.32 * max(4, len(rows)))
    image = panel.imshow(values, cmap=SEQUENTIAL, aspect="auto")
    panel.set_xticks(range(len(columns)), [str(value) for value in columns])
    panel.set_yticks(range(len(rows)), [str(value) for value in rows])
    panel.set_xlabel(_axis_label(table, x))
    panel.set_ylabel(_axis_label(table, y))
    found = values[np.isfinite(values)]
    middle = (found.min() + found.max()) / 2 if len(found) else 0.0
    for i, j in np.ndindex(values.shape):
        if math.isfinite(values[i, j]):
            light = values[i, j] < middle
            panel.text(j, i, f"{values[i, j]:.3g}", ha="center", va="center", color="white" if light else "black")
    figure.colorbar(image, ax=panel, label=f"{unit(metric)}, {arm}")
    return figure


@styled
def trial_curves(curves: Mapping[str, Sequence[tuple[int, float]]], table: Table) -> Figure:
    """Plot the metric that each trial was judged by. Example: ``trial_curves(read_curves(folder), table)``."""
    axis = next((name for name in table.axes if name != SCALE), table.axes[0])
    of_trial = {row.trial: row.level(axis) for row in table.rows}
    levels = list(dict.fromkeys(level for level in of_trial.values() if level is not None))
    figure, (panel,) = panels(1, 1, SINGLE, 2.4)
    if not curves:
        hide([panel])
        panel.set_title("no trial has been measured while it ran")
    for name, points in curves.items():
        level = of_trial.get(name)
        style = series_style(levels.index(level)) if level in levels else {"color": "0.6"}
        label = f"{table.short(axis)} = {level}"
        panel.plot(*zip(*points, strict=True), **style, alpha=0.8, label=label)
    if curves:
        panel.set_xlabel("optimizer steps")
        panel.set_ylabel(unit(table.definition.judged))
        panel.grid(True)
        handles, labels = legend_of([panel])
        panel.legend(handles, labels)
    return figure


def unit(metric: str) -> str:
    """Return a metric as an axis names it, with its unit."""
    what = metric.rpartition("/")[2]
    units = {"loss": "nats per token", "kl": "nats per token", "perplexity": "per token"}
    if what in units:
        return f"{metric} ({units[what]})"
    shares = ("score", "accuracy", "exact", "agreement", "survival", "token_accuracy", "exact_match")
    return f"{metric} (share)" if what in shares else metric


def _untouched(panel: Axes, table: Table, metric: str) -> None:
    """Lines for the untouched models, where they are near enough to leave room for everything else."""
    low, high = panel.dataLim.y0, panel.dataLim.y1
    for untouched, line in (("Instruct", "--"), ("Base", ":")):
        value = table.untouched(untouched, metric)
        if low - (high - low) <= value <= high + (high - low):
            panel.axhline(value, color="0.35", linestyle=line, linewidth=0.9, label=f"{untouched}, untouched")


def _line(panel: Axes, levels: Sequence[Level], arm: str) -> None:
    values = [level.value for level in levels]
    if not values:
        return
    mean = np.array([level.mean for level in levels])
    known = all(math.isfinite(level.low) for level in levels)
    error = None if not known else np.array([[lv.mean - lv.low, lv.high - lv.mean] for lv in levels]).T
    numeric = is_numeric(values)
    places: Any = [float(value) for value in values] if numeric else list(range(len(values)))
    joined: dict[str, Any] = {} if numeric else {"linestyle": "none"}  # between words there is nothing
    panel.errorbar(places, mean, yerr=error, capsize=2, label=arm, **arm_style(arm), **joined)
    if numeric and len(places) > 1 and min(places) > 0 and max(places) / min(places) > _WIDE:
        panel.set_xscale("log")
    if numeric and len(places) <= 8:
        turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if len(places) > 4 else {}
        panel.set_xticks(places, [f"{place:g}" for place in places], **turned)
        panel.minorticks_off()
    elif not numeric:
        panel.set_xticks(places, [str(value) for value in values], rotation=20, ha="right")


def _scatter(panel: Axes, table: Table, axis: str, metric: str, arm: str) -> None:
    points = [(float(level), row.metrics.get(metric, math.nan)) for row in table.of(arm)
              if (level := row.level(axis)) is not None]  # fmt: skip
    if not points:
        return
    style = {**arm_style(arm), "linestyle": "none"}
    panel.plot(*zip(*points, strict=True), **style, alpha=0.8, label=arm)
    limits = next(each.range for each in table.definition.axes if each.name == axis)
    if limits and limits.get("log"):
        panel.set_xscale("log")


def _axis_label(table: Table, axis: str) -> str:
    return "scale λ" if axis == SCALE else table.short(axis).replace("_", " ")
