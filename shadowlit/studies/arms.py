"""The arms of a study, and the names under which a training logs the models that they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from shadowlit.grafting.subject import TUNED as TUNED_SUBJECT
from shadowlit.grafting.subject import grafts

UNTOUCHED = ("Base", "Instruct")
"""The two reference models, which nothing is trained for."""
TUNED = ("B2B", "B2I", "I2B", "I2I")
"""The arms, each named by the source of its delta and the target of the graft."""
ARMS = UNTOUCHED + TUNED


def is_grafted(arm: str) -> bool:
    """Return whether the arm is a delta on the other model, and not the model that was trained."""
    return arm in TUNED and arm[0] != arm[2]


def subject_of(arm: str, scale: float | None, scales: Sequence[float]) -> str:
    """Return the name of an arm's model in a training's metrics: ``tuned``, ``grafted``, ``grafted@0.5``, ``base``.

    The first of all scales of the training is the plain ``grafted``; where nothing is grafted, the scale is ignored.
    """
    if arm in UNTOUCHED:
        return arm.lower()
    if not is_grafted(arm):
        return TUNED_SUBJECT.name
    return next(subject.name for subject in grafts(scales) if subject.scale == scale)


def metrics_of(logged: Mapping[str, float | None], subject: str) -> dict[str, float]:
    """Return the metrics of one model without their prefix ``val/<subject>/``; None becomes NaN."""
    prefix = f"val/{subject}/"
    return {
        name.removeprefix(prefix): math.nan if value is None else value
        for name, value in logged.items()
        if name.startswith(prefix)
    }


def without_subject(metric: str) -> str:
    """``loss`` for ``val/grafted/loss``."""
    return metric.split("/", 2)[2] if metric.startswith("val/") else metric
