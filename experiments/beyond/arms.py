"""The arms of the study: weights of the Instruct in a training on both anchors, and changes of a trained update."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.real.score import Scorer
from experiments.real.study import Training
from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.template import Encoded
from shadowlit.delta.delta import Delta
from shadowlit.delta.transforms import gradfix
from shadowlit.grafting.parameters import host_parameters
from shadowlit.grafting.scales import FitScales, Keep, group_of
from shadowlit.training.fit_scales import fit_scales
from shadowlit.training.gradient_signs import sign_votes

ANCHORS: dict[str, dict[str, float]] = {
    "A0.25": {"instruct": 0.25},
    "A0.5": {"instruct": 0.5},
    "A0.75": {"instruct": 0.75},
    "late": {"instruct": 0.5, "last": 0.25},
    "B_kl": {"instruct": 0.0, "kl": 1.0},
    "A0.5_kl": {"instruct": 0.5, "kl": 1.0},
    "I_kl": {"instruct": 1.0, "kl": 1.0},
}
"""``model.anchors`` by name of the arm; ``kl`` is its weight, on the rows that the study keeps."""
_KEPT = 24  # rows of what should be kept, in the fit of scales: the first ones
FITS: dict[str, dict[str, Any]] = {"embedded": {"steps": 60}, "near": {"steps": 15}}
"""Options of a fit of scales by pair; on the real one, a pass takes two minutes."""
_VOTES = 31  # rows that vote on the signs of GradFix at most, the default of graft.variants


class Given(NamedTuple):
    """What an update may be changed by."""

    scorer: Scorer  # whose model has the Instruct's weights
    rows: list[Encoded]  # of the task
    kept: list[Encoded]  # of what the Instruct could do before
    training: Training  # whose pair has options of a fit, and whose seed one of a random transform
    known: Mapping[str, Any]  # what is known of how, if the update has been changed before


Change = Callable[[Delta, Given], tuple[Delta, dict[str, Any]]]
"""Changes an update, and says what is worth keeping of how."""


def anchors_of(source: str, kept: Path) -> dict[str, Any]:
    """``model.anchors`` of an arm; ``kept`` has the rows on which it is kept near the Instruct."""
    found: dict[str, Any] = dict(ANCHORS[source])
    return {**found, "kl": {"data": kept, "weight": found["kl"]}} if "kl" in found else found


def _fitted(groups: Any) -> Change:
    """The update with a scale for each group, fitted on the rows for choosing and on others that should be kept."""

    def change(delta: Delta, given: Given) -> tuple[Delta, dict[str, Any]]:
        about = {name: given.known[name] for name in ("scales", "history") if name in given.known}
        if not about:
            both = (given.rows, given.kept)
            samples, keep = ([{"input_ids": r.input_ids, "labels": r.labels} for r in some] for some in both)
            options = FitScales("", groups=groups, keep=Keep("", weight=1.0), **FITS[given.training.pair])
            fitted = fit_scales(given.scorer.model, delta, samples, options, keep, dtype=given.scorer.stored)
            about = {"scales": fitted.scales, "history": fitted.history}
        update = {name: delta.tensor(name) * about["scales"][group_of(name, groups)] for name in delta.shapes}
        return Delta.of(update), about

    return change


def _grad_fix(delta: Delta, given: Given) -> tuple[Delta, dict[str, Any]]:
    """The elements of the update that descend the Instruct's own loss on most rows (arXiv 2510.09658)."""
    count = min(len(given.rows), _VOTES)
    rows = given.rows[: count - (count % 2 == 0)]  # an odd number, since a tie would drop an element
    signs = signs_of(given.scorer.model, delta.shapes, rows)
    return _measured({name: gradfix(delta.tensor(name), gradient_signs=signs.pop(name)) for name in delta.shapes})


def _transformed(name: str, is_random: bool = False, **parameters: Any) -> Change:
    """The update with a transform; a random one is seeded as the training is."""

    def change(delta: Delta, given: Given) -> tuple[Delta, dict[str, Any]]:
        found = delta.map([{"name": name, **parameters, **({"seed": given.training.seed} if is_random else {})}])
        update, about = _measured({name: found.tensor(name) for name in found.shapes})
        return update, {**about, "transforms": found.transforms}

    return change


def _measured(update: dict[str, Tensor]) -> tuple[Delta, dict[str, Any]]:
    """An update in memory, and which fraction of its elements is not zero."""
    left = sum(int(tensor.count_nonzero()) for tensor in update.values())
    return Delta.of(update), {"kept": left / sum(tensor.numel() for tensor in update.values())}


CHANGED: dict[str, Change] = {
    "fitted_all": _fitted("all"),
    "fitted_layer": _fitted("layer"),
    "fitted_kind": _fitted("kind"),
    "fitted_tensor": _fitted("tensor"),
    "I_fitted_kind": _fitted("kind"),
    "I_fitted_tensor": _fitted("tensor"),
    "gradfix": _grad_fix,
    "ties": _transformed("ties", density=0.2),
    "dare": _transformed("dare", is_random=True, density=0.2),
    "magnitude": _transformed("magnitude", density=0.1),
    "svd8": _transformed("svd", rank=8),
}
"""Changes of an update by name of the arm: nothing is trained for them."""
FITTED = [arm for arm in CHANGED if "fitted" in arm]
"""Changes that are fits of scales."""
BY_ROWS = {*FITTED, "gradfix"}
"""Changes that depend on rows."""


def trained_as(source: str) -> str:
    """The arm whose training an arm's update is from: its own, or that of B2I or I2I if their update is changed."""
    if source not in CHANGED:
        return source
    return "I" if source.startswith("I_") else "B"


def changed(
    training: Training, delta: Delta, scorer: Scorer, kept: Path, known: Mapping[str, Any]
) -> tuple[Delta, dict[str, Any]]:
    """A trained update, changed as the arm says, and what is worth keeping of how.

    Args:
        training: What the update is from, with the arm as its source.
        delta: The update of B2I or I2I.
        scorer: Its model is used, and has the Instruct's weights afterwards.
        kept: File of what should be kept; the rows of the task are those for choosing, as they are scored.
        known: The result of the same change, if there is one: what has been fitted is not fitted again.
    """
    scorer.load(scorer.instruct)
    given = Given(scorer, scorer.rows["choice"], scorer.read(kept)[:_KEPT], training, known)
    return CHANGED[training.source](delta, given)


def signs_of(model: Any, names: Container[str], rows: list[Encoded]) -> dict[str, Tensor]:
    """The sign that the loss's gradient has on most rows, by the model's parameters of these names."""
    parameters = {name: parameter for name, parameter in host_parameters(model).items() if name in names}

    def losses() -> Iterator[Tensor]:
        for row in rows:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            labels = torch.tensor(row.labels[1:])
            yield torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")

    return {name: votes.sign() for name, votes in sign_votes(model, parameters, losses()).items()}
