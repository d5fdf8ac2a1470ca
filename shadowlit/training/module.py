"""ShadowModule: trains the Base; the steps, nothing else."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from transformers import PreTrainedConfig

from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.data.images import IMAGE_INPUTS
from shadowlit.distributed import local
from shadowlit.errors import ShadowlitError
from shadowlit.grafting.adapter import require_graftable
from shadowlit.grafting.subject import BASE, TUNED, Subject
from shadowlit.pair.folders import is_image_text
from shadowlit.pair.pair import ModelPair
from shadowlit.training.generation import generate_answers, greedy_config
from shadowlit.training.head import HeadLoss, Way, evaluating
from shadowlit.training.loading import load_for_training
from shadowlit.training.metrics import PreferenceScores, TokenScores
from shadowlit.training.objective import TokenSums, sum_tokens, supervised_positions
from shadowlit.training.objectives import SFT, Answers, Objective, preference_metrics, preference_sums
from shadowlit.training.optimizer import OptimizerName, make_optimizer, plain_tensors, whole_tensors
from shadowlit.training.parallel import parallelize, reduce_gradients
from shadowlit.training.reference import References, sum_by_sequence
from shadowlit.training.separation import require_separation
from shadowlit.training.varlen import NAME as VARLEN
from shadowlit.training.varlen import borders_of, knows_attention_of, takes_borders

log = logging.getLogger(__name__)

# What is logged here has been reduced over the ranks already, once and exactly.
warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\('(val|test|graft)/.*sync_dist=True")
# Ours adds to a batch of any data module.
warnings.filterwarnings("ignore", message=r"You have overridden `on_before_batch_transfer` in `LightningModule`")

Batch = Mapping[str, Tensor]
# The last four are of packed rows, for attention that takes their borders instead of a mask.
_INPUTS = ("input_ids", "attention_mask", "position_ids",
           "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", *IMAGE_INPUTS)  # fmt: skip


class ShadowModule(LightningModule):
    """Trains the Base of a pair on conversations, and scores whatever weights are loaded into it.

    The loss is the cross entropy summed over the supervised tokens of the whole effective batch (micro-batches ×
    ranks), divided by their number: accumulation and unequal lengths change nothing. Everything that learns is
    float32; ``trainer.precision: bf16-mixed`` computes in bfloat16. The dropout masks of a batch follow from the
    seed and the batch's number, so that a resumed run repeats them.

    Objectives of preferences (docs/preference.md) divide the summed losses of pairs, or of labelled answers, by their
    number in the same way. What they compare with is measured by :class:`GraftCallback`, which holds the start.

    Validation adds each batch to the scores of a subject (the ``tuned`` model, unless the callback that loaded other
    weights passes another one) and logs ``val/<subject>/<metric>`` at its end, over all sets together and, where
    there are several, ``val/<subject>/<set>/<metric>`` for each.

    Args:
        pair: The Base that is trained and the Instruct that gets the update.
        adapter: Any argument of ``peft.LoraConfig``; null for full tuning. Without ``target_modules`` all linear
            layers but the output head are adapted.
        objective: What is trained for: SFT, DPO, KTO, ORPO, SimPO, CPO or ASFT, with its options; null for SFT.
        lr: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay; on matrices only, not on norms and biases.
        betas: Decay rates of AdamW's two moments.
        eps: AdamW's epsilon.
        schedule: How the rate falls after the warm-up: to 0 along a cosine or a line, or not at all.
        warmup_ratio: Share of all optimizer steps in which the rate rises from 0, between 0 and 1.
        optimizer: adamw, or adamw_8bit, whose moments take 2 bytes per trained parameter instead of 8 (torchao or
            bitsandbytes).
        offload_optimizer: Keep AdamW's moments in the CPU's memory between steps: 8 bytes per trained parameter less
            on a GPU, and a step that waits for 16 to be moved. On one device, under DDP and FSDP2.
        reduce_gradients: When FSDP2's ranks add their gradients: after every micro-batch, which keeps them sharded, or
            once per step, which holds 4 more bytes per trained parameter on every rank meanwhile. auto: per step for
            an adapter. DDP always adds them once per step.
        activation_checkpointing: What each decoder layer computes again in the backward pass instead of keeping it.
            false or none: nothing. true or full: everything; least memory, about a third more time. selective: what is
            cheap for the memory that it takes; attention and products that don't widen are kept.
        compile_layers: Compile each decoder layer with ``torch.compile``.
        head_loss: How losses come from the last hidden states. auto: past the logits of a whole batch where the
            model's head allows it, which is proven on the model when it starts; see
            :class:`shadowlit.training.head.HeadLoss` for the others: chunked, recomputed, torch, liger, logits.
        attn_implementation: The attention kernel, by transformers' name: sdpa, flash_attention_2, eager …; or varlen,
            sdpa that computes each sample of a packed row by itself. auto: varlen for ``data.packing`` where the model
            allows it and its layers aren't compiled, else sdpa.
        experts_implementation: The way through a mixture of experts, by transformers' name: grouped_mm (its default),
            batched_mm, eager. Outside of FSDP2, bf16-mixed computes in bfloat16 with eager only.
        max_new_tokens: Longest answer that ``predict`` generates, in tokens.
        seed: Seeds the adapter's start and the dropout.
        train_towers: What of a vision-language model learns: language, vision, projector, or regular expressions
            searched in the parameters' names. The rest stays frozen, and an adapter sits on these only.
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
        optimizer: OptimizerName = "adamw",
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
        self.optimizer, self.offload_optimizer = optimizer, offload_optimizer
        self.reduce_gradients = reduce_gradients
        self.activation_checkpointing, self.compile_layers = activation_checkpointing, compile_layers
        self.head_loss = head_loss
        self.attn_implementation = self.kernel = attn_implementation
        self.experts_implementation = experts_implementation
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.train_towers = list(train_towers)
        self.model: nn.Module | None = None
        self._head_loss: HeadLoss | None = None
        self._scores: dict[tuple[Subject, str], Metric] = {}  # by subject and set; the set "" is all of them
        self._sums: Tensor | None = None  # loss, what it is divided by, and more, of the effective batch so far
        self._references = References()
        self._kl: Tensor | float = 0.0  # how far the policy was from the reference in the step before, for KTO
        # An adapter's checkpoint holds the factors only.
        self.strict_loading = adapter is None

    def configure_model(self) -> None:
        """Build the Base on the meta device, shard it where the strategy has a mesh, fill it from its files."""
        if self.model is not None:
            return
        config = self.pair.base_config()
        config.use_cache = False
        config.get_text_config().vocab_size = self.pair.config().get_text_config().vocab_size
        self.kernel = self._kernel(config)
        if is_image_text(config) and self.kernel == VARLEN:
            raise ShadowlitError(
                f"model.attn_implementation is {VARLEN!r}, which is causal in every layer, but '{config.model_type}' "
                "has a vision tower, in which patches see each other. Use sdpa or flash_attention_2."
            )
        mesh = self._data_parallel_mesh()
        compute_dtype = _compute_dtype(self.trainer.precision)
        self.model = load_for_training(
            AlignedReader.open(self.pair.base_folder(), self.pair.instruct_folder()),
            config,
            adapter=self.adapter,
            device=self._device_to_fill(),
            mesh=mesh,
            parallelize=partial(
                parallelize,
                mesh=mesh,
                activation_checkpointing=self.activation_checkpointing,
                compile_layers=self.compile_layers,
                compute_dtype=compute_dtype,
            ),
            attn_implementation=self.kernel,
            experts_implementation=self.experts_implementation,
            trust_remote_code=self.pair.trust_remote_code,
            seed=self.seed,
            towers=self.train_towers,
            # In float32 everything computes in float32, and layers of two dtypes can't be put one behind the other.
            frozen_dtype=torch.float32 if compute_dtype == torch.float32 else None,
        )

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits ``[B, T, V]`` of a batch with ``input_ids`` ``[B, T]``.

        What else the batch has of ``attention_mask`` and ``position_ids``, both ``[B, T]``, reaches the model, and so
        does what a processor makes of images (:data:`shadowlit.data.images.IMAGE_INPUTS`). Rows packed from several
        conversations come with ``position_ids`` that restart at each, and without a mask.
        """
        assert self.model is not None
        return self.model(**_model_inputs(batch), use_cache=False).logits

    def on_fit_start(self) -> None:
        """Refuse data that aren't what the objective is about."""
        samples = getattr(self.trainer.datamodule, "samples", "conversations")  # type: ignore[attr-defined]
        if samples != self.objective.samples:
            raise ShadowlitError(
                f"model.objective is {type(self.objective).__name__}, which needs {self.objective.samples}, but the "
                f"data module gives {samples}. Set samples={self.objective.samples!r} of ShadowData."
            )

    def on_train_start(self) -> None:
        """Refuse packed rows where the model would let one sample see another."""
        if getattr(self.trainer.datamodule, "packing", None) is not None:  # type: ignore[attr-defined]
            assert self.model is not None
            with self.trainer.precision_plugin.val_step_context():
                require_separation(self.model)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Find supervised tokens and samples' borders while they are on the CPU: a GPU would have to be waited for."""
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
            reduce_gradients(self.model, steps or not self._accumulates_whole)
        if self._prefers:
            loss, sums = preference_sums(self.objective, self._answers(batch, BASE, "train"), self._kl)
        else:
            positions, targets = _supervised(batch)
            loss = self.head_losses().loss(_model_inputs(batch), positions, targets)
            sums = torch.stack([loss.detach().double(), loss.new_full((), len(targets), dtype=torch.float64)])
        self._sums = sums if self._sums is None else self._sums + sums
        # Lightning divides by the micro-batches, and DDP and FSDP by the ranks: undo both, the sum is what counts.
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the supervised tokens, or samples, of the whole effective batch; before clipping."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        # Numbers of the device stay tensors: reading one here would make a GPU wait in every step.
        loss, number = sums[0], sums[1].clamp(min=1)
        gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, number.reciprocal())
        self.log("train/loss", loss / number, prog_bar=True)
        self.log("train/tokens", sums[2 if self._prefers else 1])
        if self._prefers:
            metrics = preference_metrics(sums, self.objective.samples)
            self._kl = metrics.get("kl", self._kl)
            for name, value in metrics.items():
                if name != "loss":
                    self.log(f"train/{name}", value)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0, subject: Subject = TUNED) -> None:
        """Add a batch to the scores of ``subject``, whose weights are loaded. An override passes it on to ``super``."""
        self._score(batch, self._set_name(dataloader_idx), subject)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0, subject: Subject = TUNED) -> None:
        """As :meth:`validation_step`, on the test sets."""
        self._score(batch, self._set_name(dataloader_idx), subject)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Answer the prompts of a left-padded batch greedily, with the weights that are loaded.

        Returns:
            One ``{"index": row in the file, "answer": text}`` per prompt.
        """
        assert self.model is not None
        tokenizer = self.pair.tokenizer()
        config = greedy_config(self.pair.template_folder(), tokenizer, self.max_new_tokens)
        answers = generate_answers(
            self.model,
            tokenizer,
            config,
            batch["input_ids"],
            batch["attention_mask"],
            {name: batch[name] for name in IMAGE_INPUTS if name in batch},
            synced_gpus=self.trainer.world_size > 1,
        )
        return [
            {"index": index, "answer": answer}
            for index, answer in zip(batch["index"].tolist(), answers, strict=True)
            if index >= 0
        ]

    def on_validation_epoch_end(self) -> None:
        """Log the scores of every subject that was measured since the validation began."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of every subject on the test sets."""
        self._log_scores("test")

    def configure_scores(self) -> Metric:
        """The metric each set is scored with. Override to log more, for every subject alike.

        Its ``compute()`` returns a dict from metric names to numbers. A :class:`TokenScores`, or a subclass that
        leaves ``update`` alone, gets the sums of a batch through ``add``, without whole logits being made. Any other
        metric, and a subclass that overrides ``update(logits, labels)``, gets ``[B, T, V]`` and ``[B, T]`` tensors.
        With an objective of preferences, ``update`` gets :class:`shadowlit.training.objectives.Answers` instead.
        """
        return PreferenceScores(self.objective) if self._prefers else TokenScores()

    def lacking_references(self, who: Subject) -> list[str]:
        """The sets of which the objective needs ``who``'s log-probabilities and doesn't know them; BASE or INSTRUCT."""
        if not self.objective.has_reference:
            return []
        sets = getattr(self.trainer.datamodule, "preference_sets", {})  # type: ignore[attr-defined]
        # The training data only ever meet the model that is trained.
        return self._references.lacking(who, {n: one for n, one in sets.items() if who == BASE or n != "train"})

    @torch.no_grad()
    def measure_references(self, names: list[str]) -> dict[str, Tensor]:
        """Log-probabilities of the answers of preference sets under the weights that are loaded.

        A collective: every rank does its share of each set.

        Returns:
            ``[samples, 2]`` float64 by set, for :meth:`keep_references`.
        """
        assert self.model is not None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        measured = {}
        for name in names:
            dataset = data.preference_sets[name]
            logps = torch.zeros(len(dataset), 2, dtype=torch.float64, device=self.device)
            with evaluating(self.model), self.trainer.precision_plugin.val_step_context():
                for batch in data.scoring_loader(name):
                    batch = self.trainer.strategy.batch_to_device(batch)
                    found = self._answers(batch, None, name)
                    logps[batch["sample"].index_select(0, batch["valid"])] = found.logps
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(logps)
            measured[name] = logps
        return measured

    def keep_references(self, who: Subject, measured: dict[str, Tensor]) -> None:
        """Keep these log-probabilities, by set, as those of the untouched model ``who``."""
        sets = self.trainer.datamodule.preference_sets  # type: ignore[attr-defined]
        for name, logps in measured.items():
            self._references.keep(who, name, sets[name], logps)

    def head_losses(self) -> HeadLoss:
        """How losses come from the model; found out in its first forward pass, in which its weights are there."""
        assert self.model is not None
        if self._head_loss is None or self._head_loss.model is not self.model:
            self._head_loss = HeadLoss(self.model, self.head_loss)
        return self._head_loss

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

    def take_scores(self, subject: Subject) -> dict[str, float]:
        """Return the metrics of ``subject`` and forget them, so that they are not logged at the validation's end."""
        taken = self.scores(subject)
        self._scores = {key: metric for key, metric in self._scores.items() if key[0] != subject}
        return taken

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The module's state; with an adapter only what is trained, since the rest lies in the Base's files."""
        state = super().state_dict(*args, **kwargs)
        if self.adapter is None or self.model is None:
            return state
        trained = {f"model.{name}" for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what an optimizer of 8 bits holds as plain tensors, and what the next step of KTO compares with."""
        if self.objective.samples == "labels":
            checkpoint["kl"] = float(self._kl)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [plain_tensors(state) for state in checkpoint["optimizer_states"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make of it again what the optimizer takes."""
        self._kl = checkpoint.get("kl", 0.0)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [whole_tensors(state) for state in checkpoint["optimizer_states"]]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW on whatever requires a gradient; the schedule counts optimizer steps."""
        optimizer = make_optimizer(
            self.optimizer,
            (p for p in self.parameters() if p.requires_grad),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            offload=self.offload_optimizer,
        )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = math.ceil(self.warmup_ratio * total)
        schedule = LambdaLR(optimizer, partial(_rate, total=total, warmup=warmup, schedule=self.schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _kernel(self, config: PreTrainedConfig) -> str:
        """The attention kernel's name, with auto decided."""
        if self.attn_implementation != "auto":
            return self.attn_implementation
        packs = getattr(self.trainer.datamodule, "packing", None) is not None  # type: ignore[attr-defined]
        knows = not self.compile_layers and not is_image_text(config) and knows_attention_of(config)
        return VARLEN if packs and knows else "sdpa"

    @property
    def _accumulates_whole(self) -> bool:
        return self.reduce_gradients == "step" or (self.reduce_gradients == "auto" and self.adapter is not None)

    @property
    def _prefers(self) -> bool:
        return self.objective.samples != "conversations"

    def _answers(self, batch: Batch, who: Subject | None, name: str) -> Answers:
        """What is known of a batch of preferences, with the reference of ``who`` for the set ``name``."""
        if "sequence" not in batch:
            raise ShadowlitError(
                f"model.objective is {type(self.objective).__name__}, which needs {self.objective.samples}, but a "
                f"batch of '{name}' holds conversations. Set samples={self.objective.samples!r} of ShadowData."
            )
        positions, targets = _supervised(batch)
        inputs = _model_inputs(batch)
        logps = self.head_losses().token_log_probs(inputs, positions, targets)
        sequence = batch["sequence"].flatten().index_select(0, positions)
        sums, counts = sum_by_sequence(logps, sequence, 2 * len(batch["sample"]))
        valid = batch["valid"]
        reference = None
        if who is not None and self.objective.has_reference:
            reference = self._references.look_up(who, name, batch["sample"].index_select(0, valid))
        logps, lengths = (x.view(-1, 2).index_select(0, valid) for x in (sums, counts))
        return Answers(logps, lengths, batch["desirable"].index_select(0, valid), reference)

    def _score(self, batch: Batch, set_name: str, subject: Subject) -> None:
        loaders = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        several = isinstance(loaders, list) and len(loaders) > 1
        # A single set is all sets together.
        keys = [(subject, name) for name in (("", set_name) if several else ("",))]
        for key in keys:
            if key not in self._scores:
                self._scores[key] = self.configure_scores().to(self.device)
        metrics = [self._scores[key] for key in keys]
        if self._prefers:
            stage = "test" if self.trainer.testing else "val"
            answers = self._answers(batch, subject.start, f"{stage}/{set_name}")
            for metric in metrics:
                metric.update(answers)
            return
        if _takes_sums(metrics[0]):
            sums = self._token_sums(batch)
            for metric in metrics:
                metric.add(sums)  # type: ignore[operator]
            return
        logits = self(batch)
        for metric in metrics:
            metric.update(logits, batch["labels"])

    def _token_sums(self, batch: Batch) -> TokenSums:
        positions, targets = _supervised(batch)
        losses, correct = self.head_losses().token_losses(_model_inputs(batch), positions, targets)
        return sum_tokens(losses, correct, positions, batch["labels"], batch.get("position_ids"))

    def _log_scores(self, stage: str) -> None:
        for subject in dict.fromkeys(who for who, _ in self._scores):
            for name, value in self.scores(subject).items():
                self.log(f"{stage}/{subject.name}/{name}", value, prog_bar=name == "loss")
        self._scores.clear()

    def _set_name(self, dataloader_idx: int) -> str:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        names = getattr(data, "test_names" if self.trainer.testing else "validation_names", None)
        return names[dataloader_idx] if names else str(dataloader_idx)

    def _seed_dropout(self) -> None:
        """Make this batch's random numbers a function of the seed, the batch's number and the rank."""
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(hash((self.seed, number, self.trainer.global_rank)) % 2**63)

    def _device_to_fill(self) -> torch.device:
        device = self.trainer.strategy.root_device
        assert isinstance(device, torch.device)
        return device

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


def _supervised(batch: Batch) -> tuple[Tensor, Tensor]:
    """Positions that predict a supervised token, into the ``B * T`` of the batch, and these tokens; both ``[N]``."""
    labels = batch["labels"]
    positions = batch.get("supervised")
    if positions is None:
        positions = supervised_positions(labels, batch.get("position_ids"))
    return positions, labels.flatten().index_select(0, positions + 1)


def _takes_sums(metric: Metric) -> bool:
    """Whether a metric is one of sums, with no use for logits."""
    return isinstance(metric, TokenScores) and type(metric).update is TokenScores.update


def _model_inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in _INPUTS if name in batch}


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
        f"trainer.precision is {precision!r}; expected '32-true' or 'bf16-mixed'. What learns is kept in float32, "
        "since a small update does not survive in half precision ('bf16-true' would also round the rotary frequencies)."
    )
