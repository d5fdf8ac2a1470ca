"""The report of a sweep, finished or not: tables in Markdown and CSV, and the pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shadowlit.files import replace_text
from shadowlit.plotting import save_figure
from shadowlit.studies.statistics import Average, average, few_seeds
from shadowlit.studies.sweep.plots import interaction, main_effects, trial_curves
from shadowlit.studies.sweep.table import (
    SCALE,
    Level,
    Standing,
    Table,
    build_table,
    read_curves,
    write_curves,
    write_table,
)

if TYPE_CHECKING:
    from shadowlit.studies.sweep.study import SweepStudy

REPORT = "REPORT.md"
_LONGEST = 60  # settings of an arm that the report lists; the CSV has all


def write_report(study: SweepStudy, folder: Path) -> Path:
    """Write ``table.csv``, ``curves.csv``, ``REPORT.md`` and the pictures (PNG and PDF) of what there is by now.

    Returns:
        The report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = build_table(study)
    write_table(table, folder)
    write_curves(study, folder)
    failed = {
        trial.user_attrs["name"]: str(trial.user_attrs.get("reason", "its metric was no number"))
        for trial in study.trials
        if trial.state.name == "FAIL" and "name" in trial.user_attrs
    }
    pictures = _draw(table, folder)
    return replace_text(folder / REPORT, "\n".join(_lines(table, failed, pictures)) + "\n")


def _draw(table: Table, folder: Path) -> dict[str, str]:
    """Draw what can be drawn; each picture's title and the stem of its files."""
    if not any(row.metrics for row in table.rows if row.seed is not None):
        return {}
    found = {"Main effects": "main_effects"}
    save_figure(main_effects(table), folder / "main_effects")
    ranges = {axis.name for axis in table.definition.axes if axis.range is not None}
    varied = [axis for axis in table.varied if axis not in ranges]
    for arm in table.arms if len(varied) == 2 else []:
        if SCALE in varied and arm[0] == arm[2]:
            continue
        stem = f"interaction_{arm}"
        save_figure(interaction(table, varied[0], varied[1], arm=arm), folder / stem)
        found[f"The two together, {arm}"] = stem
    curves = read_curves(folder)
    if any(len(points) > 1 for points in curves.values()):
        save_figure(trial_curves(curves, table), folder / "trials")
        found["Trials while they ran"] = "trials"
    return found


def _lines(table: Table, failed: dict[str, str], pictures: dict[str, str]) -> Iterator[str]:
    definition = table.definition
    states = Counter({row.trial: row.state for row in table.rows if row.seed is not None}.values())
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    yield f"# {definition.study}"
    yield ""
    yield (
        f"`{definition.fit}`, {sum(states.values())} trials: {told or 'none yet'}. Sampler: {definition.sampler}; "
        f"pruner: {definition.pruner}. Trials are judged by {definition.judged_by} ({definition.direction})."
    )
    yield ""
    if definition.overrides:
        yield "Changed for all: " + ", ".join(f"`{key}={value}`" for key, value in definition.overrides.items()) + "."
        yield ""
    yield (
        f"{few_seeds(len(definition.seeds))} A main effect is the mean over the settings that all levels of its axis "
        "share; its interval is Student's t over seeds. Settings are chosen and shown on the same rows, which flatters "
        "the best: put it to other rows, or to `compare`, before relying on it."
    )
    yield ""
    yield "## Best setting of each arm"
    yield ""
    yield from _best(table)
    for axis in table.varied:
        if all(each.range is None for each in definition.axes if each.name == axis):
            yield from _effects(table, axis)
    for title, stem in pictures.items():
        yield f"## {title}"
        yield ""
        yield f"![{title}]({stem}.png)"
        yield ""
    yield "## All settings"
    yield ""
    for arm in table.arms:
        standings = table.standings(arm)
        yield f"### {arm}"
        yield ""
        yield from _settings(table, standings[:_LONGEST])
        if len(standings) > _LONGEST:
            yield f"{len(standings) - _LONGEST} more are in `table.csv`."
            yield ""
    if failed:
        yield "## Failed"
        yield ""
        yield from (f"- `{name}`: {reason}" for name, reason in failed.items())
        yield ""
    yield "Every trial is in `table.csv`. Written by `python -m shadowlit sweep`, definition in `sweep.json`."


def _best(table: Table) -> Iterator[str]:
    shown = table.shown()
    rows = []
    for arm in ("Base", "Instruct"):
        values = [
            average([value]) if math.isfinite(value := table.untouched(arm, metric)) else None for metric in shown
        ]
        if any(values):
            rows.append([arm, "untouched", "", *(_number(value) for value in values)])
    for arm in table.arms:
        for standing in table.standings(arm)[:1]:
            rows.append([arm, _setting(table, standing), str(standing.num_seeds), *_metrics(standing, shown)])
    yield from _table(["arm", "setting", "seeds", *shown], rows)


def _effects(table: Table, axis: str) -> Iterator[str]:
    shown = table.shown()
    yield f"## Effect of {table.short(axis)}"
    yield ""
    rows = []
    for arm in table.arms:
        columns = [{level.value: level for level in table.effects(axis, metric, arm)} for metric in shown]
        for value in columns[0]:
            levels = [column.get(value) for column in columns]
            settings = levels[0].num_settings if levels[0] else math.nan
            rows.append([arm, _value(value), f"{settings:g}", *(_level(level) for level in levels)])
    yield from _table(["arm", table.short(axis), "settings", *shown], rows)


def _settings(table: Table, standings: Sequence[Standing]) -> Iterator[str]:
    shown = table.shown()
    rows = [[_setting(table, each), str(each.num_seeds), *_metrics(each, shown)] for each in standings]
    yield from _table(["setting", "seeds", *shown], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        yield "Nothing is finished yet."
        yield ""
        return
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    yield from ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    yield ""


def _metrics(standing: Standing, shown: Sequence[str]) -> list[str]:
    return [_number(standing.metrics.get(metric)) for metric in shown]


def _number(value: Average | None) -> str:
    if value is None or not math.isfinite(value.mean):
        return "–"
    error = f" ± {value.standard_error:.2g}" if math.isfinite(value.standard_error) else ""
    return f"{value.mean:.4g}{error}"


def _level(level: Level | None) -> str:
    if level is None or not math.isfinite(level.mean):
        return "–"
    between = f" ({level.low:.4g} to {level.high:.4g})" if math.isfinite(level.low) else ""
    return f"{level.mean:.4g}{between}"


def _setting(table: Table, standing: Standing) -> str:
    parts = [f"{table.short(axis)}={_value(value)}" for axis, value in standing.setting.items()]
    if standing.scale is not None and len(table.definition.scales) > 1:
        parts.append(f"λ={standing.scale:g}")
    return ", ".join(parts)


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
