"""ShadowModule, the LightningModule that trains the Base and scores the weights that it holds."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LRSchedulerCallable, ReduceLROnPlateau
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchReduceLROnPlateau
from torchmetrics import Metric
from transformers import PreTrainedConfig, get_scheduler

from shadowlit.arguments import takes_plain_values
from shadowlit.checkpoint.names import factor_of
from shadowlit.data.images import IMAGE_INPUTS
from shadowlit.data.protocol import run_data
from shadowlit.distributed import local
from shadowlit.errors import DataError, ShadowlitError, as_usage, first_line, wrong_names
from shadowlit.grafting.adapter import require_graftable
from shadowlit.grafting.arithmetic import accumulation_dtype
from shadowlit.grafting.subject import BASE, TUNED, Subject
from shadowlit.pair.folders import is_image_text
from shadowlit.pair.pair import ModelPair, PairWithoutWeights
from shadowlit.plugins import calls
from shadowlit.training.checkpoints import ShardedStrategy, name_states, require_same_parameters, take_over
from shadowlit.training.divergence import LossWatch
from shadowlit.training.generation import generate, greedy_config
from shadowlit.training.head import HeadLoss, Way, evaluating
from shadowlit.training.loading import load_for_training
from shadowlit.training.metrics import Scores, TokenScores, name_clash
from shadowlit.training.objective import supervised_positions
from shadowlit.training.objectives import SFT, Objective, require_sums, require_weighed
from shadowlit.training.optimizer import OptimizerChoice, make_optimizer, plain_tensors, whole_tensors
from shadowlit.training.outputs import Batch, Outputs, References, model_inputs
from shadowlit.training.parallel import parallelize, reduce_gradients
from shadowlit.training.rehearsal import rehearse
from shadowlit.training.separation import require_separation
from shadowlit.training.varlen import NAME as VARLEN
from shadowlit.training.varlen import borders_of, knows_attention_of, takes_borders

log = logging.getLogger(__name__)

# Values that are logged here have already been reduced over the ranks, once and exactly.
warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\('(val|test|graft)/.*sync_dist=True")
# Ours adds to a batch of any data module.
warnings.filterwarnings("ignore", message=r"You have overridden `on_before_batch_transfer` in `LightningModule`")

# transformers' schedules that need no metric.
ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip


@runtime_checkable
class ChecksBeforeData(Protocol):
    """A callback that checks something before a command reads its data, which may take an hour."""

    def before_data(self, trainer: Trainer, pl_module: ShadowModule) -> None:
        """Raise if the command would fail; called on every rank, before the ranks know each other."""


class UnlimitedProgressBar(RichProgressBar):
    """Lightning's progress bar where the number of epochs is not limited: without ``/-2`` after the epoch."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "   ")


