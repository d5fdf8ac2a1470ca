"""Plots of updates: spectra, angles, overlaps, evolution, and the error of truncation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from shadowlit.analysis.deltas import Matrix
from shadowlit.analysis.evolution import Evolution
from shadowlit.analysis.subspaces import Overlap, Spectrum
from shadowlit.analysis.truncation import ALL, Cost, Losses
from shadowlit.plotting import (
    DIVERGING,
    DOUBLE,
    SEQUENTIAL,
    SINGLE,
    in_order,
    limits,
    message,
    panels,
    series_style,
    steps_axis,
    styled,
)

_SMALLEST = 1e-4  # of the largest singular value: what lies below isn't drawn
_NO_RUNS = "No run with checkpoints was given: a ModelCheckpoint with every_n_train_steps and save_top_k=-1 keeps them."
_ANNOTATED = 8  # updates; numbers in more cells couldn't be read


@styled
def draw_spectra(found: Mapping[str, Sequence[Spectrum]]) -> Figure:
    """Plot the singular values relative to the largest, a panel per kind of matrix; a line per update and layer.

    Example: ``draw_spectra(spectra_of(deltas))``.

    Args:
        found: Results of :func:`shadowlit.analysis.subspaces.spectra_of`.
    """
    kinds = in_order(one.kind for each in found.values() for one in each)
    columns = min(4, len(kinds))
    figure, axes = panels(len(kinds), columns, DOUBLE, 1.45, 0.5, sharex=True, sharey=True)
    for panel, (axis, kind) in enumerate(zip(axes, kinds, strict=True)):
        for number, each in enumerate(found.values()):
            colour = series_style(number)["color"]
            for one in (one for one in each if one.kind == kind and float(one.values[0])):
                shares = (one.values / one.values[0]).tolist()
                points = [(i, share) for i, share in enumerate(shares, start=1) if share >= _SMALLEST]
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.7)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(_SMALLEST, 1.5)
        axis.set_title(kind)
        axis.grid()
        if panel % columns == 0:
            axis.set_ylabel("sᵢ / s₁")
        if panel + columns >= len(kinds):  # no panel below it
            axis.set_xlabel("index i")
            axis.tick_params(labelbottom=True)
    for number, name in enumerate(found):
        axes[0].plot([], [], color=series_style(number)["color"], label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@styled
def draw_matrices(found: Sequence[Matrix], titles: Sequence[str] = ()) -> Figure:
    """Plot numbers for every two updates, matrices side by side; the diagonal carries no information and is blank.

    Example: ``draw_matrices([matrix(compare_deltas(deltas))])``.

    Args:
        found: Matrices with equal names and one label, so that they share the colours.
        titles: Above them; by default none.
    """
    size, first = len(found[0].names), found[0]
    width = SINGLE if len(found) == 1 else DOUBLE
    figure, axes = panels(len(found), len(found), width, 0.85 + (width - 1.7) / len(found))
    tables = [
        [[math.nan if i == j else float(one.values[i, j]) for j in range(size)] for i in range(size)] for one in found
    ]
    low, high, colours = 0.0, 1.0, SEQUENTIAL
    if first.centre is not None:
        low, high = limits((value for cells in tables for row in cells for value in row), first.centre)
        colours = f"{DIVERGING}_r" if first.inverted else DIVERGING
    for number, (axis, cells) in enumerate(zip(axes, tables, strict=True)):
        image = axis.imshow(cells, cmap=colours, vmin=low, vmax=high)
        if size <= _ANNOTATED:
            _annotate(axis, cells, low, high, matplotlib.colormaps[colours])
        axis.set_xticks(range(size), first.names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(size), first.names if number == 0 else [""] * size)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(titles[number] if titles else "")
    figure.colorbar(image, ax=axes, label=first.label, shrink=0.8, pad=0.02)
    return figure


def draw_overlaps(found: Sequence[Overlap]) -> Figure:
    """Plot the overlap of the leading directions of every two updates.

    Example: ``draw_overlaps(overlaps(deltas, rank=2))``.
    """
    titles = [f"{one.side} side; {one.chance:.2g} by chance" for one in found]
    return draw_matrices([one.matrix for one in found], titles)


@styled
def draw_evolution(found: Mapping[str, Evolution]) -> Figure:
    """Plot size, direction relative to the last checkpoint, and turns of updates over the steps of their runs.

    Example: ``draw_evolution(grown)``.

    Args:
        found: Results of :func:`shadowlit.analysis.evolution.evolutions`.
    """
    if not found:
        return message(_NO_RUNS)
    figure, axes = panels(3, 3, DOUBLE, 2.35)
    for number, (name, one) in enumerate(found.items()):
        style = series_style(number)
        axes[0].plot((0, *one.steps), (0.0, *one.norms), label=name, **style)
        axes[1].plot(one.steps, one.to_last, **style)
        axes[2].plot(one.steps, one.to_previous, **style)
    axes[0].set_ylabel("‖Δₜ‖")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel("cos(Δₜ, Δ at the last step)")
    axes[1].set_ylim(top=1.03)
    axes[2].set_ylabel("cos(Δₜ − Δₜ₋₁, Δₜ₋₁)")
    axes[2].axhline(0, color="0.6", linewidth=0.6)
    for axis in axes:
        steps_axis(axis, "optimizer step t")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@styled
def draw_kinds(found: Mapping[str, Evolution]) -> Figure:
    """Plot the sizes of updates by kind of tensor over the steps, a panel per run. Example: ``draw_kinds(grown)``."""
    if not found:
        return message(_NO_RUNS)
    columns = min(3, len(found))
    figure, axes = panels(len(found), columns, SINGLE if columns == 1 else DOUBLE, 2.0, 0.3)
    kinds = in_order(kind for one in found.values() for kind in one.kinds)
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        for number, kind in enumerate(kinds):
            if kind in one.kinds:
                axis.plot((0, *one.steps), (0.0, *one.kinds[kind]), label=kind, **series_style(number))
        axis.set_title(name)
        axis.set_ylabel("‖Δₜ‖")
        axis.set_ylim(bottom=0)
        steps_axis(axis, "optimizer step t")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


@styled
def draw_costs(found: Sequence[Cost], losses: Losses | None = None) -> Figure:
    """Plot the relative error of a cut update, by kind and over all; below it, where they are known, validation losses.

    Example: ``draw_costs([rank_cost(spectra_of(deltas)["lora"], [1, 2])])``.

    Args:
        found: Costs by rank, by density, or both: a column each.
        losses: Losses of the Instruct with the same cuts.
    """
    rows = 1 if losses is None else 2
    width = SINGLE if len(found) == 1 else DOUBLE
    figure, axes = panels(rows * len(found), len(found), width, 2.0, 0.55 if width == DOUBLE else 1.0)
    for column, one in enumerate(found):
        axis = axes[column]
        axis.plot(one.kept, one.errors[ALL], label="all together", color="black", linewidth=2.0)
        for number, kind in enumerate(in_order(one.errors.keys() - {ALL})):
            axis.plot(one.kept, one.errors[kind], label=kind, alpha=0.8, **series_style(number, black=False))
        axis.set_ylabel("relative error ‖cut − Δ‖ / ‖Δ‖")
        axis.set_ylim(-0.03, 1.03)
        if losses is not None:
            below = axes[len(found) + column]
            points = sorted((losses.by_rank if one.by == "rank" else losses.by_density).items())
            below.axhline(losses.untouched, color="black", linestyle="--", label="Instruct, untouched")
            below.axhline(losses.whole, color=series_style(1)["color"], linestyle=":", label="all of the update")
            if points:
                below.plot(*zip(*points, strict=True), label="cut update", **series_style(1))
            below.set_ylabel("validation loss (nats per token)")
        for drawn in axes[column :: len(found)]:
            _scale(drawn, one)
            drawn.grid()
    handles, labels = axes[0].get_legend_handles_labels()
    if losses is not None:
        more = axes[len(found)].get_legend_handles_labels()
        handles, labels = [*handles, *more[0]], [*labels, *more[1]]
    if width == DOUBLE:
        figure.legend(handles, labels, loc="outside right center")
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _scale(axis: Axes, cost: Cost) -> None:
    axis.set_xscale("log", base=2 if cost.by == "rank" else 10)
    axis.set_xticks(cost.kept, [f"{kept:g}" for kept in cost.kept])
    axis.minorticks_off()
    axis.set_xlabel("rank kept" if cost.by == "rank" else "share of elements kept")


def _annotate(axis: Axes, cells: Sequence[Sequence[float]], low: float, high: float, colours: Colormap) -> None:
    """Write the numbers into the cells, in black or white, whichever has more contrast."""
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            if not math.isnan(value):
                red, green, blue, _ = colours((value - low) / (high - low))
                colour = "w" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "k"
                text = f"{round(value, 2) + 0.0:.2f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
