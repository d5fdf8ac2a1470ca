"""The table of a sweep: a row for each arm of each trial, at each scale; and what it says of what was varied."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.errors import ShadowlitError
from shadowlit.files import replace_text
from shadowlit.grafting.subject import TUNED, Subject
from shadowlit.studies.statistics import Average, average, mean_interval
from shadowlit.studies.sweep.definition import MEAN, Definition, without_subject

if TYPE_CHECKING:
    from shadowlit.studies.sweep.study import SweepStudy

TABLE, CURVES, DEFINITION = "table.csv", "curves.csv", "sweep.json"
SCALE = "scale"
_COST = ("step", "wall_s", "peak_memory_bytes", "trained_parameters", "train_tokens")
_FIXED = ("trial", "state", "arm", SCALE, "seed")


@dataclass(frozen=True)
class Row:
    """One arm of one trial at one scale, or an untouched model.

    Attributes:
        trial: Its name; ``untouched`` for the Base and the Instruct.
        state: waiting, running, complete, pruned, diverged, failed.
        arm: ``B2I``, ``I2I``, ``B2B``, ``I2B``, ``Base`` or ``Instruct``.
        scale: λ of a graft; None where nothing is grafted.
        seed: None for the untouched models.
        setting: A label or number for each axis.
        metrics: By name, as logged after ``val/<subject>/``.
        cost: ``wall_s``, ``peak_memory_bytes`` …
    """

    trial: str
    state: str
    arm: str
    scale: float | None = None
    seed: int | None = None
    setting: Mapping[str, str | float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    def level(self, axis: str) -> str | float | None:
        """Its value on an axis; the scale is one too."""
        return self.scale if axis == SCALE else self.setting.get(axis)


@dataclass(frozen=True)
class Level:
    """What was measured at one value of an axis.

    Attributes:
        value: The label or number.
        mean: Over seeds, each the mean over the settings that all levels share.
        low: Lower end of its 95 % interval over seeds (Student's t); NaN for a single seed.
        high: Upper end.
        num_seeds: Seeds that it is from.
        num_settings: Settings of the other axes that it is from, for each seed on average.
    """

    value: str | float
    mean: float
    low: float
    high: float
    num_seeds: int
    num_settings: float


@dataclass(frozen=True)
class Standing:
    """One setting of an arm, over seeds.

    Attributes:
        arm: Which.
        scale: λ, None for a tuned model.
        setting: A label or number for each axis.
        metrics: Mean and standard error over seeds, by name.
        num_seeds: Trials that it is from.
    """

    arm: str
    scale: float | None
    setting: Mapping[str, str | float]
    metrics: Mapping[str, Average]
    num_seeds: int


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
        """What was varied; the scale is among it where several were measured."""
        own = [axis.name for axis in self.definition.axes]
        return own + ([SCALE] if len(self.definition.scales) > 1 else [])

    @property
    def varied(self) -> list[str]:
        """Those of the axes that have several levels; all, if none has."""
        single = {axis.name for axis in self.definition.axes if axis.range is None and len(axis.levels) == 1}
        return [axis for axis in self.axes if axis not in single] or self.axes

    @property
    def metrics(self) -> list[str]:
        """Names of what was measured."""
        return sorted({name for row in self.rows for name in row.metrics})

    def shown(self) -> list[str]:
        """The metrics that the report is about: what trials are judged by, then those to show."""
        judged = self.definition.metrics
        own = [self.definition.judged] if len(judged) == 1 else [self.definition.judged, *map(without_subject, judged)]
        return list(dict.fromkeys([*own, *self.definition.show]))

    def short(self, axis: str) -> str:
        """An axis by the name that folders have."""
        names = [each.name for each in self.definition.axes]
        return self.definition.short_names[names.index(axis)] if axis in names else axis

    def of(self, arm: str, scale: float | None = None) -> list[Row]:
        """The rows of an arm that have a result; at the first scale unless another is given."""
        wanted = scale if scale is not None else self.definition.scales[0]
        found = [row for row in self.rows if row.arm == arm and row.metrics]
        return [row for row in found if row.scale in (None, wanted)]

    def untouched(self, arm: str, metric: str) -> float:
        """A metric of ``Base`` or ``Instruct``; NaN if it wasn't measured."""
        values = [row.metrics[metric] for row in self.rows if row.arm == arm and metric in row.metrics]
        return average(values).mean

    def effects(self, axis: str, metric: str, arm: str, scale: float | None = None) -> list[Level]:
        """The main effect of an axis: the mean at each of its levels, over the settings that all levels share.

        A setting of the other axes counts for a seed if it was measured at every level, so that no level gains from
        easier company. The interval is over seeds alone: it is about other trainings, not about other settings.

        Args:
            axis: Its name, or ``scale``.
            metric: As in the rows.
            arm: Which.
            scale: λ; None for the first.
        """
        every = self.rows if axis == SCALE else self.of(arm, scale)
        rows = [row for row in every if row.arm == arm and row.level(axis) is not None and row.state == "complete"]
        named = next((list(each.levels) for each in self.definition.axes if each.name == axis), [])
        present = dict.fromkeys(row.level(axis) for row in rows if row.level(axis) is not None)
        levels = sorted(present, key=lambda level: (*_order(level)[:2], named.index(level) if level in named else 0))
        found: dict[tuple[Any, Any], dict[tuple[Any, ...], float]] = {}
        for row in rows:
            value = row.metrics.get(metric, math.nan)
            if math.isfinite(value):
                others = tuple((name, row.level(name)) for name in self.axes if name not in (axis, SCALE))
                found.setdefault((row.seed, row.level(axis)), {})[others] = value
        seeds = sorted({row.seed for row in rows if row.seed is not None})
        shared = {
            seed: set.intersection(*(set(found.get((seed, level), {})) for level in levels)) if levels else set()
            for seed in seeds
        }
        used = [seed for seed in seeds if shared[seed]]
        result = []
        for level in levels:
            assert level is not None
            means = [average([found[seed, level][other] for other in shared[seed]]).mean for seed in used]
            settings = average([len(shared[seed]) for seed in used]).mean
            result.append(Level(level, *mean_interval(means), len(used), settings))
        return result

    def standings(self, arm: str) -> list[Standing]:
        """Each setting of an arm at each scale, over its finished seeds; best first by the sweep's metric."""
        key = self.definition.judged
        sign = 1 if self.definition.direction == "minimize" else -1
        rows = [row for row in self.rows if row.arm == arm and row.state == "complete"]
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault((row.scale, tuple(row.setting.items())), []).append(row)
        found = []
        for (scale, setting), members in groups.items():
            names = dict.fromkeys(name for row in members for name in row.metrics)
            metrics = {name: average([row.metrics.get(name, math.nan) for row in members]) for name in names}
            found.append(Standing(arm, scale, dict(setting), metrics, len(members)))
        nothing = average([])

        def rank(standing: Standing) -> tuple[int, float]:
            mean = standing.metrics.get(key, nothing).mean
            return -standing.num_seeds, sign * mean if math.isfinite(mean) else math.inf

        return sorted(found, key=rank)


def build_table(study: SweepStudy) -> Table:
    """The table of what a sweep's storage holds at this moment."""
    from shadowlit.studies.sweep.study import state_of

    definition = study.definition
    rows = []
    for arm, subject in (("Base", "base"), ("Instruct", "instruct")):
        if metrics := _with_mean(_of_subject(study.untouched or {}, subject), definition):
            rows.append(Row("untouched", "complete", arm, metrics=metrics))
    for trial in study.trials:
        if "key" not in trial.user_attrs:
            continue
        key, attributes = trial.user_attrs["key"], trial.user_attrs
        logged = attributes.get("metrics", {})
        cost = {name: float(attributes[name]) for name in _COST if attributes.get(name) is not None}
        for arm in definition.arms:
            if arm[0] != key["source"]:
                continue
            for scale in (None,) if arm[0] == arm[2] else definition.scales:
                who = TUNED if scale is None else Subject("grafted", scale, main=scale == definition.scales[0])
                metrics = _with_mean(_of_subject(logged, who.name), definition)
                rows.append(
                    Row(attributes["name"], state_of(trial), arm, scale, key["seed"], key["setting"], metrics, cost)
                )
    order = {arm: number for number, arm in enumerate(("Base", "Instruct", *definition.arms))}
    return Table(sorted(rows, key=lambda row: (order[row.arm], row.trial, -(row.scale or 0))), definition)


def write_table(table: Table, folder: Path) -> Path:
    """Write ``table.csv``; a number that is missing is an empty cell."""
    axes = [axis.name for axis in table.definition.axes]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_FIXED, *axes, *table.metrics, *_COST])
    for row in table.rows:
        cells: list[Any] = [row.trial, row.state, row.arm, row.scale, row.seed]
        cells += [row.setting.get(axis) for axis in axes]
        cells += [_cell(row.metrics.get(name)) for name in table.metrics] + [_cell(row.cost.get(n)) for n in _COST]
        writer.writerow(cells)
    return replace_text(folder / TABLE, text.getvalue())