@takes_plain_values("model")
class ShadowModule(LightningModule):
    """Trains the Base of a pair, and scores the weights that the model holds.

    The loss of an effective batch (all micro-batches and ranks of a step) is a sum divided once by its count, for
    supervised fine-tuning the number of supervised tokens, or the sum of their weights where turns have some. It
    doesn't change with accumulation, the number of ranks or unequal lengths. Trainable parameters are float32;
    ``trainer.precision: bf16-mixed`` computes in bfloat16. The dropout masks of a batch depend on the seed and the
    batch's number only, so that a resumed run repeats them.

    Objectives with a reference (docs/preference.md) compare answers with their log-probabilities under the weights at
    the start, which :class:`GraftCallback` measures.

    Validation logs ``val/<subject>/<metric>``: for the ``tuned`` model, and for the models that callbacks swap in. The
    metrics are over all validation sets together; where there are several, ``val/<subject>/<set>/<metric>`` is logged
    for each.

    Example::

        module = ShadowModule(pair, adapter=LoraConfig(r=64, lora_alpha=128), lr=2e-4)
        Trainer(max_epochs=3, callbacks=[GraftCallback()]).fit(module, data)

    Args:
        pair: The Base that is trained and the Instruct that gets the update.
        adapter: Arguments of ``peft.LoraConfig``; null for full fine-tuning. Without ``target_modules`` all linear
            layers except the output head are adapted.
        objective: Objective that is trained for: SFT, DPO, KTO, ORPO, SimPO, CPO, ASFT or a class of your own, with
            its options; null for SFT.
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
        reduce_gradients: When FSDP2's ranks add their gradients: after every micro-batch, which keeps them sharded, or
            once per step, which holds 4 more bytes per trained parameter on every rank meanwhile. auto: once per step
            for an adapter. DDP always adds them once per step.
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
        seed: Seed of the adapter's initialisation and of dropout.
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
        on_nan: What happens when the training loss is not finite. stop: the training ends with an error, and writes no
            checkpoint after that step. warn: it continues, but exports nothing. A GPU's losses are read every
            ``trainer.log_every_n_steps`` steps, before a validation, before a checkpoint, and at the end.
    """

    def __init__(
        self,
        pair: ModelPair,
        adapter: LoraConfig | None = None,
        objective: Objective | None = None,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
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
        on_nan: Literal["stop", "warn"] = "stop",
    ) -> None:
        super().__init__()
        if not 0 <= warmup_ratio <= 1:
            raise ShadowlitError(f"model.warmup_ratio is {warmup_ratio}; expected a share between 0 and 1.")
        if lr <= 0:
            raise ShadowlitError(f"model.lr is {lr}; expected a positive learning rate, e.g. 2e-4 for LoRA.")
        require_graftable(adapter)
        self.pair = pair
        self.objective = SFT() if objective is None else objective
        self.adapter = adapter
        if adapter is not None and adapter.target_modules is None and adapter.target_parameters is None:
            adapter.target_modules = "all-linear"
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.schedule, self.warmup_ratio = schedule, warmup_ratio
        self.lr_scheduler, self.lr_scheduler_kwargs = lr_scheduler, lr_scheduler_kwargs
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.optimizer, self.offload_optimizer = optimizer, offload_optimizer
        self.reduce_gradients = reduce_gradients
        self.activation_checkpointing, self.compile_layers = activation_checkpointing, compile_layers
        self.head_loss = head_loss
        self.attn_implementation = self.kernel = attn_implementation
        self.experts_implementation = experts_implementation
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.train_towers = list(train_towers)
        self.metrics = dict(metrics or {})
        if wrong := wrong_names("model.metrics", self.metrics):
            raise ShadowlitError(wrong[0])
        self.losses = LossWatch(on_nan)  # of the running or last fit
        self.callback_metrics: dict[str, float] = {}  # by callbacks in the running validation, logged with the scores
        self.model: nn.Module | None = None
        self._head_loss: HeadLoss | None = None
        self._scores: dict[tuple[Subject, str], Scores] = {}  # by subject and set; the set "" is all of them
        self._sums: tuple[tuple[str, ...], Tensor] | None = None  # the objective's, by name, of the effective batch
        self._references = References()
        # An adapter's checkpoint holds the factors only.
        self.strict_loading = adapter is None

    def configure_model(self) -> None:
        """Build the Base on the meta device, shard it where the strategy has a mesh, fill it from its files."""
        if self.model is not None:
            return
        mesh = self._data_parallel_mesh()
        packs = run_data(self.trainer).packing is not None
        self.model = load_for_training(
            self.pair.readers()[0],
            device=self.trainer.strategy.root_device,
            mesh=mesh,
            seed=self.seed,
            **self.architecture(self.trainer.precision, packs, all(self.pair.ties()), mesh),
        )

    def architecture(self, precision: str, packs: bool, tied: bool, mesh: Any = None) -> dict[str, Any]:
        """What the model is built of: arguments of ``load_for_training`` and ``build_for_training``.

        Args:
            precision: ``trainer.precision``.
            packs: Whether training samples share rows.
            tied: Whether both models tie the output head to the embedding, if their configs do.
            mesh: Data-parallel mesh of FSDP2, or ``None``.
        """
        config = self.pair.base_config()
        config.use_cache = False
        config.get_text_config().vocab_size = self.pair.config().get_text_config().vocab_size
        if not tied:  # whatever config.json says; one of the two has a head of its own
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        self.kernel = self._kernel(config, packs)
        if is_image_text(config) and self.kernel == VARLEN:
            raise ShadowlitError(
                f"model.attn_implementation is {VARLEN!r}, which is causal in every layer, but '{config.model_type}' "
                "has a vision tower, in which patches see each other. Use sdpa or flash_attention_2."
            )
        compute_dtype = _compute_dtype(precision)
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
        }

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits ``[B, T, V]`` of a batch with ``input_ids`` ``[B, T]``.

        What else the batch has of ``attention_mask`` and ``position_ids``, both ``[B, T]``, reaches the model, and so
        does what a processor makes of images (:data:`shadowlit.data.images.IMAGE_INPUTS`). Rows packed from several
        conversations come with ``position_ids`` that restart at each, and without a mask.
        """
        assert self.model is not None
        return self.model(**model_inputs(batch), use_cache=False).logits

    def setup(self, stage: str) -> None:
        """Forget what an earlier command has left, and take over how checkpoints are written and read."""
        take_over(self.trainer)
        self._sums = None
        self._scores.clear()
        self.losses = LossWatch(self.losses.on_nan)
        if stage == "fit":
            self.objective.reset()

    def configure_callbacks(self) -> list[Callback]:
        """Try the objective, the metrics and the optimizer, and let callbacks check what they can before data are read.

        Of all hooks this one runs first: ``prepare_data`` and ``setup`` of the data module come before a callback's
        ``setup``.

        Returns a progress bar in place of Lightning's own if the number of epochs is not limited.
        """
        if self.trainer.state.fn != TrainerFn.PREDICTING:
            self.score_names()
        if self.trainer.state.fn == TrainerFn.FITTING:
            with as_usage():
                self._try_optimizer()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ChecksBeforeData):
                callback.before_data(self.trainer, self)
        bar = self.trainer.progress_bar_callback
        if type(bar) is not RichProgressBar or self.trainer.max_epochs != -1:
            return []
        return [UnlimitedProgressBar(int(bar.refresh_rate), theme=bar.theme)]

    def score_names(self) -> set[str]:
        """The names of the metrics that every validation set is scored with, found by scoring random logits.

        Raises:
            ShadowlitError: The objective returns something else than sums; a metric can't be updated, gives something
                that is not a number, or has another's name.
        """
        # Of a model on the hub no weights are downloaded for this.
        vocabulary = PairWithoutWeights(**asdict(self.pair)).config().get_text_config().vocab_size
        with as_usage():
            return rehearse(self.objective, self.configure_scores, self.metrics, vocabulary)

    def on_fit_start(self) -> None:
        """Refuse data of another kind than the objective needs; name the parameters in the optimizer's state."""
        if not isinstance(self.trainer.strategy, ShardedStrategy):  # which does it itself
            name_states(self.trainer.optimizers, self)
        samples = run_data(self.trainer).samples
        if samples != self.objective.samples:
            raise ShadowlitError(
                f"model.objective is {type(self.objective).__name__}, which needs {self.objective.samples}, but the "
                f"data module gives {samples}. Set samples={self.objective.samples!r} of ShadowData."
            )

    def on_train_start(self) -> None:
        """Refuse packed rows with a model in which one sample sees another."""
        if run_data(self.trainer).packing is not None:
            assert self.model is not None
            with self.trainer.precision_plugin.val_step_context():
                require_separation(self.model)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Find supervised tokens and samples' borders on the CPU, where nothing has to wait for a GPU."""
        if isinstance(batch, Mapping) and "labels" in batch and "supervised" not in batch:
            positions = batch.get("position_ids")
            borders = borders_of(positions) if positions is not None and takes_borders(self.kernel) else {}
            return {**batch, **borders, "supervised": supervised_positions(batch["labels"], positions)}
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the summed loss of a micro-batch, scaled such that its gradients add up to those of the sum."""
        self._seed_dropout()
        if self.trainer.accumulate_grad_batches > 1:
            assert self.model is not None
            steps = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
            reduce_gradients(self.model, steps or not self.accumulates_whole)
        outputs = self._outputs(batch, BASE, "train")
        with calls(self.objective, "model.objective", "Correct its step."):
            loss = self._add(self.objective.step(outputs))
        require_weighed(self.objective, outputs)
        # Lightning divides by the micro-batches, and DDP and FSDP by the ranks: undo both, the sum is what counts.
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the objective's count over the whole effective batch; before clipping."""
        assert self._sums is not None
        names, reduced = self._sums
        self._sums = None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(reduced)
        # Numbers of the device stay tensors: reading one here would make a GPU wait in every step.
        sums = dict(zip(names, reduced.unbind(), strict=True))
        count = sums["count"]
        number = torch.where(count > 0, count, 1)  # weights may sum to less than 1
        gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, number.reciprocal())
        loss, step = sums["loss"] / number, self.trainer.global_step + 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.losses.add(step, optimizer.param_groups[0]["lr"], loss)
        if loss.device.type == "cpu" or (every and step % every == 0):
            self.losses.check()
        self.log("train/loss", loss, prog_bar=True)
        for name, value in self.objective.finish_step(sums).items():
            self.log(f"train/{name}", value)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_train_end(self) -> None:
        """Read the losses that were not read yet."""
        self.losses.check()

    on_validation_start = on_train_end

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0, subject: Subject = TUNED) -> None:
        """Add a batch to the scores of ``subject``, whose weights are loaded. An override passes it on to ``super``."""
        data = run_data(self.trainer)
        names = data.test_names if self.trainer.testing else data.validation_names
        self._score(batch, names[dataloader_idx] if names else str(dataloader_idx), subject)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Answer the prompts of a left-padded batch greedily, with the weights that are loaded.

        Returns:
            One ``{"index": row in the file, "answer": text}`` per prompt.
        """
        assert self.model is not None
        tokenizer = self.pair.tokenizer()
        config = greedy_config(self.pair.template_folder(), tokenizer, self.max_new_tokens)
        images = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
        prompts = batch["input_ids"], batch["attention_mask"], images
        answers = generate(self.model, tokenizer, config, *prompts, synced_gpus=self.trainer.world_size > 1)
        return [
            {"index": index, "answer": answer.text}
            for index, answer in zip(batch["index"].tolist(), answers, strict=True)
            if index >= 0
        ]

    def on_validation_epoch_end(self) -> None:
        """Log the scores of every subject, and what callbacks measured."""
        self._log_scores("test" if self.trainer.testing else "val")

    on_test_epoch_end = on_validation_epoch_end

    def configure_scores(self) -> Metric:
        """The metric that each set is scored with, for every subject. ``model.metrics`` adds others to it.

        Its ``compute()`` returns a dict from metric names to numbers. A :class:`TokenScores`, or a subclass that
        doesn't override ``update``, gets the sums of a batch through ``add``, without materialising the full logits.
        Any other metric, and a subclass that overrides ``update(logits, labels)``, gets ``[B, T, V]`` and ``[B, T]``
        tensors. With an objective of preferences, ``update`` gets :class:`shadowlit.training.outputs.Answers` instead.
        """
        return self.objective.configure_scores()

    def lacking_references(self, who: Subject) -> list[str]:
        """The preference sets that the objective needs ``who``'s log-probabilities of and that are not measured yet."""
        if not self.objective.has_reference:
            return []
        sets = run_data(self.trainer).preference_sets
        # The training data only ever meet the model that is trained.
        return self._references.lacking(who, {n: one for n, one in sets.items() if who == BASE or n != "train"})

    @torch.no_grad()
    def measure_references(self, who: Subject, names: list[str]) -> None:
        """Measure the answers of preference sets with the weights of the untouched model ``who``, which are loaded.

        A collective: every rank does its share of each set.
        """
        assert self.model is not None
        data = run_data(self.trainer)
        for name in names:
            dataset = data.preference_sets[name]
            logps = torch.zeros(len(dataset), 2, dtype=accumulation_dtype(self.device), device=self.device)
            with evaluating(self.model), self.trainer.precision_plugin.val_step_context():
                for batch in data.scoring_loader(name):
                    batch = self.trainer.strategy.batch_to_device(batch)
                    found = Outputs(self.head_losses(), batch).answers(with_reference=False)
                    logps[batch["sample"].index_select(0, batch["valid"])] = found.logps
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(logps)
            self._references.keep(who, name, dataset, logps)

    def head_losses(self) -> HeadLoss:
        """The implementation of the model's losses, chosen on first use, when its weights are loaded."""
        assert self.model is not None
        if self._head_loss is None or self._head_loss.model is not self.model:
            self._head_loss = HeadLoss(self.model, self.head_loss)
        return self._head_loss

    def has_scores(self, subject: Subject) -> bool:
        """Whether batches were scored for ``subject`` in the running validation."""
        return any(who == subject for who, _ in self._scores)

    def scores(self, subject: Subject) -> dict[str, float]:
        """The metrics of ``subject`` in the running validation, by ``<metric>`` and ``<set>/<metric>``.

        Reduced over all ranks; every rank must call it.
        """
        return {
            f"{name}/{what}" if name else what: value
            for (who, name), metric in self._scores.items()
            if who == subject
            for what, value in metric.compute().items()
        }

    def sample_losses(self, subject: Subject) -> dict[str, Tensor]:
        """Loss and number of supervised tokens of each sample in the running validation, ``[N, 2]`` by set.

        The set "" is all of them. Empty for an objective whose scores are no losses of tokens. A collective.
        """
        owns = {name: one.own for (who, name), one in self._scores.items() if who == subject}
        return {name: own.by_sample() for name, own in owns.items() if isinstance(own, TokenScores) and own.takes_sums}

    def take_scores(self, subject: Subject) -> dict[str, float]:
        """Return the metrics of ``subject`` and forget them, so that they are not logged at the validation's end."""
        taken = self.scores(subject)
        self._scores = {key: metric for key, metric in self._scores.items() if key[0] != subject}
        return taken

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The module's state; with an adapter only the trained parameters, since the rest is in the Base's files."""
        state = super().state_dict(*args, **kwargs)
        if self.adapter is None or self.model is None:
            return state
        trained = {f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store an 8-bit optimizer's states as plain tensors, and the objective's state; raise if the run diverged."""
        self.losses.check()
        self.objective.on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [plain_tensors(state) for state in checkpoint["optimizer_states"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Convert them back; refuse a checkpoint of other parameters."""
        if self.adapter is not None or self.strict_loading:
            require_same_parameters(self.trainer.ckpt_path, checkpoint["state_dict"], self.state_dict())
        self.objective.on_load_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [whole_tensors(state) for state in checkpoint["optimizer_states"]]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer of the trained parameters, and a schedule that counts optimizer steps."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        steps = self.trainer.estimated_stepping_batches
        needs_none = self.lr_scheduler is None and self.schedule == "constant" and not self.warmup_ratio
        if math.isinf(steps) and not (needs_none or callable(self.lr_scheduler)):
            schedule = self.lr_scheduler or self.schedule
            raise ShadowlitError(
                f"trainer.max_epochs is {self.trainer.max_epochs} and trainer.max_steps is {self.trainer.max_steps}, "
                f"so the number of steps is unknown, over which the rate follows the schedule {schedule!r} with "
                f"model.warmup_ratio={self.warmup_ratio:g}. Set trainer.max_steps, or model.schedule=constant and "
                "model.warmup_ratio=0; trainer.max_time ends either."
            )
        return self.optimizer_of(trained, 0 if math.isinf(steps) else int(steps))

    def _try_optimizer(self) -> None:
        """Create the optimizer and its schedule for a few numbers, so that a wrong option is found early."""
        sizes = [(2, 2)] if self.adapter else [(2, 2), (2,)]
        try:
            self.optimizer_of([(str(size), nn.Parameter(torch.zeros(size))) for size in sizes], total=1000)
        except ShadowlitError as error:
            # Of a schedule, a list may need a value for each group of parameters, of which there may be more.
            if str(error).startswith("model.optimizer") or not isinstance(error.__cause__, ValueError):
                raise

    def optimizer_of(self, trained: list[tuple[str, nn.Parameter]], total: int) -> OptimizerLRSchedulerConfig:
        """Both for parameters by name and a number of optimizer steps."""
        optimizer = make_optimizer(
            self.optimizer,
            (p for _, p in trained),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            offload=self.offload_optimizer,
            lora_b=[p for name, p in trained if factor_of(name) == "B"],
            loraplus_lr_ratio=self.loraplus_lr_ratio,
        )
        return {"optimizer": optimizer, "lr_scheduler": self._schedule(optimizer, total)}

    def _schedule(self, optimizer: Optimizer, total: int) -> LRSchedulerConfigType:
        warmup = math.ceil(self.warmup_ratio * total)
        scheduler: Any
        try:
            if isinstance(self.lr_scheduler, str):
                scheduler = get_scheduler(self.lr_scheduler, optimizer, warmup, total, self.lr_scheduler_kwargs)
            elif self.lr_scheduler is None:
                rate = partial(_rate, total=total, warmup=warmup, schedule=self.schedule)
                scheduler = LambdaLR(optimizer, rate)
            else:
                scheduler = self.lr_scheduler(optimizer)
        except Exception as error:
            raise ShadowlitError(
                f"model.lr_scheduler{'_kwargs' if isinstance(self.lr_scheduler, str) else ''} can't make a schedule "
                f"({first_line(error)}). Correct its options."
            ) from error
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"scheduler": scheduler, "interval": "epoch", "monitor": scheduler.monitor}
        if isinstance(scheduler, TorchReduceLROnPlateau):
            raise ShadowlitError(
                "model.lr_scheduler is torch's ReduceLROnPlateau, which can't name a metric. Use class_path "
                "lightning.pytorch.cli.ReduceLROnPlateau with monitor, e.g. val/grafted/loss."
            )
        return {"scheduler": scheduler, "interval": "step"}

    def _kernel(self, config: PreTrainedConfig, packs: bool) -> str:
        """The attention kernel's name, with auto decided."""
        if self.attn_implementation != "auto":
            return self.attn_implementation
        knows = not self.compile_layers and not is_image_text(config) and knows_attention_of(config)
        return VARLEN if packs and knows else "sdpa"

    @property
    def accumulates_whole(self) -> bool:
        """Whether FSDP2's ranks hold whole gradients until the last micro-batch of a step."""
        return self.reduce_gradients == "step" or (self.reduce_gradients == "auto" and self.adapter is not None)

    def _outputs(self, batch: Batch, who: Subject, name: str) -> Outputs:
        """The model's outputs for a batch of the set ``name``, with the references of ``who``."""
        return Outputs(self.head_losses(), batch, partial(self._references.look_up, who, name))

    def _add(self, sums: Mapping[str, Tensor | float]) -> Tensor:
        """Add a micro-batch's sums to those of the effective batch; return the loss."""
        require_sums(self.objective, sums, self._sums and self._sums[0])
        like = torch.zeros((), dtype=accumulation_dtype(self.device), device=self.device)
        values = torch.stack(
            [v.detach().to(like).view(()) if isinstance(v, Tensor) else like + v for v in sums.values()]
        )
        self._sums = tuple(sums), values if self._sums is None else self._sums[1] + values
        return cast("Tensor", sums["loss"])

    def _score(self, batch: Batch, set_name: str, subject: Subject) -> None:
        loaders = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        several = isinstance(loaders, list) and len(loaders) > 1
        # A single set is all sets together.
        keys = [(subject, name) for name in (("", set_name) if several else ("",))]
        for key in keys:
            if key not in self._scores:
                self._scores[key] = Scores(self.configure_scores(), self.metrics, self.device)
        stage = "test" if self.trainer.testing else "val"
        outputs = self._outputs(batch, subject.start, f"{stage}/{set_name}")
        self.objective.score(outputs, [self._scores[key] for key in keys])

    def _log_scores(self, stage: str) -> None:
        added, self.callback_metrics = self.callback_metrics, {}
        for subject in dict.fromkeys(who for who, _ in self._scores):
            scores, prefix = self.scores(subject), f"{stage}/{subject.name}/"
            if twice := [prefix + name for name in scores if prefix + name in added]:
                raise DataError(name_clash(twice))
            for name, value in scores.items():
                self.log(prefix + name, value, prog_bar=name == "loss")
        for name, value in added.items():
            self.log(name, value, prog_bar=name in ("graft/gain", "graft/survival"))
        self._scores.clear()

    def _seed_dropout(self) -> None:
        """Make this batch's random numbers a function of the seed, the batch's number and the rank."""
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(hash((self.seed, number, self.trainer.global_rank)) % 2**63)

    def _data_parallel_mesh(self) -> Any:
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy):
            return None
        assert self.device_mesh is not None
        sizes = dict(zip(self.device_mesh.mesh_dim_names or (), self.device_mesh.shape, strict=True))
        if sizes["tensor_parallel"] != 1:
            raise ShadowlitError(
                f"ModelParallelStrategy has a mesh of {sizes}: it would split tensors, and shard nothing. Set its "
                f"data_parallel_size={self.trainer.world_size} and tensor_parallel_size=1."
            )
        return self.device_mesh["data_parallel"]


def _rate(step: int, *, total: int, warmup: int, schedule: str) -> float:
    """The learning rate of ``step`` as a share of its peak."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]


def _compute_dtype(precision: str) -> torch.dtype:
    if precision == "32-true":
        return torch.float32
    if precision == "bf16-mixed":
        return torch.bfloat16
    raise ShadowlitError(
        f"trainer.precision is {precision!r}; expected '32-true' or 'bf16-mixed'. Trainable parameters are float32, "
        "since a small update does not survive in half precision ('bf16-true' would also round the rotary frequencies)."
    )
