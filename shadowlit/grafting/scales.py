"""Scales of an update by group of tensors, found on held-out data.

The graft with a scale for each group g of tensors is ``W(λ) = W_I + Σ_g λ_g Δ_g``, with the Instruct's weights W_I and
the update Δ, of which Δ_g has the tensors of the group. By the chain rule a loss changes with a scale as

    dL/dλ_g = ⟨∂L/∂W at W(λ), Δ_g⟩,

the sum over the group's elements. So one backward pass gives the derivatives by all scales, and no gradient has to be
kept: the inner product of a parameter's gradient with its update is one number. Minimised is

    J(λ) = L(λ) + w · KL(λ) + pull · mean_g (λ_g − λ₀)²,

where L is the cross entropy per supervised token of the calibration rows, KL the divergence ``KL(graft ‖ Instruct)``
per supervised token of other rows, which the task should not change, and λ₀ the scale that the graft has otherwise (1
in the paper). L is not the training's objective: the value of one that weighs tokens without a gradient (DFT, EAFT)
also falls where the answers become unlikely, and would choose wrong scales. J is a function of a few numbers without
noise from batches, and smooth but for the rounding of the weights, so L-BFGS (SciPy's L-BFGS-B) minimises it from λ₀.
It finds a local minimum. Of the scales that were visited, those with the lowest J are the result, so that it is never
above J(λ₀). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from shadowlit.checkpoint.names import kind_of, layer_label, layer_of, module_of
from shadowlit.data.given import Given, path_in, place_of
from shadowlit.errors import GraftError, counted
from shadowlit.text import number

Grouping = Literal["layer", "kind", "tensor", "all"]
OUTSIDE = "other"
"""Group of the tensors outside of numbered layers."""
EVERYTHING = "all"
"""The rule by which all tensors have one scale, and the name of their group."""
_FIRST = 0.25  # length of the first step over all scales; L-BFGS finds the others
_TOLERANCE = 1e-4  # of J: a step that gains less, relative to J or to 1, is the last one


@dataclass
class Keep:
    """Rows on which the graft should answer as the untouched Instruct does.

    Args:
        data: Source of the rows: conversations or plain text, as for training; a path, or a mapping of ``path`` and
            how it is read.
        weight: Weight of the divergence KL(graft ‖ Instruct) per supervised token of these rows; above 0.
    """

    data: Given
    weight: float = 1.0


@dataclass
class FitScales:
    """How the scales of groups of tensors are found when a training ends; see :mod:`shadowlit.grafting.scales`.

    Args:
        data: Source of the calibration rows, which neither trains nor validates; a path, or a mapping of path and how
            it is read (format, columns, ignore_columns, max_rows).
        groups: Groups that have a scale each: decoder layers (layer; other for what is outside of them), kinds of
            tensors (kind: q_proj, k_proj, …), single tensors (tensor; a bias belongs to its weight), or one group of
            everything (all: a single scale).
        steps: Largest number of forward and backward passes over all calibration rows.
        pull: Weight of the mean squared distance of the scales from the one that the graft has otherwise; at least 0.
        keep: Rows on which the graft is kept near the untouched Instruct; null for none.
        batch_size: Rows per rank and batch; null for data.batch_size, or 8 on disk.
    """

    data: Given
    groups: Grouping = "layer"
    steps: int = 60
    pull: float = 0.01
    keep: Keep | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Raise if the groups are unknown or a number is out of its range."""
        if self.groups not in get_args(Grouping):
            raise GraftError(
                f"fit_scales.groups is {self.groups!r}; expected one of {', '.join(get_args(Grouping))}. Choose one."
            )
        weight = 1.0 if self.keep is None else self.keep.weight
        if self.steps < 1 or not (math.isfinite(weight) and math.isfinite(self.pull)) or weight <= 0 or self.pull < 0:
            raise GraftError(
                f"fit_scales is {self}; expected at least one step, keep.weight above 0 and a pull of at least 0, both "
                "finite. Correct it, e.g. {data: calibration.jsonl, groups: layer, steps: 60}."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise GraftError(f"fit_scales.batch_size is {self.batch_size}; expected at least 1, or null.")
        if self.keep is not None and self.data and place_of(self.data) == place_of(self.keep.data):
            raise GraftError(
                f"fit_scales.data and fit_scales.keep.data are both {path_in(self.data)}, so that the graft would have "
                "to learn these rows and to answer them as the Instruct does. Give keep rows that the task should not "
                "change."
            )

    @property
    def sources(self) -> dict[str, Given]:
        """The sources of the rows by their keys in the configuration of a training."""
        keep = {} if self.keep is None else {"graft.fit_scales.keep.data": self.keep.data}
        return {"graft.fit_scales.data": self.data, **keep}


@dataclass(frozen=True)
class Measured:
    """What one pass over the calibration rows has measured.

    Attributes:
        loss: Cross entropy in nats per supervised token.
        kl: ``KL(graft ‖ Instruct)`` in nats per supervised token of the rows to keep; 0 without such rows.
        slopes: Derivative of ``loss + weight · kl`` by the scale of each group.
    """

    loss: float
    kl: float = 0.0
    slopes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedScales:
    """Scales by group of tensors, and how they were found.

    Attributes:
        groups: Rule by which tensors are grouped.
        scales: Scale of each group, exactly representable in float32.
        by_tensor: Scale of each grafted parameter, by name.
        start: Scale that all of them started from.
        step: Place of the scales in ``history``, 0 for the start.
        history: ``loss``, ``kl`` and ``objective`` of all scales that were visited.
        ended: Why the fit ended before a step gained too little to continue; empty if it did not.
    """

    groups: str
    scales: dict[str, float]
    by_tensor: dict[str, float]
    start: float
    step: int
    history: list[dict[str, float]]
    ended: str = ""

    @property
    def line(self) -> str:
        """The scales and what they gain on the calibration rows, in words."""
        least, most = (pick(self.scales, key=self.scales.__getitem__) for pick in (min, max))
        before, after = self.history[0], self.history[self.step]
        found = f"{counted(len(self.scales), 'group')} by {self.groups}"
        values = f"{self.scales[least]:.3f} ({least}) to {self.scales[most]:.3f} ({most})"
        if self.groups == EVERYTHING:
            found, values = "one for all tensors", f"{self.scales[EVERYTHING]:.3f}"
        line = f"scales: {found}, {values}: calibration loss {number(before['loss'])} → {number(after['loss'])}"
        if any(entry["kl"] for entry in self.history):
            line += f", divergence from the Instruct {number(before['kl'])} → {number(after['kl'])}"
        return f"{line}; {self.ended}" if self.ended else line

    @property
    def about(self) -> dict[str, Any]:
        """What a manifest has of it: everything except the scales of single parameters."""
        return {
            "groups": self.groups, "scales": self.scales, "start": self.start, "step": self.step,
            "passes": len(self.history), "ended": self.ended,
            "before": self.history[0], "after": self.history[self.step],
        }  # fmt: skip


def group_of(name: str, groups: Grouping) -> str:
    """Return the group of a tensor by its name in the files: ``layer_07``, ``q_proj``, the tensor's own module, or
    ``all``.
    """
    if groups == EVERYTHING:
        return EVERYTHING
    if groups == "layer":
        return OUTSIDE if layer_of(name) is None else layer_label(name)
    return kind_of(name) if groups == "kind" else module_of(name)


def fit(
    measure: Callable[[Mapping[str, float]], Measured],
    names: Iterable[str],
    options: FitScales,
    start: float = 1.0,
) -> FittedScales:
    """Find the scales of groups of tensors; see the module's docstring.

    Args:
        measure: Function from the scale of each group to what is measured with them.
        names: Names of the grafted tensors.
        options: Groups, steps, pull and weights.
        start: Scale λ₀ that the graft has otherwise.

    Raises:
        NotFiniteError: The loss or a slope is not finite at the start.
    """
    from scipy.optimize import minimize  # late, since it takes tenths of a second

    by_name = {name: group_of(name, options.groups) for name in names}
    groups = list(dict.fromkeys(by_name.values()))
    weight = 0.0 if options.keep is None else options.keep.weight
    visited: list[dict[str, float]] = []
    history: list[dict[str, float]] = []

    def objective(moved: np.ndarray) -> tuple[float, np.ndarray]:
        if len(history) >= options.steps:
            raise _Stopped("all steps were taken before the end: raise steps")
        # Float32 multiplies the update by what is stored.
        scales = (start + _FIRST * moved).astype(np.float32).astype(np.float64)
        by_group = dict(zip(groups, scales.tolist(), strict=True))
        found = measure(by_group)
        distance = scales - start
        value = found.loss + weight * found.kl + options.pull * float(np.square(distance).mean())
        slopes = np.array([found.slopes.get(group, 0.0) for group in groups])
        if not (math.isfinite(value) and np.isfinite(slopes).all()):
            if history:
                raise _Stopped(f"pass {len(history) + 1} had a loss or a derivative that was not finite: raise pull")
            raise NotFiniteError(
                f"fit_scales: the loss of the calibration rows is {found.loss:.4g} and the divergence {found.kl:.4g} "
                f"at a scale of {start:g}, or a derivative of theirs is not finite. Check the rows and the training."
            )
        visited.append(by_group)
        history.append({"loss": found.loss, "kl": found.kl, "objective": value})
        return value, _FIRST * (slopes + 2 * options.pull / len(groups) * distance)

    ended = ""
    try:
        at = np.zeros(len(groups))
        result = minimize(objective, at, jac=True, method="L-BFGS-B", options={"ftol": _TOLERANCE})
        if not result.success:
            ended = "the line search found nothing lower"
    except _Stopped as stopped:
        ended = str(stopped)
    best = min(range(len(history)), key=lambda step: history[step]["objective"])
    by_tensor = {name: visited[best][group] for name, group in by_name.items()}
    return FittedScales(options.groups, visited[best], by_tensor, start, best, history, ended)


class NotFiniteError(GraftError):
    """A fit that can't start; of several ranks, the one that runs the optimizer alone finds it."""


class _Stopped(Exception):
    """The fit can't continue; what was found so far counts."""
