"""The report of a sweep, finished or not: tables in Markdown and CSV, and plots."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from shadowlit.analysis.tables import Table as Shown
from shadowlit.analysis.tables import cell_text
from shadowlit.errors import counted
from shadowlit.masking import masked
from shadowlit.studies.report import NONE, bullets, markdown_table, paragraphs, write_files
from shadowlit.studies.rows import SCALE
from shadowlit.studies.statistics import few_seeds
from shadowlit.studies.sweep.notebook import best, settings, states
from shadowlit.studies.sweep.plots import draw_interaction, main_effects, trial_curves
from shadowlit.studies.sweep.table import Level, Table, build_table, level_text, read_curves, write_curves

if TYPE_CHECKING:
    from shadowlit.studies.sweep.study import SweepStudy

_LONGEST = 60  # settings of an arm that the report lists; the CSV has all


def write_report(study: SweepStudy, folder: Path) -> Path:
    """Write ``table.csv``, ``curves.csv``, the plots (PNG and PDF) and ``REPORT.md``, whose path is returned."""
    table = build_table(study)
    write_curves(study, folder)
    failed = {
        trial.user_attrs["name"]: str(trial.user_attrs.get("reason", "its metric was not a number"))
        for trial in study.trials
        if trial.state.name == "FAIL" and "name" in trial.user_attrs
    }
    plots = _plots(table, folder)
    text = paragraphs(list(_parts(table, failed, {stem: title for stem, (title, _) in plots.items()})))
    figures = {stem: figure for stem, (_, figure) in plots.items()}
    return write_files(folder, text, table.rows, [axis.name for axis in table.definition.axes], figures)


def _plots(table: Table, folder: Path) -> dict[str, tuple[str, Figure]]:
    """Title and figure of what can be drawn, by the stem of the files."""
    if sum(bool(row.metrics) for row in table.rows if row.seed is not None) < 2:
        return {}  # a single point shows nothing
    found = {"main_effects": ("Main effects", main_effects(table))}
    varied = [axis for axis in table.varied if axis not in table.ranges]
    for arm in table.arms if len(varied) == 2 else []:
        if SCALE not in varied or arm[0] != arm[2]:
            drawn = draw_interaction(table, varied[0], varied[1], arm=arm)
            found[f"interaction_{arm}"] = (f"The two together, {arm}", drawn)
    curves = read_curves(folder)
    if any(len(points) > 1 for points in curves.values()):
        found["trials"] = ("Trials while they ran", trial_curves(curves, table))
    return found


def _parts(table: Table, failed: dict[str, str], plots: dict[str, str]) -> Iterator[str]:
    definition = table.definition
    counts = states(table)
    listed = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    yield f"# {definition.study}"
    yield (
        f"`{definition.fit}`, {counted(sum(counts.values()), 'trial')}: {listed or 'none yet'}. Sampler: "
        f"{definition.sampler}; pruner: {definition.pruner}. Trials are judged by {definition.judged_by} "
        f"({definition.direction})."
    )
    if definition.overrides:
        changed = masked(definition.overrides).items()
        yield "Changed for all: " + ", ".join(f"`{key}={value}`" for key, value in changed) + "."
    yield (
        f"{few_seeds(len(definition.seeds))} A main effect is the mean over the settings that all levels of its axis "
        "share; its interval is Student's t over seeds. Settings are chosen and shown on the same rows, which flatters "
        "the best: check it on other rows, or with `compare`, before relying on it."
    )
    yield f"## Best setting of each arm\n\n{_markdown(best(table))}"
    for axis in table.varied:
        if axis not in table.ranges:
            yield f"## Effect of {table.short(axis)}\n\n{_markdown(_effects(table, axis))}"
    for stem, title in plots.items():
        yield f"## {title}\n\n![{title}]({stem}.png)"
    yield "## All settings"
    for arm in table.arms:
        yield f"### {arm}\n\n{_markdown(settings(table, arm, most=_LONGEST))}"
        if (count := len(table.standings(arm))) > _LONGEST:
            yield f"{count - _LONGEST} more are in `table.csv`."
    if failed:
        yield "## Failed\n\n" + bullets([f"`{name}`: {reason}" for name, reason in failed.items()])
    yield "Every trial is in `table.csv`. Written by `shadowlit sweep`, definition in `sweep.json`."


def _effects(table: Table, axis: str) -> Shown:
    shown = table.shown()
    rows: list[list[object]] = []
    for arm in table.arms:
        columns = [{level.value: level for level in table.effects(axis, metric, arm)} for metric in shown]
        for value, level in columns[0].items():
            levels = [_level(column.get(value)) for column in columns]
            rows.append([arm, level_text(value), f"{level.num_settings:g}", *levels])
    return Shown(("arm", table.short(axis), "settings", *shown), rows)


def _markdown(table: Shown) -> str:
    """A table of numbers; only the number of seeds may be empty, other missing numbers are a dash."""
    rows = [[cell_text(cell) if column != "seeds" else cell for column, cell in zip(table.columns, row, strict=True)]
            for row in table.rows]  # fmt: skip
    return markdown_table(table.columns, rows) if rows else "Nothing is finished yet."


def _level(level: Level | None) -> str:
    if level is None or not math.isfinite(level.mean):
        return NONE
    between = f" ({level.low:.4g} to {level.high:.4g})" if math.isfinite(level.low) else ""
    if level.high == level.low:
        between = " (no spread between seeds)"
    return f"{level.mean:.4g}{between}"
