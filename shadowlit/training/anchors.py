"""Two anchors in one training: one update, learned on the Base and on the Instruct at once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft import PeftConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from shadowlit.data.given import Given
from shadowlit.data.sampler import ShardedBatchSampler
from shadowlit.distributed import local
from shadowlit.errors import GraftError, ShadowlitError
from shadowlit.grafting.adapter import dependence, stored_values
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.scales import Keep
from shadowlit.grafting.subject import ANCHORED, INSTRUCT
from shadowlit.plugins import path_of
from shadowlit.training.gradients import deterministic
from shadowlit.training.head import Predictions
from shadowlit.training.objectives import Objective
from shadowlit.training.objectives.tokens import divergence_sums
from shadowlit.training.outputs import Batch, Outputs
from shadowlit.training.parallel import reduce_gradients
from shadowlit.training.schedules import step_count
from shadowlit.training.scoring import ScoringModule

KL_ROWS = "model.anchors.kl.data"
"""Key of the divergence's rows, and the name of their set."""


@dataclass
class Anchors:
    """Weights of the Base and the Instruct in a training that learns one update Δ on both.

    ``L(Δ) = (1 - α) L(W_B + Δ) + α L(W_I + Δ) + w KL(W_I + Δ ‖ W_I)``. Each loss is the objective's mean over the
    micro-batches that the model gets: in every optimizer step the Base gets the first ones, and the Instruct the last
    ones, ``α`` of all rounded to whole ones, and at least one. The rounding changes how many tokens a loss is averaged
    over, and never its weight. At 0 the training is that of the Base, and at 1 that of the Instruct. The divergence is
    the mean over the supervised tokens of further rows, of which every step has one more micro-batch, whatever α is.

    Args:
        instruct: Weight α of the Instruct, between 0 and 1.
        initial: Weight of the Instruct at first, from which it goes to ``instruct`` along a line; null for a constant
            one.
        last: Share of the optimizer steps, at the end, in which the Instruct has a weight; before them it has none.
            Above 0, at most 1.
        kl: Rows on whose answers the Instruct with the update should stay near the untouched Instruct, and the weight
            w of the divergence in the loss; null for none.
    """

    instruct: float
    initial: float | None = None
    last: float = 1.0
    kl: Keep | None = None

    def __post_init__(self) -> None:
        """Raise if a weight is out of its range."""
        weights = [self.instruct, *([] if self.initial is None else [self.initial])]
        if not all(0 <= weight <= 1 for weight in weights) or not 0 < self.last <= 1:
            raise ShadowlitError(
                f"model.anchors is {self}; expected instruct and initial between 0 and 1, and last above 0 and at most "
                "1. Correct it, e.g. {instruct: 0.3}."
            )
        if self.kl is not None and not 0 < self.kl.weight < math.inf:
            raise ShadowlitError(
                f"model.anchors.kl.weight is {self.kl.weight}; expected a number above 0. Set kl to null to leave the "
                "divergence out."
            )

    @property
    def is_constant(self) -> bool:
        """Whether the weight is the same in every step."""
        return self.initial in (None, self.instruct) and self.last == 1

    @property
    def mixes(self) -> bool:
        """Whether there may be steps in which both models have a weight."""
        ends = {self.instruct, self.initial} - {None}
        return len(ends) > 1 or not ends <= {0, 1}

    @property
    def loads_instruct(self) -> bool:
        """Whether there are steps that compute with the Instruct's weights."""
        return self._highest > 0 or self.kl is not None

    def sets_aside(self, num_micro_batches: int) -> bool:
        """Return whether there are steps in which gradients wait for several micro-batches: those on the Base, or those
        of the divergence.
        """
        alone = self.last < 1 or bool({self.instruct, self.initial} & {0, 1})  # steps of one model
        of_kl = self.kl is not None and alone and num_micro_batches > 1
        return of_kl or (self.mixes and num_micro_batches > 2 and self._highest * num_micro_batches >= 1.5)

    @property
    def _highest(self) -> float:
        return max(self.instruct, self.initial or 0.0)

    def weight(self, step: int, total: int) -> float:
        """Return α in an optimizer step, counted from 0, of a training of ``total`` steps."""
        lasting = max(1, round(self.last * total))
        before = total - lasting
        if step < before:
            return 0.0
        if self.initial is None:
            return self.instruct
        progress = 1.0 if lasting == 1 else min(1.0, (step - before) / (lasting - 1))
        return (1 - progress) * self.initial + progress * self.instruct


