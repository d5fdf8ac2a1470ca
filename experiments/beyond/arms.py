"""The arms of the study: weights of the Instruct in a training on both anchors, and changes of the Base's update."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.real.score import Scorer
from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.template import Encoded
from shadowlit.delta.delta import Delta
from shadowlit.delta.transforms import gradfix
from shadowlit.grafting.parameters import host_parameters
from shadowlit.grafting.scales import FitScales, Keep
from shadowlit.training.fit_scales import fit_scales
from shadowlit.training.gradient_signs import sign_votes

ANCHORS: dict[str, dict[str, float]] = {
    "A0.25": {"instruct": 0.25},
    "A0.5": {"instruct": 0.5},
    "A0.75": {"instruct": 0.75},
    "late": {"instruct": 0.5, "last": 0.25},
}
"""``model.anchors`` by name of the arm."""
_KEPT = 24  # rows of what should be kept, in the fit of scales
_VOTES = 31  # rows that vote on the signs of GradFix, the default of graft.variants


def _fitted(groups: Any) -> Callable[..., tuple[Delta, dict[str, Any]]]:
    """The update with a scale for each group, fitted on the rows for choosing and on others that should be kept."""

    def change(delta: Delta, scorer: Scorer, rows: list[Encoded], kept: list[Encoded]) -> tuple[Delta, dict[str, Any]]:
        samples, keep = ([{"input_ids": r.input_ids, "labels": r.labels} for r in some] for some in (rows, kept))
        options = FitScales("", groups=groups, keep=Keep("", weight=1.0))
        fitted = fit_scales(scorer.model, delta, samples, options, keep)
        update = {name: delta.tensor(name) * fitted.by_tensor[name] for name in delta.shapes}
        return Delta.of(update), {"scales": fitted.scales, "history": fitted.history}

    return change


def _grad_fix(delta: Delta, scorer: Scorer, rows: list[Encoded], kept: list[Encoded]) -> tuple[Delta, dict[str, Any]]:
    """The elements of the update that descend the Instruct's own loss on most rows (arXiv 2510.09658)."""
    signs = signs_of(scorer.model, delta.shapes, rows[:_VOTES])
    update = {name: gradfix(delta.tensor(name), gradient_signs=signs.pop(name)) for name in delta.shapes}
    left = sum(int(tensor.count_nonzero()) for tensor in update.values())
    return Delta.of(update), {"kept": left / sum(tensor.numel() for tensor in update.values())}


CHANGED: dict[str, Callable[..., tuple[Delta, dict[str, Any]]]] = {
    "fitted_layer": _fitted("layer"),
    "fitted_kind": _fitted("kind"),
    "gradfix": _grad_fix,
}
"""Changes of the Base's update by name of the arm: nothing is trained for them."""


def changed(source: str, delta: Delta, scorer: Scorer, calibration: Mapping[str, Path]) -> tuple[Delta, dict[str, Any]]:
    """The Base's update, changed as the arm says, and what is worth keeping of how.

    Args:
        source: Name in :data:`CHANGED`.
        delta: The Base's update.
        scorer: Its model is used, and has the Instruct's weights afterwards.
        calibration: Files of rows: ``task`` and ``kept``.
    """
    scorer.load(scorer.instruct)
    rows, kept = scorer.read(calibration["task"]), scorer.read(calibration["kept"])[:_KEPT]
    return CHANGED[source](delta, scorer, rows, kept)


def signs_of(model: Any, names: Container[str], rows: list[Encoded]) -> dict[str, Tensor]:
    """The sign that the loss's gradient has on most rows, by the model's parameters of these names."""
    parameters = {name: parameter for name, parameter in host_parameters(model).items() if name in names}

    def losses() -> Iterator[Tensor]:
        for row in rows:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            labels = torch.tensor(row.labels[1:])
            yield torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")

    return {name: votes.sign() for name, votes in sign_votes(model, parameters, losses()).items()}
