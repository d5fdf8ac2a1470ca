"""What a sweep has found, as the tables of a notebook and of the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from shadowlit.analysis.tables import Table as Shown
from shadowlit.studies.report import mean_text
from shadowlit.studies.rows import Standing
from shadowlit.studies.sweep.table import Table


def states(table: Table) -> Counter[str]:
    """Return the number of trials in each state."""
    return Counter({row.trial: row.state for row in table.rows if row.seed is not None}.values())


def progress(table: Table) -> Shown:
    """Return what was varied, and how many trials are in which state. Example: ``progress(table)``."""
    definition = table.definition
    axes = [f"{axis}: {', '.join(table.levels(axis))}" for axis in table.axes]
    rows: list[tuple[str, object]] = [
        ("sweep", definition.study),
        *(("varied", axis) for axis in axes),
        ("arms", ", ".join(definition.arms)),
        ("seeds", ", ".join(map(str, definition.seeds))),
        ("judged by", f"{', '.join(definition.metrics)} ({definition.direction})"),
        *((f"trials {state}", count) for state, count in sorted(states(table).items())),
    ]
    return Shown(("", "value"), rows)


def best(table: Table, metrics: Sequence[str] | None = None) -> Shown:
    """Return the best setting of each arm by what trials are judged by, over seeds, below the untouched models.

    It is chosen and shown on the same rows, which flatters it. Example: ``best(table)``.

    Args:
        table: Table of the sweep.
        metrics: Metrics of the columns; None for those of the report.
    """
    wanted = list(metrics or table.shown())
    rows: list[Sequence[object]] = []
    for arm in ("Base", "Instruct"):
        values = [table.untouched(arm, metric) for metric in wanted]
        if not all(map(math.isnan, values)):
            rows.append((arm, "untouched", None, *values))
    for arm in table.arms:
        rows += [(arm, *_standing(table, standing, wanted)) for standing in table.standings(arm)[:1]]
    return Shown(("arm", "setting", "seeds", *wanted), rows)


def settings(table: Table, arm: str | None = None, metrics: Sequence[str] | None = None, most: int = 20) -> Shown:
    """Return the settings of an arm, the best first. Example: ``settings(table, "B2I")``.

    Args:
        table: Table of the sweep.
        arm: Arm to show; None for the first.
        metrics: Metrics of the columns; None for those of the report.
        most: Largest number of rows.
    """
    wanted = list(metrics or table.shown())
    found = table.standings(arm or table.arms[0]) if table.arms else []
    rows = [_standing(table, standing, wanted) for standing in found[:most]]
    return Shown(("setting", "seeds", *wanted), rows, f"{arm or (table.arms or ['no arm'])[0]}, {len(found)} settings")


def effects(table: Table, metric: str | None = None) -> Shown:
    """Return the main effect of every axis on a metric: mean and 95 % interval over seeds at each of its levels.

    Example: ``effects(table, "graft/gain")``.

    Args:
        table: Table of the sweep.
        metric: Metric to show; None for what trials are judged by.
    """
    wanted = metric or table.shown()[0]
    rows = [
        (table.short(axis), arm, level.value, level.mean, level.low, level.high, level.num_seeds, level.num_settings)
        for axis in table.axes
        if axis not in table.ranges
        for arm in table.arms
        for level in table.effects(axis, wanted, arm)
    ]
    return Shown(("axis", "arm", "level", wanted, "from", "to", "seeds", "settings"), rows)


def _standing(table: Table, standing: Standing, metrics: Sequence[str]) -> list[object]:
    means = [
        mean_text(standing[metric], "{:.4g}".format, "{:.2g}".format) if standing[metric].count else None
        for metric in metrics
    ]
    return [table.setting_text(standing), standing.num_seeds, *means]
