"""Measures a graft and its derivatives by scales of groups of tensors, in a training or on a model in memory.

The derivation is in :mod:`shadowlit.grafting.scales`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint.headers import some_of
from shadowlit.data.collate import Collate
from shadowlit.data.module import ShadowData
from shadowlit.delta.delta import Delta
from shadowlit.errors import GraftError
from shadowlit.grafting.arithmetic import accumulation_dtype, add_delta, inner_product
from shadowlit.grafting.disk import DiskGraft
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.parameters import host_parameters
from shadowlit.grafting.scales import FitScales, FittedScales, Measured, fit, group_of
from shadowlit.grafting.subject import INSTRUCT, Subject
from shadowlit.pair.pair import ModelPair
from shadowlit.plugins import path_of
from shadowlit.training.gradients import deterministic, gradients_of
from shadowlit.training.head import HeadLoss, Predictions
from shadowlit.training.objectives import Objective
from shadowlit.training.objectives.tokens import divergence_sums
from shadowlit.training.outputs import Batch, Outputs


class ScaledGraft(Protocol):
    """A model whose weights can be those of a graft with any scales.

    Attributes:
        model: The model.
    """

    model: nn.Module

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Grafted parameters by name."""

    def update(self, name: str) -> Tensor:
        """Return this rank's part of a parameter's update, before it is scaled."""

    def scaled(self, scales: Mapping[str, float] | None) -> AbstractContextManager[None]:
        """Load the graft with these scales by parameter within the context; the untouched Instruct for None."""


class LiveScaledGraft:
    """The graft of a module that was trained, whose weights are swapped in and out."""

    def __init__(self, graft: LiveGraft, subject: Subject) -> None:
        self._graft, self._subject, self.model = graft, subject, graft.model
        self.parameters = graft.grafted_parameters

    def update(self, name: str) -> Tensor:
        """See :class:`ScaledGraft`."""
        return self._graft.update_of(name, self._subject.variant)

    @contextmanager
    def scaled(self, scales: Mapping[str, float] | None) -> Iterator[None]:
        """See :class:`ScaledGraft`."""
        graft, before = self._graft, self._graft.fitted
        graft.fitted = {} if scales is None else scales
        try:
            with graft.applied(INSTRUCT if scales is None else self._subject):
                yield
        finally:
            graft.fitted = before


class MemoryScaledGraft:
    """The graft of an update on an Instruct in memory, whose own weights are restored after each context.

    In memory are copies of the grafted weights, and the update in float32.

    Args:
        model: A transformers model with the Instruct's weights.
        update: The update; every tensor of it is grafted.
        dtype: Dtype that grafted weights are rounded to, as an export rounds them; None for the model's.

    Raises:
        GraftError: A tensor of the update is not a parameter of the model, or has another shape.
    """

    def __init__(
        self, model: nn.Module, update: Delta | Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> None:
        self.model, self._dtype, own = model, dtype, host_parameters(model)
        delta = update if isinstance(update, Delta) else Delta.of(update)
        wrong = [n for n, shape in delta.shapes.items() if n not in own or tuple(own[n].shape) != tuple(shape)]
        if wrong or not delta.shapes:
            raise GraftError(
                f"the update has {some_of(wrong) or 'no tensor'}, expected parameters of {type(model).__name__} in "
                "their shapes. Give an update of this model under its own names; Delta.only leaves tensors out."
            )
        self.parameters = {name: own[name] for name in delta.shapes}
        self._updates = {name: delta.tensor(name) for name in delta.shapes}
        self._instruct = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def update(self, name: str) -> Tensor:
        """See :class:`ScaledGraft`."""
        return self._updates[name]

    @contextmanager
    def scaled(self, scales: Mapping[str, float] | None) -> Iterator[None]:
        """See :class:`ScaledGraft`."""
        try:
            with torch.no_grad():
                for name, scale in (scales or {}).items():
                    own = self._instruct[name]
                    grafted = add_delta(own, self._updates[name].to(own.device), scale)
                    self.parameters[name].copy_(grafted.to(self._dtype or own.dtype))
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self._instruct[name])