class Parts(NamedTuple):
    """An optimizer step: its micro-batches on the Base, which come first, and on the Instruct, and the Instruct's
    weight.
    """

    num_base: int
    num_instruct: int
    weight: float

    @property
    def are_both(self) -> bool:
        """Whether both models have micro-batches."""
        return self.num_base > 0 and self.num_instruct > 0


def parts_of_step(weight: float, num_micro_batches: int) -> Parts:
    """Divide the micro-batches of a step by the Instruct's weight; both anchors get one unless a weight is 0.

    Raises:
        ShadowlitError: There is one micro-batch for two anchors.
    """
    if weight in (0, 1):
        num_instruct = num_micro_batches if weight else 0
    elif num_micro_batches < 2:
        raise ShadowlitError(
            f"model.anchors gives the Instruct a weight of {weight:g} in a step of one micro-batch, but each of the "
            "two anchors needs one. Set trainer.accumulate_grad_batches=2 or more, with a smaller data.batch_size for "
            "the same effective batch."
        )
    else:
        num_instruct = min(max(math.floor(weight * num_micro_batches + 0.5), 1), num_micro_batches - 1)
    return Parts(num_micro_batches - num_instruct, num_instruct, weight)


def mixed_sums(base: Mapping[str, Tensor], instruct: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Combine an objective's sums over the two parts of an effective batch.

    Divided by the sum ``count``, each is ``(1 - α) s_B / n_B + α s_I / n_I``, where s and n are the part's sum and
    count. Of supervised tokens, ``tokens``, the number is logged and no mean: the two are added.
    """
    added = {name: base[name] + instruct[name] for name in ("count", "tokens") if name in base}
    numbers = at_least_one(base["count"]), at_least_one(instruct["count"])
    means = {
        name: (1 - weight) * base[name] / numbers[0] + weight * instruct[name] / numbers[1]
        for name in base
        if name not in added
    }
    return {name: mean * at_least_one(added["count"]) for name, mean in means.items()} | added


def at_least_one(count: Tensor) -> Tensor:
    """Return a count to divide by: 1 in place of 0, and itself below 1, since weights may sum to less."""
    return torch.where(count > 0, count, 1)


class FirstPart:
    """What comes before the last part of an effective batch, set aside while the gradients of that part are added up.

    The last part are the micro-batches on the Instruct, or all of them in a step of one model. Before it come those on
    the Base, if there are both, and the divergence's. The gradients ``G_B`` and ``G_I`` of the two models are of sums,
    and each has a count of its own to be divided by. The second count is known when the last micro-batch has computed
    its loss. Then ``(1 - α) / α · n_I / n_B · G_B`` is added to what there is of ``G_I``, before the last backward pass
    and the sum over ranks; after them ``α / n_I`` times all of it is the gradient of ``(1 - α) L(W_B + Δ) + α L(W_I +
    Δ)``. The divergence's gradient has been added to ``G_B`` with the factor ``w n_B / (1 - α)``; alone it is
    multiplied by ``n``, the count by which all of it is divided at the end.

    Args:
        weight: Weight α of the Instruct.
        sums: The objective's sums over the micro-batches on the Base, over all ranks; None in a step of one model.
        kl: The divergence per token, over all ranks; None without one.
        kl_weight: Weight w of the divergence.
        optimizers: The trainer's optimizers, whose parameters have the gradients and lose them.
    """

    def __init__(
        self,
        weight: float,
        sums: dict[str, Tensor] | None,
        kl: Tensor | None,
        kl_weight: float,
        optimizers: Iterable[Optimizer],
    ) -> None:
        self.weight, self.sums, self.kl, self.kl_weight = weight, sums, kl, kl_weight
        self.last: dict[str, Tensor] = {}  # sums over the last part, over all ranks, once it is whole
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                self._gradients.append((parameter, parameter.grad))
                parameter.grad = None

    def join(self) -> None:
        """Add the gradients that were set aside, if the last part is whole."""
        if not self.last:
            return
        factor: Any = at_least_one(self.last["count"])
        if self.sums is not None:
            factor = (1 - self.weight) / self.weight * (factor / at_least_one(self.sums["count"]))
        torch._foreach_mul_([local(grad) for _, grad in self._gradients], factor)
        for parameter, grad in self._gradients:
            if parameter.grad is None:
                parameter.grad = grad
            else:
                local(parameter.grad).add_(local(grad))
        self._gradients.clear()

    def all_sums(self) -> dict[str, Tensor]:
        """The sums over the effective batch; those of two models are combined by :func:`mixed_sums`."""
        return self.last if self.sums is None else mixed_sums(self.sums, self.last, self.weight)


@runtime_checkable
class HoldsGraft(Protocol):
    """A callback that has the frozen weights of both models next to the trained ones."""

    def build(self, pl_module: Any) -> LiveGraft:
        """Return the graft of the module's model."""


class NeutralRows:
    """The divergence's rows of every optimizer step, as a function of the seed and the step alone.

    A step has ``data.batch_size`` rows per rank. They pass in a new order each time that all of them were used; rows
    that don't fill a last batch are left out of this pass.

    Args:
        trainer: The trainer, whose data module has read the rows.
        source: Source of the rows.

    Attributes:
        checksum: Checksum of the rows.
    """

    def __init__(self, trainer: Trainer, source: Given) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.extra_loader(KL_ROWS, source)
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        hashes = getattr(loader.dataset, "hashes", None)  # which rows of other data sets need not have
        self.checksum = "" if hashes is None else f"{zlib.crc32(hashes().tobytes()):08x}"
        size, ranks, count = data.batch_size, trainer.world_size, len(loader.dataset)
        self._sampler = ShardedBatchSampler(
            count, size, ranks, trainer.global_rank, data.seed, drop_last=count >= size * ranks
        )

    def __call__(self, step: int) -> Batch:
        """Return this rank's rows of an optimizer step, counted from 0."""
        indices = next(self._sampler.batches(*divmod(step, len(self._sampler))))
        return self._collate([self._dataset[index] for index in indices])


class AnchoredTraining:
    """Loads the anchor of every micro-batch of a training, for its forward and its backward pass.

    The Instruct's frozen weights are swapped with the Base's in place, and trained weights become ``instruct + (tuned -
    base)`` in float32, restored from a copy before the optimizer's step. So checkpoints, validations and the optimizer
    only ever see the tuned Base.

    Args:
        anchors: Weights of the two models.
        trainer: The trainer, whose loop has begun.
        graft: The graft of the module's model.

    Raises:
        ShadowlitError: The weights follow a number of steps that is unknown.
    """

    def __init__(self, anchors: Anchors, trainer: Trainer, graft: LiveGraft) -> None:
        self._anchors, self._trainer, self._graft = anchors, trainer, graft
        total = step_count(trainer)
        require_steps(anchors, trainer.accumulate_grad_batches, total < math.inf)
        self._total = int(total) if total < math.inf else 0  # a constant weight needs none
        self._rows = None if anchors.kl is None else NeutralRows(trainer, anchors.kl.data)
        self._kl_weight = 0.0 if anchors.kl is None else anchors.kl.weight
        self._predictions: Predictions | None = None  # of the untouched Instruct, for the last neutral rows

    def require_exact(self) -> None:
        """Raise if the last step of an epoch has a single micro-batch for two anchors, or its size is unknown.

        Raises:
            ShadowlitError: With the remedy.
        """
        size, micro = self._trainer.num_training_batches, self._trainer.accumulate_grad_batches
        if not self._anchors.mixes:
            return
        if math.isinf(size):
            raise ShadowlitError(
                "model.anchors divides the micro-batches of every step between two models, but the training data have "
                "no length, so it isn't known how many the last step of an epoch has. Give the dataset a __len__, or "
                "set trainer.limit_train_batches to a number of micro-batches that they have."
            )
        if size == 1:
            raise ShadowlitError(
                "an epoch has a single micro-batch, but each of the two models of model.anchors needs one. Give more "
                "data, lower data.batch_size, or raise trainer.limit_train_batches."
            )
        if size % micro == 1:
            raise ShadowlitError(
                f"an epoch has {size} micro-batches, and its last step of trainer.accumulate_grad_batches={micro} has "
                "only one of them, but each of the two models of model.anchors needs one. Set "
                f"trainer.limit_train_batches={size - 1}, which leaves one micro-batch of every epoch out."
            )

    def require_resumable(self, rows: str | None) -> None:
        """Raise if a run resumes within a step of this trainer; warn if its divergence had other rows.

        Args:
            rows: :attr:`rows` of the checkpoint's run; None if it has none.

        Raises:
            ShadowlitError: ``trainer.accumulate_grad_batches`` has changed in the middle of an epoch.
        """
        trainer = self._trainer
        done, micro = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.accumulate_grad_batches
        if done % micro and done < trainer.num_training_batches:
            raise ShadowlitError(
                f"the run resumes after {done} micro-batches of an epoch, which is within a step of "
                f"trainer.accumulate_grad_batches={micro}, so that this step can't be divided as model.anchors needs. "
                "Resume with the number of the checkpoint's run, or from the end of an epoch."
            )
        if rows and self.rows and rows != self.rows:
            rank_zero_warn(
                f"{KL_ROWS} has other rows than in the run that is resumed (checksum {rows} → {self.rows}), so that "
                "this one doesn't repeat it. Give the same file, or start a new run."
            )

    @property
    def rows(self) -> str:
        """Checksum of the divergence's rows; empty without any."""
        return "" if self._rows is None else self._rows.checksum

    def place(self, batch_idx: int) -> tuple[int, Parts]:
        """Return which micro-batch of its step this one is, counted from 0, and the parts of the step."""
        trainer = self._trainer
        size, every = trainer.num_training_batches, trainer.accumulate_grad_batches
        number = batch_idx % every
        weight = self._anchors.weight(trainer.global_step, self._total)
        return number, parts_of_step(weight, int(min(every, size - (batch_idx - number))))

    def first_part(
        self, module: ScoringModule, batch_idx: int, take_sums: Callable[[], dict[str, Tensor]]
    ) -> FirstPart | None:
        """Set aside what comes before the last part of a step, when that begins with this micro-batch.

        Args:
            module: The module that trains.
            batch_idx: Number of the micro-batch in its epoch.
            take_sums: Function that returns the objective's sums since it was called before, over all ranks.

        Returns:
            What was set aside; None in every other micro-batch, and where nothing comes before.
        """
        number, parts = self.place(batch_idx)
        if number != (parts.num_base if parts.are_both else 0) or not (parts.are_both or self._rows is not None):
            return None
        sums, factor = None, torch.ones((), device=module.device)
        if parts.are_both:
            sums = take_sums()
            factor = at_least_one(sums["count"]) / (1 - parts.weight)
        else:
            module.zero_grad()  # of the step before, which Lightning does later
        kl = None if self._rows is None else self._add_divergence(module, self._rows(self._trainer.global_step), factor)
        return FirstPart(parts.weight, sums, kl, self._kl_weight, self._trainer.optimizers)

    def load(self, batch_idx: int) -> None:
        """Load the anchor of a micro-batch."""
        number, parts = self.place(batch_idx)
        if number >= parts.num_base:
            self._graft.apply(ANCHORED)
        else:
            self._graft.restore()

    def ends_part(self, batch_idx: int) -> bool:
        """Return whether a micro-batch is the last one on the Base before the Instruct's."""
        number, parts = self.place(batch_idx)
        return number == parts.num_base - 1 and parts.num_instruct > 0

    def restore(self) -> None:
        """Swap the tuned Base back; harmless when it is loaded already."""
        self._graft.restore()

    def _add_divergence(self, module: ScoringModule, rows: Batch, factor: Tensor) -> Tensor:
        """Add the gradients of ``factor · w · KL(W_I + Δ ‖ W_I)``, and return the KL in nats per token of all ranks.

        A collective. Both passes are without dropout. Under DDP the gradients are this rank's part of the sum, until
        the last micro-batch's backward pass adds them up.
        """
        trainer, model, head = self._trainer, module.model, module.head_losses()
        assert model is not None
        batch = trainer.strategy.batch_to_device(module.on_before_batch_transfer(rows, 0))
        computing = trainer.precision_plugin.train_step_context

        def predict() -> None:
            with computing():  # a frozen head is the Instruct's in the second pass too
                self._predictions = Outputs(head, batch).predictions(self._predictions, live=True)

        with deterministic(model):
            self._graft.measure(INSTRUCT, predict)
            self._graft.apply(ANCHORED)
            reduce_gradients(model, True)
            with computing():
                total, count = divergence_sums(Outputs(head, batch, predictions=self._predictions))
            sums = torch.zeros(2, dtype=accumulation_dtype(module.device), device=module.device)
            sums += torch.stack([total.detach().to(sums), torch.as_tensor(count).to(sums)])
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums)
            found, number = sums[0], at_least_one(sums[1])
            # DDP and FSDP2 divide by the ranks: undo it.
            (total * (factor * self._kl_weight * trainer.world_size / number)).backward()
        return found / number


