"""How an update grows and turns over the checkpoints of a run, finished or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from shadowlit.analysis.deltas import compare_deltas
from shadowlit.analysis.tables import Table
from shadowlit.delta.checkpoints import open_stage, stages
from shadowlit.delta.delta import Delta
from shadowlit.errors import DataError


@dataclass(frozen=True)
class Evolution:
    """The update at several checkpoints of a run.

    Attributes:
        steps: Optimizer steps of the checkpoints, ascending; at least one.
        norms: ``‖Δ_t‖``.
        to_last: ``cos(Δ_t, Δ_last)``.
        moved: ``‖Δ_t − Δ_{t−1}‖``, the first from the Base.
        to_previous: ``cos(Δ_t − Δ_{t−1}, Δ_{t−1})``: 1 where it goes straight on, 0 where it turns off; NaN first.
        kinds: ``‖Δ_t‖`` by kind of tensor.
    """

    steps: tuple[int, ...]
    norms: tuple[float, ...]
    to_last: tuple[float, ...]
    moved: tuple[float, ...]
    to_previous: tuple[float, ...]
    kinds: Mapping[str, tuple[float, ...]]


def evolutions(runs: Mapping[str, str | Path], most: int = 12) -> dict[str, Evolution]:
    """Compare the updates in the checkpoints below the folders of runs, finished or not, in one streamed pass each.

    Example: ``grown = evolutions({"lora": "runs/lora"})``.

    Args:
        runs: Folders by name, with checkpoints of full tuning or LoRA, single files or sharded ones.
        most: Number of checkpoints to read of each, evenly spread, at most 26.

    Raises:
        DataError: There are no checkpoints, or ``most`` is out of range.
    """
    if not 2 <= most <= 26:
        raise DataError(f"most is {most}; expected 2 to 26 checkpoints, which are compared in one pass.")
    followed = {name: stages(run, most) for name, run in runs.items()}
    return {
        name: of_deltas([stage.step for stage in found], [open_stage(stage) for stage in found])
        for name, found in followed.items()
    }


def of_deltas(steps: list[int], deltas: list[Delta]) -> Evolution:
    """As :func:`evolutions`, of the updates at steps that are known, in ascending order."""
    if len(deltas) == 1:  # compared with itself: all that is known of it is its size
        (alone,) = compare_deltas({"a": deltas[0], "b": deltas[0]})
        norm = math.sqrt(alone.whole.sums.square_a)
        kinds = {str(group.key): (math.sqrt(group.sums.square_a),) for group in alone.by_kind()}
        return Evolution(tuple(steps), (norm,), (1.0,), (norm,), (math.nan,), kinds)
    names = [str(step) for step in steps]
    compared = {(found.a, found.b): found for found in compare_deltas(dict(zip(names, deltas, strict=True)))}
    last = names[-1]
    with_last = [compared[name, last] for name in names[:-1]]
    squares = [found.whole.sums.square_a for found in with_last] + [with_last[0].whole.sums.square_b]
    dots = [compared[pair].whole.sums.dot for pair in pairwise(names)]
    moved = [math.sqrt(squares[0])]
    turned = [math.nan]
    for i, dot in enumerate(dots):
        step = math.sqrt(max(0.0, squares[i] + squares[i + 1] - 2 * dot))
        moved.append(step)
        turned.append((dot - squares[i]) / (step * math.sqrt(squares[i])) if step and squares[i] else math.nan)
    return Evolution(
        steps=tuple(steps),
        norms=tuple(map(math.sqrt, squares)),
        to_last=(*(found.whole.sums.cosine for found in with_last), 1.0),
        moved=tuple(moved),
        to_previous=tuple(turned),
        kinds={
            str(each[0].key): (*(math.sqrt(g.sums.square_a) for g in each), math.sqrt(each[0].sums.square_b))
            for each in zip(*(found.by_kind() for found in with_last), strict=True)
        },
    )


def evolution_table(found: Mapping[str, Evolution]) -> Table:
    """Return a row per run and checkpoint. Example: ``evolution_table(grown)``."""
    columns = ("run", "step", "‖Δ‖", "cosine to the last", "moved since the one before", "cosine of that to it")
    rows = [
        (name, *row)
        for name, one in found.items()
        for row in zip(one.steps, one.norms, one.to_last, one.moved, one.to_previous, strict=True)
    ]
    return Table(columns, rows)
