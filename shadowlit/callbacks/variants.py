"""Variants of the graft that one validation compares, and the choice of the one that is exported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shadowlit.delta.transforms import Transforms
from shadowlit.errors import ExportError, GraftError, wrong_names
from shadowlit.grafting.subject import Subject, grafts
from shadowlit.text import is_number, number

BEST = "best"
"""The value of ``export.subject`` that chooses by the scores."""


@dataclass
class Variant:
    """A graft with transforms of its own.

    Args:
        transforms: Transforms of the update, in place of graft.transforms; none for the update as it is.
        scale: Scale of the graft; null for the first of graft.scales.
    """

    transforms: list[dict[str, Any]] = field(default_factory=list)
    scale: float | None = None


def transforms_by_name(variants: Mapping[str, Variant]) -> dict[str, Transforms]:
    """Return the transforms of each variant.

    Raises:
        GraftError: A name can't be a part of a metric's name, or is that of a scale; a scale is not finite; or a
            transform is wrong.
    """
    if wrong := wrong_names("graft.variants", variants):
        raise GraftError(wrong[0])
    for name, variant in variants.items():
        if is_number(name):
            raise GraftError(
                f"graft.variants has the name {name!r}, as which a scale of graft.scales would be logged. Choose "
                "another, e.g. one that begins with a letter."
            )
        if variant.scale is not None and not math.isfinite(variant.scale):
            raise GraftError(f"graft.variants.{name}.scale is {variant.scale}; expected a finite number, or null.")
    return {name: Transforms(each.transforms, f"graft.variants.{name}.transforms") for name, each in variants.items()}


def all_grafts(scales: Sequence[float], variants: Mapping[str, Variant]) -> list[Subject]:
    """Return the grafts of a validation: at all scales, the main one first, and then the variants."""
    return [
        *grafts(scales),
        *(
            Subject("grafted", scales[0] if each.scale is None else each.scale, main=False, variant=name)
            for name, each in variants.items()
        ),
    ]


@dataclass(frozen=True)
class Choice:
    """The graft that scores best, among several.

    Attributes:
        metric: What was compared, as in ``val/<name>/<metric>``.
        mode: Whether the lowest (``min``) or the highest (``max``) value is the best.
        values: Values by the names of the grafts; None where there is none.
        best: The chosen one.
    """

    metric: str
    mode: str
    values: dict[str, float | None]
    best: Subject

    @property
    def line(self) -> str:
        """The choice in words."""
        values = {name: "–" if value is None else number(value) for name, value in self.values.items()}
        best = self.best.name
        others = ", ".join(f"{name} {value}" for name, value in values.items() if name != best)
        return (
            f"best graft: {best}, with val/{best}/{self.metric} {values[best]} ({others}). It was chosen by the "
            "validation data, so this score of its own is optimistic."
        )

    def entry(self) -> dict[str, Any]:
        """Return the choice as manifests hold it."""
        return {
            "metric": self.metric,
            "mode": self.mode,
            "values": self.values,
            "note": "chosen by the validation data, on which its score is optimistic for that reason",
        }


def candidates(name: str, grafts: Sequence[Subject], are_scored: bool) -> list[Subject]:
    """Return the grafts among which ``export.subject`` chooses: the one of that name, or all of them for ``best``.

    Raises:
        ExportError: There is none, or ``best`` has nothing to choose from.
    """
    if name != BEST:
        if chosen := [each for each in grafts if each.name == name]:
            return chosen
        raise ExportError(
            f"export.subject is {name!r}; expected best or one of {', '.join(each.name for each in grafts)}. Correct "
            "it, or add the graft to graft.scales or graft.variants."
        )
    if not are_scored or len(grafts) < 2:
        found = "graft.validate is false" if not are_scored else "there is one graft"
        raise ExportError(
            f"export.subject is best, which compares the scores of several grafts, but {found}. Add others by "
            "graft.scales or graft.variants and let them be validated, or set export.subject=grafted."
        )
    return list(grafts)


def criterion(monitor: str | None, mode: str) -> tuple[str, str]:
    """Return the metric by which grafts are compared, and its mode: what the checkpoint callback monitors of a model.

    ``val/grafted/accuracy`` gives ``accuracy``; where it monitors no ``val/<who>/<what>``, it is the loss.
    """
    stage, _, rest = (monitor or "").partition("/")
    what = rest.partition("/")[2]
    return (what, mode) if stage == "val" and what else ("loss", "min")


def choose(grafts: Sequence[Subject], metrics: Mapping[str, float], metric: str, mode: str) -> Choice | None:
    """Choose the best of several grafts by a validation's metrics; None where none of them has a value.

    Of equal ones the first is chosen.
    """
    found = {each: metrics.get(f"val/{each.name}/{metric}", math.nan) for each in grafts}
    known = {each: value if mode == "max" else -value for each, value in found.items() if not math.isnan(value)}
    if not known:
        return None
    values = {each.name: None if math.isnan(value) else value for each, value in found.items()}
    return Choice(metric, mode, values, max(known, key=lambda each: known[each]))


def losses_line(grafts: Sequence[Subject], metrics: Mapping[str, float], stage: str = "val") -> str | None:
    """Return the loss of every graft; None where there are no variants, or none was measured."""
    found = {each.name: metrics[name] for each in grafts if (name := f"{stage}/{each.name}/loss") in metrics}
    if not found or not any(each.variant for each in grafts):
        return None
    return f"losses of the grafts: {', '.join(f'{name} {number(loss)}' for name, loss in found.items())}"
