"""ExportCallback: leaves the grafted Instruct as a Hugging Face folder, proven equal to what was validated."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from peft import get_peft_model_state_dict
from torch import Tensor

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.errors import ExportError
from shadowlit.graft.adapter import starts_from_weights
from shadowlit.graft.export import (
    export_adapter,
    export_folder,
    logit_difference,
    reload_logits,
)
from shadowlit.graft.manifest import add_to_manifest, build_manifest
from shadowlit.training.module import ShadowModule

log = logging.getLogger(__name__)

_LEAST_AGREEMENT = 0.95  # share of positions; bfloat16 arithmetic alone changes the arg max of a few
_PROBE_ROWS = 4  # rows of validation data that the logits of graft and export are compared on


class ExportCallback(Callback):
    """Writes the grafted Instruct when the training ends.

    The weights are those of the best checkpoint by the monitored metric (say ``val/grafted/loss``), or the last ones
    when nothing is monitored; they stay in the module. Three things are left, each written beside and renamed into
    place: ``<folder>/model`` (the Instruct's folder with the grafted weights and ``shadowlit.json``, which says where
    they come from), with LoRA also ``<folder>/adapter`` (for the Instruct, in PEFT's form), and in the manifest the
    difference between the logits of the validated graft and those of the reloaded folder. Needs a GraftCallback.

    Args:
        enabled: Whether to export at all.
        folder: Where to; null for ``export`` in the run's own folder.
        max_shard_bytes: The largest size of one safetensors file, in bytes.
        verify: Reload the exported folder on the CPU, in float32, and compare its logits with those of the validated
            graft. Needs four bytes of memory per parameter.
    """

    def __init__(
        self, enabled: bool = True, folder: str | None = None, max_shard_bytes: int = 5_000_000_000, verify: bool = True
    ) -> None:
        self.enabled = enabled
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.verify = verify
        self.exported: Path | None = None  # the model folder, once written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before the training that its end would fail."""
        if not self.enabled or stage != "fit":
            return
        _graft_callback(trainer)
        target = self._target(trainer)
        if (target / "model").exists() or (target / "adapter").exists():
            raise ExportError(
                f"{target} holds an export already. Set export.folder to a new folder, or remove that one; nothing is "
                "overwritten."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the best weights, write the export, compare it with the graft."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, ShadowModule) and pl_module.model is not None
        callback = _graft_callback(trainer)
        _load_best(trainer, pl_module, callback)
        target = self._target(trainer)
        probe = _first_batch(trainer)
        with isolate_rng(), callback.grafted(pl_module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            pl_module.eval()
            reference = pl_module(trainer.strategy.batch_to_device(probe)).float().cpu()
            pl_module.train()
        graft, scale = callback.build(pl_module), callback.scales[0]
        statistics = graft.statistics(scale)
        manifest = build_manifest(
            pl_module.pair,
            scale=scale,
            select=callback.select,
            dtype=callback.dtype,
            coverage=graft.coverage,
            survival={"survival": statistics["survival"], "delta_norm": statistics["delta_norm"]},
            metrics=callback.metrics,
            config=_resolved_config(trainer),
        )
        tensors = graft.grafted_tensors(scale)
        if trainer.is_global_zero:
            self.exported = export_folder(
                target / "model",
                pl_module.pair.instruct_folder(),
                tensors,
                dtype=callback.dtype,
                max_shard_bytes=self.max_shard_bytes,
                manifest=manifest,
            )
        else:
            _exhaust(tensors)
        if pl_module.adapter is not None:
            self._export_adapter(trainer, pl_module, callback, target / "adapter", manifest)
        if self.verify and trainer.is_global_zero:
            _verify(target / "model", probe, reference, pl_module.pair.trust_remote_code)
        trainer.strategy.barrier("export")
        rank_zero_info(f"export: the grafted Instruct lies in {target / 'model'}")

    def _export_adapter(
        self, trainer: Trainer, module: ShadowModule, callback: GraftCallback, target: Path, manifest: Any
    ) -> None:
        assert module.adapter is not None and module.model is not None
        if starts_from_weights(module.adapter) or module.adapter.modules_to_save or module.adapter.bias != "none":
            rank_zero_info(
                "export: no adapter is written, only the whole model. One that starts from the weights, or trains "
                "biases or whole modules beside its factors, means another update on the Instruct than on the Base."
            )
            return
        factors = callback.build(module).adapter_tensors(callback.scales[0])
        if trainer.is_global_zero:
            state = get_peft_model_state_dict(module.model, state_dict=factors)
            export_adapter(target, module.pair, module.adapter, state, manifest)

    def _target(self, trainer: Trainer) -> Path:
        root = Path(self.folder) if self.folder else Path(trainer.log_dir or trainer.default_root_dir) / "export"
        return Path(trainer.strategy.broadcast(str(root)))


def _verify(folder: Path, probe: dict[str, Tensor], reference: Tensor, trust_remote_code: bool) -> None:
    ids, mask = probe["input_ids"].cpu(), probe["attention_mask"].cpu()
    # In float32, so that what is compared is the weights and not how a CPU computes in half precision.
    reloaded = reload_logits(folder, ids, mask, dtype=torch.float32, trust_remote_code=trust_remote_code)
    difference = logit_difference(reference, reloaded, mask)
    add_to_manifest(folder, {"logits_against_validated": difference})
    rank_zero_info(
        f"export: reloaded, its logits differ from the validated graft's by at most {difference['max_abs']:.2g} "
        f"(rms {difference['rms']:.2g}); the most probable token is the same in {difference['top1_agreement']:.1%}"
    )
    if difference["top1_agreement"] < _LEAST_AGREEMENT:
        rank_zero_warn(
            f"export: {folder} is not what was validated: it prefers another token in "
            f"{1 - difference['top1_agreement']:.1%} of the positions, more than rounding explains. Don't use it "
            "before you know why; with a small graft/survival, export float32 (graft.dtype)."
        )


def _load_best(trainer: Trainer, module: ShadowModule, callback: GraftCallback) -> None:
    """Load the weights of the best checkpoint into the module, and its metrics into the callback."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path or not getattr(trainer.checkpoint_callback, "monitor", None):
        return
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    rank_zero_info(f"export: takes the weights of the best checkpoint, {path}")


def _first_batch(trainer: Trainer) -> dict[str, Tensor]:
    """A few rows of validation data, the same on every rank."""
    loaders: Any = trainer.val_dataloaders or trainer.train_dataloader
    with isolate_rng():
        batch = next(iter(loaders[0] if isinstance(loaders, list) else loaders))
    rows = {name: value[:_PROBE_ROWS] for name, value in batch.items() if isinstance(value, Tensor)}
    return trainer.strategy.broadcast(rows)


def _graft_callback(trainer: Trainer) -> GraftCallback:
    found = [c for c in trainer.callbacks if isinstance(c, GraftCallback)]  # type: ignore[attr-defined]
    if len(found) != 1:
        raise ExportError(
            f"the trainer has {len(found)} GraftCallbacks; ExportCallback needs exactly one, whose graft it writes. "
            "Add one to trainer.callbacks, or set export.enabled=false."
        )
    return found[0]


def _resolved_config(trainer: Trainer) -> dict[str, Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return yaml.safe_load(callback.parser.dump(callback.config, skip_unset=False))
    return {}


def _exhaust(iterator: Iterator[Any]) -> None:
    for _ in iterator:
        pass
