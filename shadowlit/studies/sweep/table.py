"""The table of a sweep: a row for each arm of each trial, at each scale; and what it says about what was varied."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.errors import ShadowlitError
from shadowlit.files import replace_text
from shadowlit.studies.arms import UNTOUCHED, is_grafted, metrics_of, subject_of, without_subject
from shadowlit.studies.rows import (
    COST,
    SCALE,
    TABLE,
    Place,
    Row,
    Standing,
    by_place,
    cell,
    from_csv,
    metric_names,
    standing_of,
)
from shadowlit.studies.statistics import average, mean_interval
from shadowlit.studies.sweep.definition import MEAN, Definition

if TYPE_CHECKING:
    from shadowlit.studies.sweep.study import SweepStudy

CURVES, DEFINITION = "curves.csv", "sweep.json"


@dataclass(frozen=True)
class Level:
    """A value of an axis, and the mean over seeds of the mean over the settings that all levels share.

    The ends of its 95 % interval over seeds (Student's t) are NaN for a single seed; settings are counted per seed.
    """

    value: str | float
    mean: float
    low: float
    high: float
    num_seeds: int
    num_settings: float


@dataclass(frozen=True)
class Table:
    """All rows of a sweep, and its definition."""

    rows: Sequence[Row]
    definition: Definition

    @property
    def arms(self) -> list[str]:
        """The arms that were measured, in the definition's order."""
        return [arm for arm in self.definition.arms if any(row.arm == arm for row in self.rows)]

    @property
    def axes(self) -> list[str]:
        """Names of what was varied, including the scale if several were measured."""
        own = [axis.name for axis in self.definition.axes]
        return own + ([SCALE] if len(self.definition.scales) > 1 else [])

    @property
    def varied(self) -> list[str]:
        """The axes that have several levels; all of them if none has."""
        single = {axis.name for axis in self.definition.axes if axis.range is None and len(axis.levels) == 1}
        return [axis for axis in self.axes if axis not in single] or self.axes

    def levels(self, axis: str) -> list[str]:
        """Return what an axis varies over, as text; a range is one text."""
        if axis == SCALE:
            return [f"{scale:g}" for scale in self.definition.scales]
        found = next(each for each in self.definition.axes if each.name == axis)
        return list(found.levels) if found.range is None else [f"{found.range['low']:g} to {found.range['high']:g}"]

    def shown(self) -> list[str]:
        """Return the metrics of the report: what trials are judged by, then the ones of ``show``."""
        judged = self.definition.metrics
        own = [self.definition.judged] if len(judged) == 1 else [self.definition.judged, *map(without_subject, judged)]
        return list(dict.fromkeys([*own, *self.definition.show]))

    def short(self, axis: str) -> str:
        """Return the name of an axis in the names of folders."""
        names = [each.name for each in self.definition.axes]
        return self.definition.short_names[names.index(axis)] if axis in names else axis

    @property
    def ranges(self) -> set[str]:
        """Axes of numbers that were drawn, and so have no levels."""
        return {axis.name for axis in self.definition.axes if axis.range is not None}

    def setting_text(self, place: Place) -> str:
        """Return a setting in a word for each axis: ``lr=0.001, r=16, λ=0.5``."""
        parts = [f"{self.short(axis)}={level_text(level)}" for axis, level in place.setting.items()]
        if place.scale is not None and len(self.definition.scales) > 1:
            parts.append(f"λ={place.scale:g}")
        return ", ".join(parts)

    def of(self, arm: str, scale: float | None = None) -> list[Row]:
        """Return the rows of an arm that have a result, at the first scale unless another is given."""
        wanted = scale if scale is not None else self.definition.scales[0]
        found = [row for row in self.rows if row.arm == arm and row.metrics]
        return [row for row in found if row.scale in (None, wanted)]

    def untouched(self, arm: str, metric: str) -> float:
        """Return a metric of ``Base`` or ``Instruct``; NaN if it wasn't measured."""
        values = [row.metrics[metric] for row in self.rows if row.arm == arm and metric in row.metrics]
        return average(values).mean

    def effects(self, axis: str, metric: str, arm: str, scale: float | None = None) -> list[Level]:
        """Return the main effect of an axis: the mean at each of its levels, over the settings that all levels share.

        A setting of the other axes counts for a seed if it was measured at every level, so that no level gains from
        easier company. The interval is over seeds alone: it is about other trainings, not about other settings. Without
        a scale, it is that of the first one.
        """
        every = self.rows if axis == SCALE else self.of(arm, scale)
        rows = [row for row in every if row.arm == arm and row.level(axis) is not None and row.state == "complete"]
        named = next((list(each.levels) for each in self.definition.axes if each.name == axis), [])
        present: dict[Any, None] = dict.fromkeys(row.level(axis) for row in rows)
        levels = sorted(present, key=lambda level: (*_order(level), named.index(level) if level in named else 0))
        found: dict[tuple[Any, Any], dict[tuple[Any, ...], float]] = defaultdict(dict)
        for row in rows:
            value = row.metrics.get(metric, math.nan)
            if math.isfinite(value):
                others = tuple((name, row.level(name)) for name in self.axes if name not in (axis, SCALE))
                found[row.seed, row.level(axis)][others] = value
        seeds = sorted({row.seed for row in rows if row.seed is not None})
        shared = {seed: set.intersection(*(set(found[seed, level]) for level in levels)) for seed in seeds}
        used = [seed for seed in seeds if shared[seed]]
        result = []
        for level in levels:
            means = [average([found[seed, level][other] for other in shared[seed]]).mean for seed in used]
            settings = average([len(shared[seed]) for seed in used]).mean
            result.append(Level(level, *mean_interval(means), len(used), settings))
        return result

    def standings(self, arm: str) -> list[Standing]:
        """Return each setting of an arm at each scale, over its finished seeds; best first by the sweep's metric."""
        sign = 1 if self.definition.direction == "minimize" else -1
        own = by_place(row for row in self.rows if row.arm == arm and row.state == "complete")
        found = [standing_of(arm, rows, metric_names(rows)) for rows in own]

        def rank(standing: Standing) -> tuple[int, float]:
            mean = standing[self.definition.judged].mean
            return -standing.num_seeds, sign * mean if math.isfinite(mean) else math.inf

        return sorted(found, key=rank)


def build_table(study: SweepStudy) -> Table:
    """Return the table of what a sweep's storage holds at this moment."""
    from shadowlit.studies.sweep.study import state_of

    definition = study.definition
    rows = []
    for arm in UNTOUCHED:
        if metrics := _with_mean(metrics_of(study.untouched or {}, arm.lower()), definition):
            rows.append(Row(arm, metrics=metrics))
    for trial in study.trials:
        found = trial.user_attrs
        if "key" not in found:
            continue
        key, cost = found["key"], {name: float(found[name]) for name in COST if found.get(name) is not None}
        for arm in (arm for arm in definition.arms if arm[0] == key["source"]):
            for scale in definition.scales if is_grafted(arm) else (None,):
                metrics = metrics_of(found.get("metrics", {}), subject_of(arm, scale, definition.scales))
                rows.append(
                    Row(arm, scale, key["setting"], key["seed"], found["name"], state_of(trial),
                        metrics=_with_mean(metrics, definition), cost=cost)
                )  # fmt: skip
    order = {arm: number for number, arm in enumerate((*UNTOUCHED, *definition.arms))}
    return Table(sorted(rows, key=lambda row: (order[row.arm], row.trial, -(row.scale or 0))), definition)


def read_table(folder: str | Path) -> Table:
    """Read the table of a sweep's folder, as the last report wrote it. Example: ``table = read_table("sweeps/rank")``.

    Raises:
        ShadowlitError: The folder has none.
    """
    folder = Path(folder)
    try:
        definition = Definition(**json.loads((folder / DEFINITION).read_text(encoding="utf-8"))["definition"])
        text = (folder / TABLE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ShadowlitError(
            f"there is no {error.filename}. Expected the folder of a sweep; shadowlit sweep report writes it."
        ) from None
    return Table(from_csv(text, {axis.name: axis.range is not None for axis in definition.axes}), definition)


def write_curves(study: SweepStudy, folder: Path) -> Path:
    """Write ``curves.csv``: trial, optimizer step, and what the trial is judged by there."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "step", "value"])
    for trial in study.trials:
        for step, value in sorted(trial.intermediate_values.items()):
            writer.writerow([trial.user_attrs.get("name"), step, cell(value)])
    return replace_text(folder / CURVES, text.getvalue())


def read_curves(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read steps and values of each trial while it ran, by its name. Example: ``read_curves("sweeps/rank")``.

    Raises:
        ShadowlitError: The folder has none.
    """
    file = Path(folder) / CURVES
    if not file.is_file():
        raise ShadowlitError(f"there is no {file}. shadowlit sweep report writes it.")
    found: dict[str, list[tuple[int, float]]] = {}
    for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))):
        found.setdefault(row["trial"], []).append((int(row["step"]), float(row["value"] or "nan")))
    return {name: sorted(points) for name, points in sorted(found.items())}


def _with_mean(metrics: dict[str, float], definition: Definition) -> dict[str, float]:
    """Add the mean of what trials are judged by, where all of it was measured."""
    names = [without_subject(metric) for metric in definition.metrics]
    if len(names) < 2 or not all(name in metrics for name in names):
        return metrics
    return {MEAN: sum(metrics[name] for name in names) / len(names), **metrics}


def _order(level: Any) -> tuple[int, float]:
    """Key that sorts numbers by their size, including labels that are numbers, before words."""
    try:
        return 0, float(level)
    except (TypeError, ValueError):
        return 1, 0.0


def is_numeric(levels: Iterable[str | float]) -> bool:
    """Return whether all levels are numbers."""
    return all(_order(level)[0] == 0 for level in levels)


def level_text(value: str | float) -> str:
    """Return a label as it is, or a number with four digits."""
    return value if isinstance(value, str) else f"{value:.4g}"