class Calibration:
    """The losses of a graft on calibration rows, with their derivatives by the scales of groups; a collective.

    Sums over rows are added over the ranks and divided once by their counts. Without FSDP2 every rank has whole
    gradients of its own rows; with it each has its shard of their mean over all ranks.

    Args:
        host: Graft.
        options: Groups and weights.
        rows: This rank's batches of the calibration rows, as many on every rank.
        keep: This rank's batches of the rows to keep, likewise; empty for none.
        head: Losses of the model.
        autocast: Context that forward passes run in.
        move: Function that brings a batch to the model's device.
    """

    def __init__(
        self,
        host: ScaledGraft,
        options: FitScales,
        rows: Sequence[Batch],
        keep: Sequence[Batch],
        head: HeadLoss,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        move: Callable[[Any], Batch],
    ) -> None:
        self._host, self._options, self._rows, self._keep, self._head = host, options, rows, keep, head
        self._autocast, self._move = autocast, move
        self._groups = {name: group_of(name, options.groups) for name in host.parameters}
        self._predictions: list[Predictions] = []  # of the Instruct, for each batch of `keep`
        self._ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        sharded = any(isinstance(parameter, DTensor) for parameter in host.model.parameters())
        self._factor = self._ranks if sharded else 1  # FSDP2 divides by the ranks: undo it, the sum is what counts

    def __call__(self, scales: Mapping[str, float]) -> Measured:
        """Return what is measured with the scale of each group."""
        if self._keep and not self._predictions:
            self._predict()
        with self._holding({name: scales[group] for name, group in self._groups.items()}):
            loss, slopes = self._pass(self._rows, self._step)
            kl, others = self._pass(self._keep, self._divergence) if self._keep else (0.0, {})
        weight = self._options.keep.weight if self._options.keep is not None else 0.0
        return Measured(loss, kl, {group: slope + weight * others.get(group, 0.0) for group, slope in slopes.items()})

    @contextmanager
    def _holding(self, scales: Mapping[str, float] | None) -> Iterator[None]:
        """Load weights within the context. A caller's autocast would keep using its casts of those before."""
        try:
            with self._host.scaled(scales):
                torch.clear_autocast_cache()
                yield
        finally:
            torch.clear_autocast_cache()

    def _pass(
        self, batches: Sequence[Batch], step: Callable[[int, Batch], tuple[Tensor, Any]]
    ) -> tuple[float, dict[str, float]]:
        """The mean of a loss over all rows, and its derivatives by group."""
        device = next(self._host.model.parameters()).device
        groups = list(dict.fromkeys(self._groups.values()))
        places = {group: place for place, group in enumerate(groups)}
        # Of all ranks' rows: the loss, what it is divided by, and the derivative by the scale of each group.
        sums = torch.zeros(2 + len(groups), dtype=accumulation_dtype(device), device=device)

        def take(name: str, gradient: Tensor) -> None:
            sums[2 + places[self._groups[name]]] += inner_product(gradient, self._host.update(name).to(gradient.device))

        with torch.enable_grad(), gradients_of(self._host.model, self._host.parameters, take):
            for number, batch in enumerate(batches):
                with self._autocast():
                    loss, count = step(number, self._move(batch))
                (loss * self._factor).backward()
                sums[:2] += torch.stack(
                    [torch.as_tensor(x, dtype=sums.dtype, device=device) for x in (loss.detach(), count)]
                )
        if self._ranks > 1:
            dist.all_reduce(sums)
        loss, count, *slopes = sums.tolist()
        if not count > 0:
            raise GraftError("fit_scales: the rows have no supervised token. Give rows with an answer.")
        return loss / count, dict(zip(groups, (slope / count for slope in slopes), strict=True))

    def _step(self, number: int, batch: Batch) -> tuple[Tensor, Any]:
        """Cross entropy, summed, and the number of supervised tokens, or the sum of their weights."""
        outputs = Outputs(self._head, batch)
        return outputs.loss(), outputs.total_weight()

    def _divergence(self, number: int, batch: Batch) -> tuple[Tensor, Any]:
        """``KL(graft ‖ Instruct)``, summed likewise."""
        known = self._predictions[number]
        outputs = Outputs(
            self._head, batch, predictions=dataclasses.replace(known, states=known.states.to(batch["labels"].device))
        )
        return divergence_sums(outputs)

    def _predict(self) -> None:
        """Let the untouched Instruct predict the rows to keep, once; the states wait in the CPU's memory."""
        with self._holding(None), torch.no_grad(), deterministic(self._host.model):
            for batch in self._keep:
                known = self._predictions[-1] if self._predictions else None
                with self._autocast():
                    found = Outputs(self._head, self._move(batch)).predictions(known, live=False)
                self._predictions.append(dataclasses.replace(found, states=found.states.cpu()))