def read_table(folder: str | Path) -> Table:
    """Read the table of a sweep's folder, as the last report wrote it.

    Raises:
        ShadowlitError: The folder has none.
    """
    folder = Path(folder)
    try:
        definition = Definition(**json.loads((folder / DEFINITION).read_text(encoding="utf-8"))["definition"])
        text = (folder / TABLE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ShadowlitError(
            f"there is no {error.filename}. Expected the folder of a sweep; python -m shadowlit sweep report writes it."
        ) from None
    axes = {axis.name: axis for axis in definition.axes}
    rows = []
    for cells in csv.DictReader(io.StringIO(text)):
        setting: dict[str, str | float] = {}
        for name, axis in axes.items():
            if cells[name]:
                setting[name] = float(cells[name]) if axis.range is not None else cells[name]
        metrics = {name: float(cell) for name, cell in cells.items()
                   if cell and name not in (*_FIXED, *axes, *_COST)}  # fmt: skip
        cost = {name: float(cells[name]) for name in _COST if cells[name]}
        scale, seed = cells[SCALE], cells["seed"]
        rows.append(
            Row(
                cells["trial"],
                cells["state"],
                cells["arm"],
                float(scale) if scale else None,
                int(seed) if seed else None,
                setting,
                metrics,
                cost,
            )
        )
    return Table(rows, definition)


def write_curves(study: SweepStudy, folder: Path) -> Path:
    """Write ``curves.csv``: trial, optimizer step, and what the trial is judged by there."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "step", "value"])
    for trial in study.trials:
        for step, value in sorted(trial.intermediate_values.items()):
            writer.writerow([trial.user_attrs.get("name"), step, _cell(value)])
    return replace_text(folder / CURVES, text.getvalue())


def read_curves(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each trial while it ran, by its name.

    Raises:
        ShadowlitError: The folder has none.
    """
    file = Path(folder) / CURVES
    if not file.is_file():
        raise ShadowlitError(f"there is no {file}. python -m shadowlit sweep report writes it.")
    rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"))))[1:]
    grouped = itertools.groupby(sorted(rows, key=lambda row: row[0]), key=lambda row: row[0])
    return {name: sorted((int(step), float(value or "nan")) for _, step, value in group) for name, group in grouped}


def _of_subject(logged: Mapping[str, float | None], who: str) -> dict[str, float]:
    prefix = f"val/{who}/"
    return {
        name.removeprefix(prefix): math.nan if value is None else value
        for name, value in logged.items()
        if name.startswith(prefix)
    }


def _with_mean(metrics: dict[str, float], definition: Definition) -> dict[str, float]:
    """Add the mean of what trials are judged by, where all of it was measured."""
    names = [without_subject(metric) for metric in definition.metrics]
    if len(names) < 2 or not all(name in metrics for name in names):
        return metrics
    return {MEAN: sum(metrics[name] for name in names) / len(names), **metrics}


def _cell(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def _order(level: Any) -> tuple[int, float]:
    """Numbers by their size, also those that are labels, then words."""
    try:
        return 0, float(level)
    except (TypeError, ValueError):
        return 1, 0.0


def is_numeric(levels: Iterable[str | float]) -> bool:
    """Whether all levels are numbers."""
    return all(_order(level)[0] == 0 for level in levels)
