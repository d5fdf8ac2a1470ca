"""The learning curves of a run: losses and accuracies of the tuned Base and the grafted Instruct over the steps."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from shadowlit.errors import DataError
from shadowlit.plotting import SUBJECTS

_UNITS = {
    "loss": "loss (nats per token)",
    "accuracy": "token accuracy",
    "sequence_accuracy": "answers right in every token",
    "first_token_loss": "loss of an answer's first token (nats)",
}
_ORIGIN = {"grafted": "instruct", "tuned": "base"}  # what a model is at step 0


def read_metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Read Lightning's ``metrics.csv``, of a run that may be in progress: for every metric, steps and values in order.

    Raises:
        DataError: There is no such file, or it has no steps.
    """
    if not file.is_file():
        raise DataError(f"there is no {file}. Expected the metrics.csv in a run's folder.")
    series: dict[str, list[tuple[int, float]]] = {}
    text = file.read_text(encoding="utf-8")
    # A run in progress may have written only a part of its last line, and of the last number in it.
    complete = text[: text.rfind("\n") + 1]
    for row in csv.DictReader(io.StringIO(complete, newline="")):
        if "step" not in row:
            raise DataError(f"{file} has no column 'step'. Expected the metrics.csv of a run.")
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                series.setdefault(name, []).append((int(row["step"]) + 1, float(value)))
    return series


def draw_curves(
    axes: Sequence[Axes],
    series: Mapping[str, Sequence[tuple[int, float]]],
    sets: Sequence[str],
    whats: Sequence[str],
) -> int:
    """Draw a panel per metric and set, row by row; return the number of lines."""
    drawn = 0
    for row, what in enumerate(whats):
        for column, name in enumerate(sets):
            axis = axes[row * len(sets) + column]
            drawn += draw_subjects(axis, series, f"{name}/{what}" if name else what)
            axis.set_ylabel(_UNITS.get(what, what))
            axis.set_title(name or "all validation sets")
            axis.set_xlabel("optimizer step")
            axis.grid(alpha=0.25)
            if what != "loss":
                axis.set_ylim(-0.03, 1.03)
    return drawn


def draw_subjects(axis: Axes, series: Mapping[str, Sequence[tuple[int, float]]], metric: str, error: str = "") -> int:
    """Draw a metric of the four models; return how many have logged it.

    The untouched models are horizontal lines. The others start from where they are at step 0; ``error`` names the
    metric that holds their standard errors.
    """
    found = {who: series[f"val/{who}/{metric}"] for who in SUBJECTS if f"val/{who}/{metric}" in series}
    for who, points in found.items():
        style = SUBJECTS[who]
        if who not in _ORIGIN:
            axis.axhline(points[-1][1], **style)
            continue
        start = found.get(_ORIGIN[who])
        axis.plot(*zip(*([(0, start[0][1])] if start else []), *points, strict=True), markersize=3.5, **style)
        errors = dict(series.get(f"val/{who}/{error}", ()))
        if errors:
            steps, values = zip(*points, strict=True)
            bars = [errors.get(step, 0.0) for step in steps]
            axis.errorbar(steps, values, yerr=bars, fmt="none", ecolor=style["color"], elinewidth=0.7, alpha=0.6)
    return len(found)