def fit_scales(
    model: nn.Module,
    update: Delta | Mapping[str, Tensor],
    rows: Sequence[Mapping[str, Sequence[int]]],
    options: FitScales,
    keep: Sequence[Mapping[str, Sequence[int]]] = (),
    *,
    start: float = 1.0,
    dtype: torch.dtype | None = None,
    pad_token_id: int = 0,
) -> FittedScales:
    """Find the scales of an update of an Instruct in memory: for studies, and for the graft on disk.

    Args:
        model: A transformers model with the Instruct's weights, which it has again when this returns or raises.
        update: The update ``tuned - base`` by the model's names; every tensor of it is grafted.
        rows: Calibration rows: ``input_ids`` and ``labels`` (-100 where unsupervised), ``[T]`` each.
        options: Groups, steps and weights; its sources are not read.
        keep: Rows on which the graft is kept near the Instruct, with ``options.keep.weight``.
        start: Scale that all groups start from.
        dtype: Dtype that grafted weights are rounded to, as an export rounds them; None for the model's.
        pad_token_id: Token that fills batches up.

    Raises:
        GraftError: The update doesn't fit the model, ``keep`` and ``options.keep`` don't fit together, or a loss is not
            finite.

    Example::

        options = FitScales("", groups="kind", steps=10, keep=Keep("", weight=0.5))
        fitted = fit_scales(model, delta, rows, options, keep=neutral)
        print(fitted.scales)  # {"q_proj": 0.91, ...}
    """
    if bool(keep) != (options.keep is not None):
        raise GraftError("fit_scales: keep has rows without a weight, or a weight without rows. Give both or none.")
    host = MemoryScaledGraft(model, update, dtype)
    device = next(model.parameters()).device

    def batches(samples: Sequence[Mapping[str, Sequence[int]]]) -> list[Batch]:
        size, collate = options.batch_size or 8, Collate(pad_token_id)
        ordered = sorted(samples, key=lambda sample: -len(sample["input_ids"]))  # of similar length: little padding
        return [collate([dict(one) for one in ordered[i : i + size]]) for i in range(0, len(ordered), size)]

    measure = Calibration(
        host, options, batches(rows), batches(keep), HeadLoss(model),
        move=lambda batch: {name: tensor.to(device) for name, tensor in batch.items()},
    )  # fmt: skip
    return fit(measure, host.parameters, options, start)


def fit_on_disk(plan: DiskGraft, pair: ModelPair, options: FitScales, start: float = 1.0) -> FittedScales:
    """Find the scales of a planned graft of folders, on its Instruct in memory.

    The rows are read with the Instruct's template, as a validation set's. In memory are the Instruct, a copy of the
    weights that are grafted, and their update in float32. Computed on a GPU if there is one, in the dtype of the
    Instruct's files, else in float32.

    Args:
        plan: Graft.
        pair: Base and Instruct, of which the second has the tokenizer.
        options: Sources, groups, steps and weights.
        start: Scale that all groups start from.

    Raises:
        GraftError: A grafted tensor is not a parameter of the loaded Instruct by itself, as with experts that the files
            hold one by one; or a loss is not finite.
        DataError: The rows can't be read.
    """
    data, sources = ShadowData(pair), options.sources
    for key, source in sources.items():
        data.extra_loader(key, source)
    on_gpu = torch.cuda.is_available()
    model: Any = AutoModelForCausalLM.from_pretrained(plan.instruct.folder, dtype="auto" if on_gpu else torch.float32)
    model.to("cuda" if on_gpu else "cpu").eval()
    rounding = {plan.instruct.tensors[name].converted(plan.dtype).dtype for name in plan.selected}
    dtype = rounding.pop() if len(rounding) == 1 else None
    sets: list[Any] = [data.dataset(key) for key in sources]
    rows, *kept = [[one[i] for i in range(len(one))] for one in sets]
    update = Delta.from_update(plan.update).only(plan.selected)
    return fit_scales(
        model, update, rows, options, kept[0] if kept else (), start=start, dtype=dtype, pad_token_id=data.pad_token_id
    )


def require_fittable(objective: Objective) -> None:
    """Raise unless the rows of a training with this objective are conversations.

    Raises:
        GraftError: Naming the objective.
    """
    if objective.samples != "conversations":
        raise GraftError(
            f"graft.fit_scales minimises the cross entropy of conversations, but the rows of {path_of(objective)} are "
            f"{objective.samples}. Fit the scales on disk after the training (shadowlit graft --fit-scales), or use "
            "an objective of conversations (SFT, DFT, EAFT)."
        )
