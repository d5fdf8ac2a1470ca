"""ShadowModule, the LightningModule that trains the Base and scores the weights that it holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torchmetrics import Metric

from shadowlit.arguments import takes_plain_values
from shadowlit.checkpoint.saved import WITHIN_STEP
from shadowlit.data.context_batches import teachers_batch, with_teachers
from shadowlit.data.protocol import run_data
from shadowlit.distributed import local
from shadowlit.errors import ShadowlitError, as_usage
from shadowlit.grafting.adapter import adapt_all_linear, require_graftable
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.grafting.subject import BASE
from shadowlit.kernels import slow_on_cpu
from shadowlit.pair.pair import ModelPair
from shadowlit.plugins import calls
from shadowlit.text import count
from shadowlit.training import resuming
from shadowlit.training.anchors import (
    KL_ROWS,
    AnchoredTraining,
    Anchors,
    FirstPart,
    HoldsGraft,
    at_least_one,
    require_anchored,
    require_steps,
)
from shadowlit.training.bar import replace_displays
from shadowlit.training.checkpoints import ShardedStrategy, name_states, require_same_parameters, take_over
from shadowlit.training.disks import require_disks
from shadowlit.training.divergence import LossWatch
from shadowlit.training.groups import ParameterGroup, read_multipliers, require_loraplus
from shadowlit.training.head import Way
from shadowlit.training.loading import load_for_training, require_fitting, require_unsharded
from shadowlit.training.objective import supervised_positions
from shadowlit.training.objectives import SFT, Objective, require_sums, require_weighed
from shadowlit.training.optimizer import OptimizerChoice, begin_step, make_optimizer, plain_tensors, whole_tensors
from shadowlit.training.outputs import Batch
from shadowlit.training.own_rows import read_own_rows, warn_of_shared_rows
from shadowlit.training.parallel import compute_dtype_of, data_parallel_mesh, parallelize, reduce_gradients
from shadowlit.training.quantisation import require_quantisable
from shadowlit.training.rehearsal import ChecksBeforeData, try_optimizer
from shadowlit.training.schedules import ScheduleName, Shape, make_schedule, require_no_end, step_count
from shadowlit.training.scoring import ScoringModule
from shadowlit.training.separation import require_separation
from shadowlit.training.start import StartFrom
from shadowlit.training.varlen import borders_of, kernel_of, takes_borders

# Ours adds to a batch of any data module.
warnings.filterwarnings("ignore", message=r"You have overridden `on_before_batch_transfer` in `LightningModule`")


@takes_plain_values("model")
class ShadowModule(ScoringModule):
    """Trains the Base of a pair, and scores the weights that the model holds.

    The loss of an effective batch (all micro-batches and ranks of a step) is a sum divided once by its count, for
    supervised fine-tuning the number of supervised tokens, or the sum of their weights where turns have some. It
    doesn't change with accumulation, the number of ranks or unequal lengths. Trainable parameters are float32;
    ``trainer.precision: bf16-mixed`` computes in bfloat16. The dropout masks of a batch depend on the seed and the
    batch's number only, so that a resumed run repeats them.

    Objectives with a reference (docs/reference/preference.md) compare answers with their log-probabilities under the
    weights at the start, which :class:`GraftCallback` measures.

    Validation logs ``val/<subject>/<metric>``: for the ``tuned`` model, and for the models that callbacks swap in. The
    metrics are over all validation sets together; where there are several, ``val/<subject>/<set>/<metric>`` is logged
    for each.

    Example::

        module = ShadowModule(pair, adapter=LoraConfig(r=64, lora_alpha=128), lr=2e-4)
        Trainer(max_epochs=3, callbacks=[GraftCallback()]).fit(module, data)

    Args:
        pair: The Base that is trained and the Instruct that gets the update.
        adapter: Arguments of ``peft.LoraConfig``, or any adapter of peft's that merges into the weights by class_path
            and init_args, e.g. peft.LoHaConfig; null for full fine-tuning. Without ``target_modules`` all linear layers
            except the output head are adapted.
        objective: Objective that is trained for: SFT, DFT, EAFT, ContextDistillation, DPO, KTO, ORPO, SimPO, CPO, ASFT
            or a class of your own, with its options; null for SFT.
        lr: Peak learning rate of AdamW, and of any other optimizer whose init_args don't set one.
        weight_decay: Decoupled weight decay of AdamW, on matrices only, not on norms and biases.
        betas: Decay rates of AdamW's two moments.
        eps: AdamW's epsilon.
        schedule: Shape of the learning rate after warm-up: down to 0 along a cosine or a line, or constant.
        warmup_ratio: Share of all optimizer steps during which the rate rises from 0, between 0 and 1.
        optimizer: Optimizer: adamw, adamw_8bit, whose moments take 2 bytes per trained parameter instead of 8 (needs
            torchao or bitsandbytes), or any optimizer by class_path and init_args, e.g. torch.optim.Muon. A class
            takes ``lr`` unless its init_args set one; betas, eps and weight_decay are options of AdamW alone.
        offload_optimizer: Whether AdamW's moments are kept in the CPU's memory between steps. Saves 8 bytes per trained
            parameter on a GPU, but every step waits for 16 bytes to be moved. Works on one device, under DDP and FSDP2.
        reduce_gradients: Time at which FSDP2's ranks add their gradients: after every micro-batch, which keeps them
            sharded, or once per step, which holds 4 more bytes per trained parameter on every rank meanwhile.
            auto: once per step for an adapter. DDP always adds them once per step.
        activation_checkpointing: Activations that each decoder layer recomputes in the backward pass instead of storing
            them. false or none: nothing. true or full: everything, which needs least memory and about a third more
            time. selective: what is cheap for the memory that it takes; attention and products that don't widen are
            stored.
        compile_layers: Whether to compile each decoder layer with ``torch.compile``.
        head_loss: Implementation of the loss from the last hidden states. auto: without materialising the full logits
            where the model's head allows it, which is checked on the model when it starts. The others are chunked,
            recomputed, torch, liger and logits; see :class:`shadowlit.training.head.HeadLoss`.
        attn_implementation: Attention kernel by its name in transformers: sdpa, flash_attention_2, eager …; or varlen,
            which is sdpa on each sample of a packed row separately. auto: varlen for ``data.packing`` where the model
            allows it and its layers aren't compiled, else sdpa.
        experts_implementation: Implementation of a mixture of experts by its name in transformers: grouped_mm (the
            default), batched_mm, eager. Without FSDP2, only eager computes in bfloat16 under bf16-mixed.
        max_new_tokens: Longest answer that ``predict`` generates, in tokens.
        seed: Seed of the adapter's initialisation and of dropout. On the command line, 0 stands for seed_everything.
        train_towers: Parts of a vision-language model that are trained: language, vision, projector, or regular
            expressions that are searched for in parameter names. The rest stays frozen, and only these are adapted.
        metrics: More metrics of the validation and test sets, by name: torchmetrics classes by class_path and
            init_args, logged as ``val/<subject>/<name>``. ``update(logits, labels)`` gets the float32 logits ``[N, V]``
            that predict supervised tokens, and these tokens ``[N]``, a chunk at a time; for an objective of
            preferences ``update`` gets :class:`shadowlit.training.outputs.Answers`. ``compute()`` returns a number,
            or a dict of numbers, logged as ``<name>_<key>``.
        lr_scheduler: Schedule that replaces ``schedule``: a name of ``transformers.get_scheduler``, which uses
            warmup_ratio, or a scheduler by class_path and init_args, which counts optimizer steps and does not.
        lr_scheduler_kwargs: Options of a schedule of transformers, e.g. ``{min_lr_rate: 0.1}`` for cosine_with_min_lr.
        loraplus_lr_ratio: Learning rate of LoRA's factors B divided by ``lr``: 1 for LoRA, e.g. 16 for LoRA+ (arXiv
            2402.12354).
        parameter_groups: Settings of trained parameters by pattern, e.g. ``[{match: embed_tokens, lr_scale: 0.1}]``;
            the first group that matches a name counts, and each must match one.
        lr_multipliers: JSON file of factors of the learning rate by the names of tensors in the Base's files; those of
            a matrix apply to its LoRA. Tensors that it doesn't name have the factor 1.
        quantization: How the frozen weights of linear layers are stored, except the output head: nf4, in 4 bits with
            double quantisation (QLoRA, needs bitsandbytes), or null, as in the files. They are computed with in the
            dtype of trainer.precision. Needs an adapter; the graft is added to the Instruct's own weights.
        anchors: Weights of the two models that the update is trained on, e.g. ``{instruct: 0.3}``: 0.7 times the loss
            on the Base plus 0.3 times that on the Instruct; null trains on the Base alone. ``initial`` and ``last``
            let the weight follow the steps; ``kl`` adds a divergence from the Instruct on other rows. Needs a
            GraftCallback and, for both models, at least two micro-batches per step (docs/beyond.md).
        start_from: What training starts from instead of the Base: a folder or hub id of a tuned Base or of an adapter
            in peft's form, or a run of fit (its folder, or a *.ckpt). An adapter is trained further, with the settings
            that it was made with; a tuned Base gets a new one. The update is still counted from pair.base.
        on_nan: What happens when the training loss is not finite. stop: the training ends with an error, and writes no
            checkpoint after that step. warn: it continues, but exports nothing. A GPU's losses are read every
            ``trainer.log_every_n_steps`` steps, before a validation, before a checkpoint, and at the end.
    """

    def __init__(
        self,
        pair: ModelPair,
        adapter: LoraConfig | PeftConfig | None = None,
        objective: Objective | None = None,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: Shape = "cosine",
        warmup_ratio: float = 0.1,
        optimizer: OptimizerChoice = "adamw",
        offload_optimizer: bool = False,
        reduce_gradients: Literal["auto", "micro_batch", "step"] = "auto",
        activation_checkpointing: bool | Literal["none", "full", "selective"] = False,
        compile_layers: bool = False,
        head_loss: Way = "auto",
        attn_implementation: str = "auto",
        experts_implementation: str | None = None,
        max_new_tokens: int = 512,
        seed: int = 0,
        train_towers: list[str] = ["language"],  # noqa: B006 - read only, and shown by --help
        metrics: dict[str, Metric] | None = None,
        lr_scheduler: ScheduleName | LRSchedulerCallable | None = None,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        loraplus_lr_ratio: float = 1.0,
        parameter_groups: list[ParameterGroup] = [],  # noqa: B006
        lr_multipliers: str | None = None,
        on_nan: Literal["stop", "warn"] = "stop",
        quantization: Literal["nf4"] | None = None,
        anchors: Anchors | None = None,
        start_from: str | None = None,
    ) -> None:
        super().__init__(
            pair, SFT() if objective is None else objective, head_loss, max_new_tokens, dict(metrics or {})
        )
        if not 0 <= warmup_ratio <= 1:
            raise ShadowlitError(f"model.warmup_ratio is {warmup_ratio}; expected a share between 0 and 1.")
        if lr <= 0:
            raise ShadowlitError(f"model.lr is {lr}; expected a positive learning rate, e.g. 2e-4 for LoRA.")
        require_graftable(adapter)
        require_loraplus(loraplus_lr_ratio, adapter)
        if quantization is not None:
            require_quantisable(adapter, compile_layers)
        if anchors is not None:
            require_anchored(anchors, adapter, self.objective, quantization)
        self.quantization, self.start = quantization, StartFrom(start_from)
        self.anchors = anchors
        self._anchored: AnchoredTraining | None = None  # of the running fit
        self._first_part: FirstPart | None = None  # of the effective batch, once it is whole
        self._loaded_rows: str | None = None  # checksum of the divergence's rows in a checkpoint
        self.adapter = adapter
        if adapter is not None:
            adapt_all_linear(adapter)
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.schedule, self.warmup_ratio = schedule, warmup_ratio
        self.lr_scheduler, self.lr_scheduler_kwargs = lr_scheduler, lr_scheduler_kwargs
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.parameter_groups, self.lr_multipliers = list(parameter_groups), lr_multipliers
        self._multipliers: dict[str, float] | None = None
        self._settings: resuming.Settings | None = None  # of the optimizer and the schedule
        self.optimizer, self.offload_optimizer = optimizer, offload_optimizer
        self.reduce_gradients = reduce_gradients
        self.activation_checkpointing, self.compile_layers = activation_checkpointing, compile_layers
        self.attn_implementation = self.kernel = attn_implementation
        self.experts_implementation = experts_implementation
        self.seed = seed
        self.train_towers = list(train_towers)
        self.losses = LossWatch(on_nan)  # of the running or last fit
        self._sums: tuple[tuple[str, ...], Tensor] | None = None  # the objective's, by name, of the effective batch
        # An adapter's checkpoint holds the factors only.
        self.strict_loading = adapter is None

    def configure_model(self) -> None:
        """Build the Base on the meta device, shard it where the strategy has a mesh, fill it from its files."""
        if self.model is not None:
            return
        if slow := slow_on_cpu(compute_dtype_of(self.trainer.precision), self.trainer.strategy.root_device):
            rank_zero_warn(f"{slow}. Set trainer.precision to 32-true.")
        mesh = data_parallel_mesh(self.trainer.strategy, self.device_mesh)
        packs = run_data(self.trainer).packing is not None
        self.model = load_for_training(
            self.start.weights or self.pair.readers()[0],
            device=self.trainer.strategy.root_device,
            mesh=mesh,
            seed=self.seed,
            **self.architecture(self.trainer.precision, packs, all(self.pair.ties()), mesh),
        )
        compares = self.objective.has_reference or self.token_reference is not None
        self.start.load(self.model, keep=compares and self.adapter is not None)

    def architecture(self, precision: str, packs: bool, tied: bool, mesh: Any = None) -> dict[str, Any]:
        """Describe the model that is built: arguments of ``load_for_training``, which a plan has without a trainer.

        Args:
            precision: ``trainer.precision``.
            packs: Whether training samples share rows.
            tied: Whether the heads of both models are tied, if their configs say so.
            mesh: Data-parallel mesh of FSDP2, or ``None``.
        """
        config = self.pair.base_config()
        config.use_cache = False
        config.get_text_config().vocab_size = self.pair.config().get_text_config().vocab_size
        if not tied:  # whatever config.json says; one of the two has a head of its own
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        self.kernel = kernel_of(self.attn_implementation, config, packs=packs, compiled=self.compile_layers)
        compute_dtype = compute_dtype_of(precision)
        return {
            "config": config,
            "adapter": self.adapter,
            "parallelize": partial(
                parallelize,
                mesh=mesh,
                activation_checkpointing=self.activation_checkpointing,
                compile_layers=self.compile_layers,
                compute_dtype=compute_dtype,
            ),
            "attn_implementation": self.kernel,
            "experts_implementation": self.experts_implementation,
            "trust_remote_code": self.pair.trust_remote_code,
            "towers": self.train_towers,
            # In float32 everything computes in float32, frozen weights too, on one device as under FSDP2.
            "frozen_dtype": torch.float32 if compute_dtype == torch.float32 else None,
            "four_bits": self.quantization is not None,
        }

    def setup(self, stage: str) -> None:
        """Forget what an earlier command has left, and take over how checkpoints are written and read."""
        take_over(self.trainer)
        resuming.take_over(self.trainer)
        self._sums = self._first_part = self._anchored = self._references.predictions = self._loaded_rows = None
        self._scores.clear()
        self.losses = LossWatch(self.losses.on_nan)
        if stage == "fit":
            self.objective.reset()
            if self.anchors is not None and self.anchors.kl is not None:
                consequence = "what is measured or trained there is not independent of the divergence"
                warn_of_shared_rows(self.trainer, KL_ROWS, consequence)

    def configure_callbacks(self) -> list[Callback]:
        """Try the objective, the metrics and the optimizer, and let callbacks check what they can before data are read.

        Of all hooks this one runs first: ``prepare_data`` and ``setup`` of the data module come before a callback's
        ``setup``.

        A progress line replaces Lightning's own bar and summary.
        """
        if self.trainer.state.fn != TrainerFn.PREDICTING:
            self.score_names()
        if self.trainer.state.fn == TrainerFn.FITTING:
            with as_usage():
                adapted, total = self.adapter is not None, self.trainer.max_steps
                try_optimizer(self._optimizer, adapted=adapted, total=total, schedule=self.lr_scheduler)
                self._multipliers = read_multipliers(self.lr_multipliers, self.pair)
                if self.anchors is not None:
                    self._graft_callback()
                    has_end = (self.trainer.max_epochs, self.trainer.max_steps) != (-1, -1)
                    require_steps(self.anchors, self.trainer.accumulate_grad_batches, has_end)
                    if self.anchors.kl is not None:
                        why = "what the divergence keeps there would be measured there, or trained away"
                        read_own_rows(self.trainer, KL_ROWS, self.anchors.kl.data, why)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            with as_usage():
                require_unsharded(self.adapter)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ChecksBeforeData):
                callback.before_data(self.trainer, self)
        with as_usage():
            self.open_start(str(self.trainer.precision))
        replace_displays(self.trainer)
        return []

    def open_start(self, precision: str) -> None:
        """Try the adapter, and open ``start_from``, from headers alone; raise a ShadowlitError if one doesn't fit."""
        if self.adapter is None and self.start.source is None:
            return
        model = None
        if self.adapter is not None:
            model = require_fitting(self.architecture(precision, False, all(self.pair.ties())))
        if self.start.source is not None:
            in_four_bits, compares = self.quantization is not None, self.objective.token_reference == "start"
            self.start.open(self.pair, self.adapter, model, in_four_bits, compares)
            if self.anchors is not None and self.adapter is not None and self.start.weights is not None:
                raise ShadowlitError(
                    f"model.anchors swaps the frozen weights of two models, but with model.start_from="
                    f"{self.start.source} and an adapter the frozen ones are those of a tuned Base. Start from an "
                    "adapter, or train all weights (model.adapter=null)."
                )

    def on_fit_start(self) -> None:
        """Refuse a checkpoint without the optimizer's states, data of another kind than the objective needs, or disks.

        The optimizer's states get the names of their parameters.
        """
        resuming.require_states(self.trainer)
        if not isinstance(self.trainer.strategy, ShardedStrategy):  # which does it itself
            name_states(self.trainer.optimizers, self)
        samples = run_data(self.trainer).samples
        if samples != self.objective.samples:
            raise ShadowlitError(
                f"model.objective is {type(self.objective).__name__}, which needs {self.objective.samples}, but the "
                f"data module gives {samples}. Set samples={self.objective.samples!r} of ShadowData."
            )
        require_disks(self.trainer)
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        rank_zero_info(f"model: {count(trained)} trained parameters")

    def on_train_start(self) -> None:
        """Let the configured settings replace restored ones; refuse packed rows if one sample sees another."""
        if self._settings is not None:
            self._settings.put_back()
        if self.anchors is not None:
            self._anchored = AnchoredTraining(self.anchors, self.trainer, self._graft_callback().build(self))
            self._anchored.require_resumable(self._loaded_rows)
        if run_data(self.trainer).packing is not None:
            assert self.model is not None
            with self.trainer.precision_plugin.val_step_context():
                require_separation(self.model)

    def on_train_epoch_start(self) -> None:
        """Refuse an epoch of which a step can't be divided between two anchors."""
        if self._anchored is not None:
            self._anchored.require_exact()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Find supervised tokens and samples' borders on the CPU, where nothing has to wait for a GPU."""
        if isinstance(batch, Mapping) and "labels" in batch and "supervised" not in batch:
            teachers = teachers_batch(batch)
            return with_teachers({**batch, **self._places(batch)}, teachers and self._places(teachers))
        return batch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Load the weights that gradients are taken at."""
        begin_step(self.trainer.optimizers)
        if self._anchored is None:
            return
        if (part := self._anchored.first_part(self, batch_idx, self._take_sums)) is not None:
            self._first_part = part
        self._anchored.load(batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the summed loss of a micro-batch, scaled such that its gradients add up to those of the sum."""
        self._seed_dropout()
        steps = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        if self.trainer.accumulate_grad_batches > 1:
            assert self.model is not None
            ends_part = self._anchored is not None and self._anchored.ends_part(batch_idx)
            reduce_gradients(self.model, steps or ends_part or not self.accumulates_whole)
        outputs = self._outputs(batch, BASE, "train")
        with calls(self.objective, "model.objective", "Correct its step."):
            loss = self._add(self.objective.step(outputs))
        require_weighed(self.objective, outputs)
        if steps and self._first_part is not None:
            self._first_part.last = self._take_sums()
        # Lightning divides by the micro-batches, and DDP and FSDP by the ranks: undo both, the sum is what counts.
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_before_backward(self, loss: Tensor) -> None:
        """Add gradients that were set aside: after Lightning has set those of the step before to zero."""
        if self._first_part is not None:
            self._first_part.join()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the objective's count over the whole effective batch; before clipping."""
        if self._anchored is not None:
            self._anchored.restore()
        part, self._first_part = self._first_part, None
        sums = self._take_sums() if part is None else part.all_sums()
        factor = at_least_one((sums if part is None else part.last)["count"]).reciprocal()
        if part is not None and part.sums is not None:
            factor = part.weight * factor
            for name, each in (("base", part.sums), ("instruct", part.last)):
                self.log(f"train/loss_{name}", each["loss"] / at_least_one(each["count"]))
        gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
        loss, step = sums["loss"] / at_least_one(sums["count"]), self.trainer.global_step + 1
        if part is not None and part.kl is not None:
            loss = loss + part.kl_weight * part.kl
            self.log("train/kl", part.kl)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.losses.add(step, optimizer.param_groups[0]["lr"], loss)
        if loss.device.type == "cpu" or (every and step % every == 0):
            self.losses.check()
        self.log("train/loss", loss, prog_bar=True)
        for name, value in self.objective.finish_step(sums).items():
            self.log(f"train/{name}", value)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_train_epoch_end(self) -> None:
        """Leave a step within which the data have ended: Lightning takes none, and the next one must not add to it.

        Raises:
            ShadowlitError: Another epoch follows, to whose first step FSDP2 would add the gradients that it holds.
        """
        if self._sums is None:
            return
        self._sums = self._first_part = None
        if self._anchored is not None:
            self._anchored.restore()
        micro = self.trainer.accumulate_grad_batches
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        message = (
            f"the training data ended after {done:,} micro-batches of an epoch, although "
            f"{self.trainer.num_training_batches:,} were expected. Its last {done % micro} are not trained on, since a "
            f"step has trainer.accumulate_grad_batches={micro}. Set trainer.limit_train_batches={done}."
        )
        if isinstance(self.model, FSDPModule) and self.accumulates_whole and not self.trainer.fit_loop.done:
            raise ShadowlitError(message)
        rank_zero_warn(message)

    def on_validation_start(self) -> None:
        """Read the losses that were not read yet, and leave a step that was begun."""
        self.losses.check()
        if self._anchored is not None:
            self._anchored.restore()

    def on_train_end(self) -> None:
        """Do the same, and leave the frozen weights to the callback."""
        self.on_validation_start()
        self._anchored = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the module's state; with an adapter only the trained parameters, since the rest is in the Base's
        files.
        """
        state = super().state_dict(*args, **kwargs)
        if self.adapter is None or self.model is None:
            return state
        trained = {f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store an 8-bit optimizer's states as plain tensors, and the objective's state; raise if the run diverged."""
        self.losses.check()
        resuming.amend(self.trainer, checkpoint["loops"])
        if resuming.is_within_step(self.trainer):
            checkpoint[WITHIN_STEP] = True
        if self._anchored is not None and self._anchored.rows:
            checkpoint[KL_ROWS] = self._anchored.rows
        self.objective.on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [plain_tensors(state) for state in checkpoint["optimizer_states"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Convert them back; refuse a checkpoint of other parameters."""
        if self.adapter is not None or self.strict_loading:
            require_same_parameters(self.trainer.ckpt_path, checkpoint["state_dict"], self.state_dict())
        self._loaded_rows = checkpoint.get(KL_ROWS)
        self.objective.on_load_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [whole_tensors(state) for state in checkpoint["optimizer_states"]]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer of the trained parameters, and a schedule that counts optimizer steps."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        steps = step_count(self.trainer)
        if math.isinf(steps):
            require_no_end(self.trainer, self.lr_scheduler, self.schedule, self.warmup_ratio)
        grouping = {"groups": self.parameter_groups, "multipliers": self._multipliers}
        found: Any = self._optimizer(trained, 0 if math.isinf(steps) else int(steps), **grouping)
        self._settings = resuming.Settings(found["optimizer"], found["lr_scheduler"]["scheduler"])
        return found

    def _optimizer(
        self, trained: list[tuple[str, nn.Parameter]], total: int, **grouping: Any
    ) -> OptimizerLRSchedulerConfig:
        """Both for parameters by name and a number of optimizer steps."""
        optimizer = make_optimizer(
            self.optimizer,
            trained,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            offload=self.offload_optimizer,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            **grouping,
        )
        warmup = math.ceil(self.warmup_ratio * total)
        schedule = self.lr_scheduler, self.lr_scheduler_kwargs, self.schedule
        return {"optimizer": optimizer, "lr_scheduler": make_schedule(optimizer, *schedule, warmup, total)}

    @property
    def accumulates_whole(self) -> bool:
        """Whether FSDP2's ranks hold whole gradients until the last micro-batch of a step."""
        return self.reduce_gradients == "step" or (self.reduce_gradients == "auto" and self.adapter is not None)

    def _graft_callback(self) -> HoldsGraft:
        """The callback that holds the weights of the other anchor."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, HoldsGraft):
                return callback
        raise ShadowlitError(
            "model.anchors trains on the Instruct too, whose weights GraftCallback holds, but the trainer has none. "
            "Add one to its callbacks, or set model.anchors=null."
        )

    def _take_sums(self) -> dict[str, Tensor]:
        """The sums that were added, over all ranks, by name; a collective. The next micro-batch begins new ones."""
        assert self._sums is not None
        names, reduced = self._sums
        self._sums = None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(reduced)
        # Numbers of the device stay tensors: reading one here would make a GPU wait in every step.
        return dict(zip(names, reduced.unbind(), strict=True))

    def _add(self, sums: Mapping[str, Tensor | float]) -> Tensor:
        """Add a micro-batch's sums to those of the effective batch; return the loss."""
        require_sums(self.objective, sums, self._sums and self._sums[0])
        like = torch.zeros((), dtype=accumulation_dtype(self.device), device=self.device)
        values = torch.stack(
            [v.detach().to(like).view(()) if isinstance(v, Tensor) else like + v for v in sums.values()]
        )
        self._sums = tuple(sums), values if self._sums is None else self._sums[1] + values
        return cast("Tensor", sums["loss"])

    def _places(self, batch: Batch) -> dict[str, Any]:
        """The supervised tokens of a batch, and samples' borders where the attention takes them."""
        positions = batch.get("position_ids")
        borders = borders_of(positions) if positions is not None and takes_borders(self.kernel) else {}
        return {**borders, "supervised": supervised_positions(batch["labels"], positions)}

    def _seed_dropout(self) -> None:
        """Make this batch's random numbers a function of the seed, the batch's number and the rank."""
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(hash((self.seed, number, self.trainer.global_rank)) % 2**63)
