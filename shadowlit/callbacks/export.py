"""ExportCallback: writes the grafted Instruct as a Hugging Face folder, proven equal to what was validated."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from peft import get_peft_model_state_dict
from torch import Tensor

from shadowlit.arguments import takes_plain_values
from shadowlit.callbacks.fit_scales import FittedGraft, fit_at_end, open_rows, require_groups, write_scales
from shadowlit.callbacks.folder import run_folder
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.variants import Choice, candidates, choose, criterion
from shadowlit.checkpoint.folder import CheckpointReader, require_room, shard_bytes
from shadowlit.data.images import IMAGE_INPUTS
from shadowlit.delta.delta import write_delta
from shadowlit.distributed import on_first_rank
from shadowlit.errors import ExportError
from shadowlit.grafting.adapter import why_not_movable
from shadowlit.grafting.export import LOADED, export_adapter, export_folder, model_bytes, require_copyable
from shadowlit.grafting.manifest import add_to_manifest, build_manifest, plain
from shadowlit.grafting.subject import Subject
from shadowlit.grafting.verification import digested, logit_difference, rejecting, require_loadable, require_written
from shadowlit.text import size
from shadowlit.training.disks import Needed, require_shared
from shadowlit.training.module import ShadowModule

log = logging.getLogger(__name__)

_PROBE = slice(4), slice(64)  # rows of validation data, and their tokens, whose logits are compared


@takes_plain_values("export")
class ExportCallback(Callback):
    """Writes the grafted Instruct when the training ends.

    The weights are those of the best checkpoint by the monitored metric (e.g. ``val/grafted/loss``), or the last ones
    when nothing is monitored; they stay in the module. The parts are written atomically: with LoRA ``<folder>/adapter``
    (for the Instruct, in PEFT's format), on request ``<folder>/delta`` (the update itself, in bfloat16, as ``shadowlit
    delta`` stores it), and after them ``<folder>/model`` (the Instruct's folder with the grafted weights and
    ``shadowlit.json``, which states where they come from and how far the logits of the written weights are from the
    validated ones), which is then verified. With ``subject`` another graft than the main one is written; ``best`` is
    the one that scores best in the validation of the exported weights, by the metric of a model that the checkpoint
    callback monitors, or else by the loss. Nothing is exported if no step was taken or the training diverged. Needs a
    GraftCallback.

    What would make the export fail is found before the training: a target that exists or can't be written, a file of
    the Instruct's folder that can't be copied, a disk without room for the parts and the checkpoints together, and a
    rank that doesn't see the folder of the checkpoints, of which it would load the best.

    Example::

        best = ModelCheckpoint(monitor="val/grafted/loss")
        Trainer(callbacks=[GraftCallback(), best, ExportCallback(folder="export")])

    Args:
        enabled: Whether anything is exported.
        parts: Parts to write: model, adapter (if it means the same update on the Instruct), delta.
        folder: Folder to write; null for ``export`` in the run's own folder.
        max_shard_bytes: Size of the largest safetensors file, in bytes.
        verify: Whether to read the exported model back, one tensor at a time, compare it with the graft bit for bit,
            and compare the logits of a few rows that its weights give in the trained module with the validated ones.
        subject: Graft that is exported, by its name in the metrics: grafted, grafted@0.5 of graft.scales, grafted@dare
            of graft.variants; or best, the one with the best score.
    """

    def __init__(
        self,
        enabled: bool = True,
        parts: list[Literal["model", "adapter", "delta"]] = ["model", "adapter"],  # noqa: B006 - read only
        folder: str | None = None,
        max_shard_bytes: int = 5_000_000_000,
        verify: bool = True,
        subject: str = "grafted",
    ) -> None:
        if max_shard_bytes <= 0:
            raise ExportError(
                f"export.max_shard_bytes is {max_shard_bytes}; expected a positive number, e.g. 5_000_000_000."
            )
        self.enabled = enabled
        self.parts = list(parts)
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.verify = verify
        self.subject = subject
        self.exported: Path | None = None  # the model folder, once written
        self._graft: GraftCallback  # the trainer's, from setup on
        self._candidates: list[Subject] = []  # grafts of which one is written
        self._fitted: FittedGraft | None = None  # the scales of the running or last fit, if they are fitted

    @property
    def fits_scales(self) -> bool:
        """Whether ``graft.fit_scales`` has an effect."""
        return self.enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise before the training where the export at its end would fail."""
        if not self.enabled or stage != "fit":
            return
        found = [c for c in trainer.callbacks if isinstance(c, GraftCallback)]  # type: ignore[attr-defined]
        if len(found) != 1:
            raise ExportError(
                f"the trainer has {len(found)} GraftCallbacks; ExportCallback needs exactly one, whose graft it writes."
                " Add one to trainer.callbacks, or set export.enabled=false."
            )
        (self._graft,) = found
        self._candidates = candidates(self.subject, self._graft.subjects, self._graft.validate)
        movable = any(self._no_adapter(pl_module, each) is None for each in self._candidates)
        self._graft.exports_adapter = "adapter" in self.parts and movable
        self._fitted = None
        if self._graft.fit_scales is not None:
            assert isinstance(pl_module, ShadowModule)
            open_rows(trainer, pl_module, self._graft.fit_scales)
        target = self._target(trainer)
        on_first_rank(lambda: self._require_target(target, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise before the first step if scales can't be fitted, or a rank couldn't load the best checkpoint."""
        if self.enabled and self._graft.fit_scales is not None:
            assert isinstance(pl_module, ShadowModule)
            require_groups(self._graft.build(pl_module), self._graft.fit_scales)
        if self.enabled and getattr(trainer.checkpoint_callback, "monitor", None):
            require_shared(trainer, "each loads the best checkpoint for the export")

    def needs_room(self, trainer: Trainer, pl_module: LightningModule) -> list[Needed]:
        """Return the room that the export will take at most."""
        if not self.enabled:
            return []
        assert isinstance(pl_module, ShadowModule)
        target, files = self._target(trainer), pl_module.pair.instruct_folder()
        sizes = {}
        if "model" in self.parts:
            with CheckpointReader(files) as reader:
                sizes["model"] = model_bytes(files, reader.tensors, self._graft.dtype, self.max_shard_bytes)
        if self._graft.exports_adapter:
            factors = sum(4 * p.numel() for p in pl_module.parameters() if p.requires_grad)
            sizes["adapter"] = factors + require_copyable(files)
        if "delta" in self.parts:
            variants = {each.variant: None for each in self._candidates}  # in one order on all ranks
            largest = max(map(self._graft.build(pl_module).delta_bytes, variants))
            sizes["delta"] = shard_bytes(largest, self.max_shard_bytes)
        parts = ", ".join(f"{part} {size(num_bytes)}" for part, num_bytes in sizes.items())
        return [(target, sum(sizes.values()), f"the export to {target} ({parts})")]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the best weights, write the export, compare it with the graft.

        Raises:
            ExportError: A training loss was not finite, or weights aren't.
        """
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.global_step == 0:
            rank_zero_warn(
                "export: nothing is exported: no step was taken, so the graft would be the untouched Instruct. Check "
                "trainer.max_steps, max_epochs and limit_train_batches, or set export.enabled=false."
            )
            return
        assert isinstance(pl_module, ShadowModule) and pl_module.model is not None
        # Lightning has moved the module to the CPU by now. on_train_end would be too early: a checkpoint may still
        # follow and would hold the best weights instead of the last ones.
        left_on = next(pl_module.parameters()).device
        pl_module.to(trainer.strategy.root_device)
        self._export(trainer, pl_module)
        pl_module.to(left_on)

    def _export(self, trainer: Trainer, pl_module: ShadowModule) -> None:
        step = _load_best(trainer, pl_module, self._graft)
        scored = self._graft.finished.step
        if scored != step:
            found = "there are no scores" if scored is None else f"the last scores are those of step {scored}"
            rank_zero_warn(
                f"export: the exported weights are those of step {step}, but {found}. Let the training end with a "
                "validation (trainer.val_check_interval), or monitor one of its metrics."
            )
        subject, choice = self._choose(trainer, is_scored=scored == step)
        graft, metrics = self._graft.build(pl_module), self._graft.finished.metrics
        statistics = graft.statistics(subject.scale, variant=subject.variant)
        _require_finite(pl_module.losses.problem, statistics["delta_norm"])
        self._graft.warn_of_zero(trainer, statistics)
        if self._graft.fit_scales is None:
            _warn_of_loss(metrics, subject)
        else:
            self._fitted = fit_at_end(trainer, pl_module, self._graft, self._graft.fit_scales, subject)
            graft.fitted = self._fitted.found.by_tensor
            statistics = graft.statistics(subject.scale, variant=subject.variant)
            _warn_of_loss({**metrics, **self._fitted.metrics}, self._fitted.subject)
        target = self._target(trainer)
        manifest = self._manifest(trainer, pl_module, statistics, subject, choice)
        # What is small comes first, and is there whatever happens to the model.
        if "adapter" in self.parts and pl_module.adapter is not None:
            self._export_adapter(trainer, pl_module, target / "adapter", manifest, subject)
        if "delta" in self.parts:
            tensors = self._graft.build(pl_module).delta_tensors(factored=True, variant=subject.variant)
            if trainer.is_global_zero:
                write_delta(target / "delta", tensors, manifest=manifest, max_shard_bytes=self.max_shard_bytes)
            else:
                deque(tensors, maxlen=0)  # a collective
        if "model" in self.parts:
            self._export_model(trainer, pl_module, target / "model", manifest, subject)
        trainer.strategy.barrier("export")
        written = [part for part in self.parts if (target / part).is_dir()]
        what = "the grafted Instruct" if subject.main else subject.name
        rank_zero_info(f"export: wrote {what} ({', '.join(written)}) to {target}")
        lines = [f"{part}: {LOADED[part].format(str(target / part))}" for part in written]
        if self._fitted is not None:
            lines = [*self._fitted.lines, *lines]
            fitted, transforms = self._fitted, self._graft.transforms_of(subject).specs
            by_file = graft.in_files(graft.fitted)
            instruct = self._graft.fingerprints["instruct"]
            on_first_rank(partial(write_scales, target, fitted.found, by_file, fitted.update, transforms, instruct))
        self._graft.exported = [*([] if choice is None else [choice.line]), *lines]

    def _choose(self, trainer: Trainer, is_scored: bool) -> tuple[Subject, Choice | None]:
        """The graft that is written, and the choice by which it was found, if there are several candidates."""
        if len(self._candidates) == 1:
            return self._candidates[0], None
        checkpoints = trainer.checkpoint_callback
        by = criterion(getattr(checkpoints, "monitor", None), getattr(checkpoints, "mode", "min"))
        choice = choose(self._candidates, self._graft.finished.metrics, *by) if is_scored else None
        if choice is None:
            rank_zero_warn(
                f"export: export.subject is best, but the exported weights have no val/<graft>/{by[0]}, so the main "
                "graft is exported. Let the training end with a validation (trainer.val_check_interval), or monitor "
                "one of its metrics; evaluators measure other grafts if evaluation.scales and evaluation.variants name "
                "them."
            )
            return self._candidates[0], None
        return choice.best, choice

    def _manifest(
        self, trainer: Trainer, module: ShadowModule, statistics: Mapping[str, float], subject: Subject,
        choice: Choice | None,
    ) -> dict[str, Any]:  # fmt: skip
        callback = self._graft
        manifest = build_manifest(
            module.pair,
            scale=subject.scale,
            select=callback.select,
            dtype=callback.dtype,
            coverage=callback.build(module).coverage,
            survival=_summary(statistics),
            metrics={**callback.finished.metrics, **({} if self._fitted is None else self._fitted.metrics)},
            config=_resolved_config(trainer),
            transforms=callback.transforms_of(subject).specs,
            fingerprints=callback.fingerprints,
        )
        named: dict[str, Any] = {} if subject.main else {"subject": subject.name}
        named |= {} if self._fitted is None else {"fitted_scales": plain(self._fitted.found.about)}
        return manifest | named | ({} if choice is None else {"choice": choice.entry()})

    def _export_model(
        self, trainer: Trainer, module: ShadowModule, target: Path, manifest: dict[str, Any], subject: Subject
    ) -> None:
        callback, folder = self._graft, module.pair.instruct_folder()
        digests: dict[str, str] = {}  # of what is written, by name
        tensors = callback.build(module).grafted_tensors(subject.scale, subject.variant)
        if trainer.is_global_zero:
            self.exported = export_folder(
                target,
                folder,
                digested(tensors, digests) if self.verify else tensors,
                dtype=callback.dtype,
                max_shard_bytes=self.max_shard_bytes,
                manifest=manifest,
            )
        else:
            deque(tensors, maxlen=0)
        if not self.verify:
            return

        def check() -> None:
            with rejecting(target):
                require_written(target, folder, digests, callback.dtype)
                require_loadable(target, module.pair.trust_remote_code)

        on_first_rank(check)
        files = CheckpointReader(target) if trainer.is_global_zero else None
        probe = _first_batch(trainer)
        validated = _logits(trainer, module, probe, callback.build(module).applied(subject))
        written = _logits(trainer, module, probe, callback.build(module).loaded(files))
        if files is not None:
            files.close()
            _report(target, logit_difference(validated, written, probe["attention_mask"]))

    def _export_adapter(
        self, trainer: Trainer, module: ShadowModule, target: Path, manifest: dict[str, Any], subject: Subject
    ) -> None:
        assert module.adapter is not None and module.model is not None
        if reason := self._no_adapter(module, subject):
            rank_zero_info(f"export: no adapter is written. {reason}")
            return
        factors = self._graft.build(module).adapter_tensors(subject.scale, subject.variant)
        if trainer.is_global_zero:
            state = get_peft_model_state_dict(module.model, state_dict=factors)
            export_adapter(target, module.pair, module.adapter, state, manifest)

    def _no_adapter(self, module: LightningModule, subject: Subject) -> str | None:
        on_tuned = isinstance(module, ShadowModule) and module.start.weights is not None
        transformed = bool(self._graft.transforms_of(subject))
        return why_not_movable(getattr(module, "adapter", None), transformed, on_tuned)

    def _require_target(self, target: Path, module: LightningModule) -> None:
        if any(os.path.lexists(target / part) for part in LOADED):
            raise ExportError(
                f"{target} holds an export already. Set export.folder to a new folder, or remove that one; nothing is "
                "overwritten."
            )
        require_room(target / "model")
        if isinstance(module, ShadowModule):
            require_copyable(module.pair.instruct_folder())

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.folder) if self.folder else run_folder(trainer) / "export"


def _summary(statistics: Mapping[str, float]) -> dict[str, Any]:
    """The update's size and what is left of it, in total and by component."""
    found: dict[str, Any] = {
        name: statistics[name] for name in ("survival", "delta_norm", "relative_delta") if name in statistics
    }
    for name in ("survival", "relative_delta"):
        parts = {key.partition("/")[2]: value for key, value in statistics.items() if key.startswith(f"{name}/")}
        found |= {f"{name}_by_component": parts} if parts else {}
    return found


def _require_finite(problem: str | None, delta_norm: float) -> None:
    """Refuse to export a training that diverged."""
    if problem is None and math.isfinite(delta_norm):
        return
    raise ExportError(
        f"nothing is exported: {problem or f'the norm of the update is {delta_norm}'}. Train again with a lower "
        "model.lr, or from an earlier checkpoint."
    )


def _warn_of_loss(metrics: Mapping[str, float], subject: Subject) -> None:
    """Warn if the graft that is exported scores worse than the untouched Instruct."""
    name = f"val/{subject.name}/loss"
    if "graft/gain" not in metrics or name not in metrics:
        return
    instruct = metrics["val/instruct/loss"]
    is_main = subject.main and subject.kind == "grafted"
    gain = metrics["graft/gain"] if is_main else instruct - metrics[name]
    if not gain >= -1e-6 * abs(instruct):  # beyond the rounding of float32
        rank_zero_warn(
            f"export: the grafted model scores worse than the untouched Instruct: {name} is {metrics[name]:.4g}, "
            f"val/instruct/loss {instruct:.4g}, {'graft/gain' if is_main else 'the gain'} {gain:.4g}. Lower "
            "model.lr, train for fewer steps, let a ModelCheckpoint monitor val/grafted/loss, or put a smaller scale "
            "first in graft.scales."
        )


def _logits(
    trainer: Trainer, module: ShadowModule, batch: Mapping[str, Tensor], weights: AbstractContextManager[None]
) -> Tensor:
    """The logits of a batch within ``weights``, a context in which the module holds some; float32, on the CPU."""
    with isolate_rng(), weights, torch.no_grad(), trainer.precision_plugin.val_step_context():
        module.eval()
        logits = module(trainer.strategy.batch_to_device(batch)).float().cpu()
        module.train()
    return logits


def _report(folder: Path, difference: Mapping[str, float]) -> None:
    """Report how far the logits of the written weights are from those of the validated ones."""
    add_to_manifest(folder, {"logits_against_validated": difference})
    rank_zero_info(
        f"export: read back bit for bit; its logits differ from the validated graft's by at most "
        f"{difference['max_abs']:.2g}"
    )
    if difference["max_abs"]:  # the same module has computed both
        rank_zero_warn(
            f"export: {folder} is not what was validated: its logits differ by up to {difference['max_abs']:.2g} (rms "
            f"{difference['rms']:.2g}), and in {1 - difference['top1_agreement']:.1%} of the positions it prefers "
            "another token. Don't use it before you know why: only kernels whose sums have no fixed order may differ, "
            "and by little."
        )


def _load_best(trainer: Trainer, module: ShadowModule, callback: GraftCallback) -> int:
    """Load the weights of the best checkpoint into the module, its metrics into the callback; return the step."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path or not getattr(trainer.checkpoint_callback, "monitor", None):
        return trainer.global_step
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    rank_zero_info(f"export: takes the weights of the best checkpoint, {path}")
    return int(checkpoint["global_step"])


def _first_batch(trainer: Trainer) -> dict[str, Tensor]:
    """A few rows of validation data, the same on every rank."""
    loaders: Any = trainer.val_dataloaders or trainer.train_dataloader
    with isolate_rng():
        batch = next(iter(loaders[0] if isinstance(loaders, list) else loaders))
    rows = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if not any(name in rows for name in IMAGE_INPUTS):  # whose pixels belong to all rows together
        rows = {name: value[_PROBE[: value.ndim]] for name, value in rows.items()}
    if "attention_mask" not in rows:  # packed rows of the training data: the first sample of the first
        begins = (rows["position_ids"][0] == 0).nonzero().flatten().tolist()
        first = rows["input_ids"][:1, : begins[1] if len(begins) > 1 else None]
        rows = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    return trainer.strategy.broadcast(rows)


def _resolved_config(trainer: Trainer) -> dict[str, Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return yaml.safe_load(callback.parser.dump(callback.config, skip_unset=False))
    return {}
