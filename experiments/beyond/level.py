"""Scores of an update at the scale where it diverges from the Instruct as far as the others, measured there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scipy.optimize import brentq

from experiments.real.reading import read_result
from experiments.real.report import KL, Rows, Run, per_token, rows
from experiments.real.score import Scorer
from experiments.real.study import compact
from shadowlit.delta.delta import Delta
from shadowlit.files import replace_text

_FARTHEST = 4.0  # scale of an update that hardly diverges
_TOLERANCE = 1e-3  # of the scale, relative


@dataclass(frozen=True)
class AtLevel:
    """What is measured of a run at one divergence from the Instruct.

    Attributes:
        kl: The divergence that was asked for, in nats per token.
        scale: Scale at which the update first diverges so far; None if it doesn't up to a scale of 4.
        scores: Rows of each set at this scale; empty without one.
    """

    kl: float
    scale: float | None
    scores: Mapping[str, Rows]


def file_of(results: Path, setting: str, run: Run) -> Path:
    """File of what is measured of a run at the level of its setting."""
    return results / setting / "level" / f"{run.source}_lr{run.lr:g}_seed{run.seed}.json"


def read_level(file: Path, run: Run) -> AtLevel | None:
    """What has been measured of a run; None if nothing has, or if it is that of another recipe."""
    if not file.exists():
        return None
    raw, found = read_result(
        file,
        lambda raw: (raw, AtLevel(raw["kl"], raw["scale"], {name: rows(v) for name, v in raw["scores"].items()})),
    )
    return found if raw["made"] == _made(run) else None


def write_level(file: Path, run: Run, kl: float, scorer: Scorer, delta: Delta) -> None:
    """Find the scale at which the update of a run diverges by ``kl``, score it there, and write it down."""

    def divergence(scale: float) -> float:
        scorer.load_graft(delta, scale)
        return per_token(rows(scorer.measure("general")), KL)

    scale = scale_at(kl, {known: run.divergence(known) for known in run.path}, divergence)
    scores = {}
    if scale is not None:
        scorer.load_graft(delta, scale)
        scores = {name: scorer.measure(name) for name in scorer.rows}
    replace_text(file, compact({"made": _made(run), "kl": kl, "scale": scale, "scores": scores}))


def scale_at(kl: float, known: Mapping[float, float], measure: Callable[[float], float]) -> float | None:
    """The scale at which an update first diverges by ``kl``, to a thousandth; None if not even at 4.

    Args:
        kl: Divergence from the Instruct in nats per token.
        known: Measured divergences by scale, among them 0 at 0. Between two of them the divergence is taken to be
            monotonic.
        measure: Function from a scale to its divergence.
    """
    found = dict(known)
    while max(found.values()) < kl:
        if (last := max(found)) >= _FARTHEST:
            return None
        further = min(2 * last, _FARTHEST)
        found[further] = measure(further)

    def distance(scale: float) -> float:  # in the square root, which is nearly linear in the scale
        value = found[scale] if scale in found else measure(scale)
        return math.sqrt(max(0.0, value)) - math.sqrt(kl)

    low, high = next(pair for pair in itertools.pairwise(sorted(found)) if found[pair[0]] <= kl <= found[pair[1]])
    return float(brentq(distance, low, high, xtol=1e-6, rtol=_TOLERANCE))


def _made(run: Run) -> list[str | None]:
    """By what the training and the change of an update are recognised."""
    return [run.raw.get(name) for name in ("recipe", "calibration")]