def require_anchored(
    anchors: Anchors, adapter: PeftConfig | None, objective: Objective, quantization: str | None
) -> None:
    """Raise unless an update of these settings means the same on two models, and neutral rows are read as the data are.

    Raises:
        GraftError: Naming the setting.
    """
    reason = ""
    if quantization is not None:
        reason = f"model.quantization={quantization}, whose frozen weights can't be swapped. Set it to null"
    elif adapter is not None and (settings := dependence(adapter) or stored_values(adapter)):
        reason = (
            f"an adapter with {settings}, whose update depends on the weights that it is on, or stores some of them. "
            "Use LoRA or rsLoRA, or full tuning (model.adapter=null)"
        )
    elif objective.has_reference or objective.token_reference is not None:
        reason = (
            f"{path_of(objective)} as model.objective, which compares with a reference, and the two models would need "
            "one each. Use an objective without one, e.g. SFT, DFT, SimPO or ORPO"
        )
    if reason:
        raise GraftError(f"model.anchors trains one update on two models, which does not work with {reason}.")
    if anchors.kl is not None and objective.samples != "conversations":
        raise GraftError(
            f"model.anchors.kl compares answers of conversations, but {path_of(objective)} as model.objective learns "
            f"from {objective.samples}, and all rows are read in that form. Use an objective of conversations (SFT, "
            "DFT or EAFT), or set kl to null."
        )


def require_steps(anchors: Anchors, num_micro_batches: int, has_end: bool = True) -> None:
    """Raise unless a trainer's steps can be divided between the two models.

    Args:
        anchors: Weights of the two models.
        num_micro_batches: ``trainer.accumulate_grad_batches``.
        has_end: Whether the number of steps is known.

    Raises:
        ShadowlitError: A step has one micro-batch, or the weight follows a number of steps that is unknown.
    """
    if anchors.mixes:
        parts_of_step(anchors.instruct if 0 < anchors.instruct < 1 else 0.5, num_micro_batches)
    if not (anchors.is_constant or has_end):
        raise ShadowlitError(
            f"model.anchors is {anchors}, whose weight follows the number of steps, which is unknown. Set "
            "trainer.max_steps (or trainer.max_epochs, if the training data have a length), or a constant weight, e.g. "
            "{instruct: 0.3}."
        )
