"""The rows that every study consists of, their means over seeds, and ``table.csv``."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shadowlit.errors import DataError
from shadowlit.studies.arms import ARMS
from shadowlit.studies.statistics import Average, average

TABLE = "table.csv"
LR, SCALE = "model.lr", "scale"
UNTOUCHED_TRIAL = "untouched"
"""The job that measures the Base and the Instruct, and the name of its folder."""
_FIXED = ("trial", "state", "arm", SCALE, "seed")
COST = (
    "step", "wall_s", "train_s", "evaluation_s", "tokens_per_s", "peak_memory_bytes", "trained_parameters",
    "train_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """An arm at one scale λ, None where nothing is grafted, and one setting, e.g. ``{"model.lr": 0.001}``.

    The untouched models have neither.
    """

    arm: str
    scale: float | None = None
    setting: Mapping[str, str | float] = field(default_factory=dict)

    @property
    def lr(self) -> float | None:
        """Peak learning rate, where the setting names it."""
        return float(self.setting[LR]) if LR in self.setting else None

    @property
    def is_whole(self) -> bool:
        """Whether the whole delta is in the model (λ = 1), as in the comparison of arms; true if nothing is grafted."""
        return self.scale in (None, 1.0)

    def level(self, axis: str) -> str | float | None:
        """Label or number on an axis; the scale is an axis too."""
        return self.scale if axis == SCALE else self.setting.get(axis)


@dataclass(frozen=True)
class Row(Place):
    """One arm of one trial at one scale, or an untouched model.

    A number that is missing or not finite counts as not measured.

    Attributes:
        seed: Seed of the training; None for the untouched models.
        trial: Name of the training and of its folder.
        state: waiting, running, complete, pruned, diverged or failed.
        metrics: Metrics as logged after ``val/<subject>/``: ``new/score``, ``forgetting/kl``, ``loss``, ``old/loss``.
        samples: Score of every row of an evaluator's file, by evaluator and index of the row. Scores are 0 to 1.
        cost: ``wall_s``, ``train_s``, ``peak_memory_bytes``, ``trained_parameters`` …
        facts: ``sigma`` of the pair; ``cos_deltas``, the cosine of the updates of Base and Instruct at the same rate
            (by rank in the list) and seed; ``delta_norm``; ``relative_delta``, to the Instruct's norm;
            ``delta_over_offset``; ``survival`` in the exported dtype.
        line: Validation loss (nats per token) by scale, on the line from the target to the graft; may be empty.
    """

    seed: int | None = None
    trial: str = UNTOUCHED_TRIAL
    state: str = "complete"
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    line: Mapping[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise DataError(f"a row is of the arm {self.arm!r}; expected one of {', '.join(ARMS)}.")


@dataclass(frozen=True)
class Standing(Place):
    """An arm at one scale and setting: the means of its metrics over seeds."""

    metrics: Mapping[str, Average] = field(default_factory=dict)
    num_seeds: int = 0

    def __getitem__(self, metric: str) -> Average:
        """The mean of a metric; one of no values if there is none of that name."""
        return self.metrics.get(metric) or average([])


def standing_of(arm: str, rows: Sequence[Row], metrics: Iterable[str], expected: int | None = None) -> Standing:
    """Return the standing of an arm from its rows, if any, which differ in their seeds alone.

    ``expected`` is the number of seeds that there should be; None for as many as there are.
    """
    means = {name: average([row.metrics.get(name, math.nan) for row in rows], expected) for name in metrics}
    scale, setting = (rows[0].scale, rows[0].setting) if rows else (None, {})
    return Standing(arm, scale, setting, means, len(rows))


def by_place(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows in groups that differ in their seeds alone, in the order of their first ones."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.scale, *row.setting.items()), []).append(row)
    return list(groups.values())


def metric_names(rows: Iterable[Row]) -> list[str]:
    """Return the names of everything that was measured, in alphabetical order."""
    return sorted({name for row in rows for name in row.metrics})


def to_csv(rows: Sequence[Row], axes: Sequence[str]) -> str:
    """Return the rows as ``table.csv`` has them, one a line; a number that is missing is an empty cell.

    The columns are trial, state, arm, scale, seed, the axes, the metrics in alphabetical order, and the cost.
    """
    numbers = [*metric_names(rows), *(name for name in COST if any(name in row.cost for row in rows))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_FIXED, *axes, *numbers])
    for row in rows:
        found = {**row.metrics, **row.cost}
        fixed = [row.trial, row.state, row.arm, row.scale, row.seed, *(row.setting.get(axis) for axis in axes)]
        writer.writerow([*fixed, *(cell(found.get(name)) for name in numbers)])
    return text.getvalue()


def from_csv(text: str, axes: Mapping[str, bool]) -> list[Row]:
    """Return the rows from :func:`to_csv`; an axis that is true has numbers, one that is false has labels."""
    rows = []
    for cells in csv.DictReader(io.StringIO(text)):
        numbers = {name: value for name, value in cells.items() if value and name not in (*_FIXED, *axes)}
        rows.append(
            Row(
                cells["arm"],
                float(cells[SCALE]) if cells[SCALE] else None,
                {axis: float(cells[axis]) if numeric else cells[axis] for axis, numeric in axes.items() if cells[axis]},
                int(cells["seed"]) if cells["seed"] else None,
                cells["trial"],
                cells["state"],
                metrics={name: float(value) for name, value in numbers.items() if name not in COST},
                cost={name: float(value) for name, value in numbers.items() if name in COST},
            )
        )
    return rows


def cell(value: float | None) -> str:
    """Return a number as a CSV file has it, exact; empty where it is missing or not finite."""
    return "" if value is None or not math.isfinite(value) else repr(float(value))
