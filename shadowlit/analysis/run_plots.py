"""Plots of a run: the four models, the gain, what survives, what is forgotten, scores.

Where a run has not logged what a plot needs, a message takes its place: measuring less is not an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shadowlit.analysis.curves import draw_curves, draw_subjects
from shadowlit.analysis.run import Points, Run
from shadowlit.plotting import DOUBLE, OKABE_ITO, SEQUENTIAL, SINGLE, message, panels, series_style, steps_axis, styled

_WIDE = 20


@styled
def four_curves(run: Run, whats: Sequence[str] = ("loss", "accuracy"), sets: Sequence[str] | None = None) -> Figure:
    """Plot validation metrics of the tuned Base and the grafted Instruct over the steps, the untouched models as lines.

    Example: ``four_curves(run, ["loss"])``.

    Args:
        run: Result of :func:`shadowlit.analysis.run.read_run`.
        whats: ``loss``, ``perplexity``, ``accuracy``, ``sequence_accuracy``: a row of panels each.
        sets: Names of validation sets, a column each; None for all of the run's; "" for all together.
    """
    chosen = list(sets if sets is not None else run.sets or [""])
    width = min(DOUBLE, max(SINGLE, 2.3 * len(chosen)))
    figure, axes = panels(len(whats) * len(chosen), len(chosen), width, 1.75, 0.45)
    if not draw_curves(axes, run.series, chosen, whats):
        return _nothing(run, f"val/…/{whats[0]}")
    for axis in axes[: len(chosen) * sum(what == "loss" for what in whats[:1])]:
        _log_if_wide(axis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 if width < 6 else 4)
    return figure


@styled
def gains(run: Run) -> Figure:
    """Plot how much better the grafted Instruct is than the untouched one, in loss and scores.
    Example: ``gains(run)``.
    """
    losses = {
        name or "all sets": run.gain(f"{name}/loss" if name else "loss") for name in dict.fromkeys(["", *run.sets])
    }
    by_score = {name: run.gain(f"{name}/score") for name in run.evaluators if name not in run.divergences}
    groups = [(losses, "gain in loss (nats per token)"), (by_score, "gain in score")]
    groups = [(lines, label) for lines, label in groups if any(lines.values())]
    if not groups:
        return _nothing(run, "val/grafted/loss with val/instruct/loss")
    figure, axes = panels(len(groups), len(groups), SINGLE * len(groups), 2.6)
    for axis, (lines, label) in zip(axes, groups, strict=True):
        for number, (name, points) in enumerate(lines.items()):
            _line(axis, points, number, name)
        axis.axhline(0, color="0.3", linewidth=0.8)
        axis.set_ylabel(label)
        steps_axis(axis)
        axis.legend(loc="best")
    return figure


@styled
def survival(run: Run) -> Figure:
    """Plot the fraction of the update that survives rounding, and its size by layer. Example: ``survival(run)``."""
    if not run.points("graft/survival"):
        return _nothing(run, "graft/survival (graft.statistics=true)")
    figure, axes = panels(3, 3, DOUBLE, 2.2)
    axes[0].plot(*zip(*run.points("graft/survival"), strict=True), **series_style(2))
    axes[0].set_ylabel("survival (1: all arrives)")
    axes[0].set_ylim(-0.03, 1.03)
    relative = [(step, 100 * value) for step, value in run.points("graft/relative_delta")]
    _line(axes[1], relative, 1, "")
    axes[1].set_ylabel("‖Δ‖ / ‖Instruct‖ (%)")
    axes[1].set_ylim(bottom=0)
    layers = [run.points(name) for name in run.layers]
    if layers:
        steps = [step for step, _ in layers[0]]
        image = axes[2].pcolormesh(
            range(len(steps) + 1),
            [i - 0.5 for i in range(len(layers) + 1)],
            [[value for _, value in points] for points in layers],
            cmap=SEQUENTIAL,
            vmin=0,
            rasterized=True,
        )
        every = -(-len(steps) // 5)
        axes[2].set_xticks([i + 0.5 for i in range(0, len(steps), every)], [str(step) for step in steps[::every]])
        axes[2].set_ylabel("decoder layer")
        axes[2].yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes[2], label="‖Δ‖ in the layer")
    for axis in axes[:2]:
        steps_axis(axis)
    axes[2].set_xlabel("optimizer step")
    return figure


@styled
def forgetting(run: Run) -> Figure:
    """Plot the KL divergence from the untouched Instruct on what it knew, in nats per token.

    Example: ``forgetting(run)``.
    """
    if not run.divergences:
        return _nothing(run, "val/grafted/…/kl (an evaluator shadowlit.evaluation.forgetting.Divergence)")
    names = run.divergences
    figure, axes = panels(len(names), len(names), min(DOUBLE, SINGLE * len(names)), 2.5)
    for axis, name in zip(axes, names, strict=True):
        draw_subjects(axis, run.series, f"{name}/kl")
        axis.set_ylabel("KL from Instruct (nats per token)")
        axis.set_title(name)
        axis.set_ylim(bottom=0)
        _log_if_wide(axis)
        steps_axis(axis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def score_curves(run: Run) -> Figure:
    """Plot the scores of the evaluators with standard errors over the steps. Example: ``score_curves(run)``."""
    names = [name for name in run.evaluators if name not in run.divergences]
    if not names:
        return _nothing(run, "val/…/<evaluator>/score (a section 'evaluation' with evaluators)")
    columns = min(4, len(names)) if len(names) != 6 else 3
    figure, axes = panels(len(names), columns, min(DOUBLE, max(SINGLE, 2.3 * columns)), 1.75, 0.5, sharey=True)
    for number, (axis, name) in enumerate(zip(axes, names, strict=True)):
        draw_subjects(axis, run.series, f"{name}/score", f"{name}/stderr")
        axis.set_title(name)
        axis.set_ylim(-0.03, 1.03)
        steps_axis(axis)
        if number % columns == 0:
            axis.set_ylabel("score")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4 if columns > 2 else 2)
    return figure


@styled
def training(run: Run) -> Figure:
    """Plot training loss and learning rate of each effective batch. Example: ``training(run)``."""
    if not run.points("train/loss"):
        return _nothing(run, "train/loss")
    figure, axes = panels(2, 2, DOUBLE, 2.1)
    for number, (axis, metric, label) in enumerate(
        zip(axes, ("train/loss", "train/lr"), ("training loss (nats per token)", "learning rate"), strict=True)
    ):
        if run.points(metric):
            axis.plot(*zip(*run.points(metric), strict=True), color=series_style(number)["color"], linewidth=1.0)
        axis.set_ylabel(label)
        steps_axis(axis)
    axes[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    return figure


def _line(axis: Axes, points: Points, number: int, name: str) -> None:
    if points:
        style = series_style(number)
        if number == 0:
            style["color"] = OKABE_ITO["black"]
        axis.plot(*zip(*[(0, 0.0), *points], strict=True), label=name, **style)


def _log_if_wide(axis: Axes) -> None:
    """A logarithmic scale where the values of a panel span more than a factor of 20; zeros have no place there."""
    lines = [value for line in axis.get_lines() for value in np.asarray(line.get_ydata(), float)]
    above = [value for value in lines if value > 0]
    if above and max(above) > _WIDE * min(above):
        axis.set_yscale("log")
        axis.set_ylim(min(above) / 1.5, max(above) * 1.5)


def _nothing(run: Run, what: str) -> Figure:
    return message(
        f"{run.folder} has not logged {what} up to step {run.step}. If the run is still going, wait for its next "
        "validation; else its configuration doesn't measure it."
    )
