"""``python -m shadowlit export``; the docstring is the help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig

from shadowlit.checkpoint.names import TOWERS, is_adapter_name, tower_of
from shadowlit.checkpoint.saved import find_whole
from shadowlit.cli.graft import write
from shadowlit.delta.checkpoints import TrainedReader, adapter_of, config_above, pair_of, read_config, update_of
from shadowlit.delta.delta import Delta, write_delta
from shadowlit.delta.transforms import Transforms
from shadowlit.errors import ExportError, GraftError
from shadowlit.grafting.adapter import starts_from_weights, why_not_movable
from shadowlit.grafting.disk import DiskGraft, Scale
from shadowlit.grafting.export import DEFAULT_SHARD_BYTES, LOADED, export_adapter, require_free
from shadowlit.grafting.manifest import build_manifest
from shadowlit.grafting.update import AdapterUpdate
from shadowlit.grafting.verification import require_loadable
from shadowlit.pair.buffers import open_model
from shadowlit.pair.pair import ModelPair
from shadowlit.progress import make_console
from shadowlit.training.loading import complete_adapter


def export(
    ckpt: str,
    out: str | None = None,
    parts: list[Literal["model", "adapter", "delta"]] = [],  # noqa: B006 - read only, and shown by --help
    scale: float | None = None,
    run: str | None = None,
) -> None:
    """Write the grafted Instruct, the adapter and the delta from a checkpoint of fit, without training.

    The weights are those of fit's own export of the same step. Pair, selection, scale, dtype, transforms and adapter
    are the run's, from its config.yaml. A few copies of the largest tensor are in memory, never the model.

    Args:
        ckpt: Checkpoint of any step: a file, or a folder of shards.
        out: Folder for the parts; by default export-step-N in the run's folder. Nothing is overwritten.
        parts: What to write: model, adapter, delta; if empty, export.parts of the run.
        scale: Scale of the graft; by default the first of graft.scales of the run.
        run: Folder with the config.yaml of the run; by default the nearest one above the checkpoint.
    """
    path = find_whole(ckpt, resumes=False)
    found = _Checkpoint.open(path, run, scale)
    reason = why_not_movable(found.adapter, bool(found.transforms))
    if reason and "adapter" in parts:
        raise ExportError(f"parts has 'adapter', which can't be written. {reason} Leave it out.")
    wanted = parts or found.setting("export", "parts", ["model", "adapter"])
    written = [part for part in ("adapter", "delta", "model") if part in wanted and not (part == "adapter" and reason)]
    target = Path(out) if out else found.home / f"export-step-{found.stage.step}"
    require_free(target, "out", written)
    found.write(target, written)
    for part in written:
        make_console().print(f"export: {part}: {LOADED[part].format(str(target / part))}")


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint and what its run says of it."""

    stage: TrainedReader
    home: Path  # folder of the configuration
    config: Mapping[str, Any]
    pair: ModelPair
    adapter: LoraConfig | None
    towers: list[str]  # that were trained
    transforms: Transforms
    scale: float
    metrics: Mapping[str, float]

    @classmethod
    def open(cls, path: Path, run: str | None, scale: float | None) -> _Checkpoint:
        """Open a complete checkpoint; raise where its update can't be computed from disk."""
        home, config = config_above(path) if run is None else (Path(run), read_config(Path(run)))
        if not config:
            raise ExportError(
                f"{f'no folder above {path} holds a' if run is None else f'{run} holds no'} config.yaml, which names "
                "the pair, the selection and the adapter of a run. Give the folder of the run as --run."
            )
        stage, pair = TrainedReader(path), pair_of(config, home)
        for who, fingerprint in pair.fingerprints().items():
            if stage.fingerprints.get(who, fingerprint) != fingerprint:
                raise GraftError(
                    f"{path} was written with another {who} than pair.{who} of {home / 'config.yaml'} is now (the "
                    "fingerprints of the files differ), so its update belongs to other weights. Restore that model."
                )
        if not stage.step:
            raise ExportError(f"{path} is of step 0, so the graft would be the untouched Instruct. Give a later one.")
        adapter = adapter_of(config, home) if any(map(is_adapter_name, stage.tensors)) else None
        towers, why = (config.get("model") or {}).get("train_towers") or ["language"], None
        if adapter is not None and starts_from_weights(adapter):
            why = f"model.adapter.init_lora_weights is {adapter.init_lora_weights!r}, and it lacks the residual weights"
        elif adapter is None and not set(towers) <= set(TOWERS):
            why = f"model.train_towers is {towers}, whose patterns are those of a module's names"
        if why:
            raise ExportError(
                f"the update of {path} can't be computed from disk: {why}. Let the run export it, without another "
                f"step: fit --config {home / 'config.yaml'} --ckpt_path {path} --trainer.max_steps {stage.step}"
            )
        graft = config.get("graft") or {}
        transforms = Transforms(graft.get("transforms") or [], "graft.transforms")
        main = (graft.get("scales") or [1.0])[0]
        scored = stage.graft.get("step") == stage.step and scale in (None, main)
        metrics = stage.graft.get("metrics", {}) if scored else {}
        return cls(stage, home, config, pair, adapter, towers, transforms, main if scale is None else scale, metrics)

    def setting(self, section: str, key: str, default: Any) -> Any:
        """A setting of the run, or the default where it is null or absent."""
        return (self.config.get(section) or {}).get(key) or default

    def write(self, target: Path, parts: list[str]) -> None:
        """Write parts in this order into the folder ``target``."""
        select, dtype = self.setting("graft", "select", "linear"), self.setting("graft", "dtype", "auto")
        dtype = None if dtype == "auto" else dtype
        max_shard_bytes = self.setting("export", "max_shard_bytes", DEFAULT_SHARD_BYTES)
        update = learned = update_of(self.stage, self.pair, self.adapter)
        trained = [name for name in update.shapes if self.adapter or tower_of(name) in self.towers]
        if len(trained) < len(update.shapes):  # the others were not trained, and are no part of the update
            update = Delta.from_update(update).only(trained)
        if self.transforms:
            update = Delta.from_update(update).map(self.transforms)
        with open_model(self.pair.instruct_folder()) as instruct:
            plan = DiskGraft(update, instruct, Scale(self.scale), select, dtype, allow_zero=True)
            manifest = build_manifest(
                self.pair, scale=self.scale, select=select, dtype=dtype, coverage=plan.coverage, metrics=self.metrics,
                config=self.config, transforms=self.transforms.specs,
            )  # fmt: skip
            if "adapter" in parts:
                assert self.adapter is not None and isinstance(learned, AdapterUpdate)
                complete_adapter(self.pair.base_config(), self.adapter, self.towers, self.pair.trust_remote_code)
                factors = learned.scaled_factors(lambda name: self.scale if name in plan.selected else 0.0)
                export_adapter(target / "adapter", self.pair, self.adapter, factors, manifest)
            if "delta" in parts:
                delta = Delta.from_update(update)
                tensors = ((name, delta.tensor(name)) for name in sorted(plan.selected))
                write_delta(target / "delta", tensors, manifest=manifest, max_shard_bytes=max_shard_bytes)
            if "model" in parts:
                write(plan, lambda: manifest, str(target / "model"), max_shard_bytes)
                require_loadable(target / "model", self.pair.trust_remote_code)
