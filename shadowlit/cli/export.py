"""``shadowlit export``; the docstring is the help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig

from shadowlit.callbacks.variants import BEST, Variant, all_grafts
from shadowlit.checkpoint.folder import require_no_model, require_room
from shadowlit.checkpoint.names import is_adapter_name, tower_of
from shadowlit.checkpoint.saved import find_whole
from shadowlit.cli.graft import write
from shadowlit.delta.checkpoints import TrainedReader, update_of
from shadowlit.delta.configured import adapter_of, config_above, pair_of, read_config, require_known
from shadowlit.delta.delta import Delta, write_delta
from shadowlit.delta.registry import transform_names
from shadowlit.delta.transforms import Transforms
from shadowlit.errors import ExportError, GraftError
from shadowlit.grafting.adapter import adapt_all_linear, dependence, starts_from_weights, why_not_movable
from shadowlit.grafting.adapter_files import MergedUpdate
from shadowlit.grafting.disk import DiskGraft, Scale
from shadowlit.grafting.export import DEFAULT_SHARD_BYTES, LOADED, export_adapter
from shadowlit.grafting.lora_files import LoraUpdate
from shadowlit.grafting.manifest import build_manifest
from shadowlit.grafting.subject import Subject
from shadowlit.grafting.verification import rejecting, require_loadable
from shadowlit.pair.buffers import open_model
from shadowlit.pair.pair import ModelPair
from shadowlit.progress import make_console
from shadowlit.training.loading import load_for_training


def export(
    ckpt: str,
    out: str | None = None,
    parts: list[Literal["model", "adapter", "delta"]] = [],  # noqa: B006 - read only, and shown by --help
    scale: float | None = None,
    subject: str | None = None,
    run: str | None = None,
    trust_config: bool = False,
) -> None:
    """Write the grafted Instruct, the adapter and the delta from a checkpoint of fit, without training.

    The weights are those of fit's own export of the same step. Pair, selection, scale, dtype, transforms and adapter
    are the run's, from its config.yaml. A few copies of the largest tensor are in memory, never the model.

    Args:
        ckpt: Checkpoint of any step: a file, or a folder of shards.
        out: Folder for the parts; by default export-step-N in the run's folder. Nothing is overwritten.
        parts: Parts to write: model, adapter, delta; if empty, export.parts of the run.
        scale: Scale of the graft; by default that of the subject.
        subject: Graft of the run that is written: grafted, grafted@0.5 of graft.scales or grafted@dare of
            graft.variants; by default export.subject of the run, unless that is best.
        run: Folder with the config.yaml of the run; by default the nearest one above the checkpoint.
        trust_config: Whether to run code that config.yaml names: graft.transforms by import path, and that of the
            models if it sets pair.trust_remote_code.
    """
    if scale == 0:
        raise ExportError("scale is 0, with which the graft would be the untouched Instruct. Give another one.")
    path = find_whole(ckpt, resumes=False)
    home, config = config_above(path) if run is None else (Path(run), read_config(Path(run)))
    if not config:
        raise ExportError(
            f"{f'no folder above {path} holds a' if run is None else f'{run} holds no'} config.yaml, which names the "
            "pair, the selection and the adapter of a run. Give the folder of the run as --run."
        )
    settings = {key: config.get(key) or {} for key in ("graft", "export", "model")}
    stage, pair = TrainedReader(path), pair_of(config, home, trust_config)
    adapter = adapter_of(config, home) if any(map(is_adapter_name, stage.tensors)) else None
    _require_exportable(stage, pair, adapter, home)
    graft = {"select": "linear", "scales": [1.0], **settings["graft"]}
    chosen, key = _chosen(subject or settings["export"].get("subject", "grafted"), graft, home)
    given = (graft["variants"][chosen.variant] if chosen.variant else graft).get("transforms") or []
    if not trust_config:
        names = [each.get("name") for each in given if isinstance(each, Mapping)]
        require_known(names, transform_names(), key, home)
    transforms = Transforms(given, key)
    wanted = parts or settings["export"].get("parts") or ["model", "adapter"]
    started = "start" in stage.fingerprints
    if reason := why_not_movable(adapter, bool(transforms), started):
        if "adapter" in parts:
            raise ExportError(f"parts has 'adapter', which can't be written. {reason} Leave it out.")
        wanted = [part for part in wanted if part != "adapter"]
    target = Path(out) if out else home / f"export-step-{stage.step}"
    require_no_model(target, "out")
    for part in wanted:
        require_room(target / part)

    dtype = None if graft.get("dtype", "auto") == "auto" else graft["dtype"]
    factor = chosen.scale if scale is None else scale
    scored = stage.graft.get("step") == stage.step and factor == chosen.scale
    max_shard_bytes = settings["export"].get("max_shard_bytes", DEFAULT_SHARD_BYTES)
    towers = settings["model"].get("train_towers", ["language"])
    update = learned = update_of(stage, pair, adapter)
    whole = adapter or started  # a tuned Base may have learned in every tower
    trained = [n for n in update.shapes if whole or any(tower_of(n) == t or re.search(t, n) for t in towers)]
    if len(trained) < len(update.shapes):  # of a vision-language model, whose checkpoint holds the frozen towers too
        update = Delta.from_update(update).only(trained)
    if transforms:
        update = Delta.from_update(update).map(transforms)
    with open_model(pair.instruct_folder()) as instruct:
        plan = DiskGraft(update, instruct, Scale(factor), graft["select"], dtype, allow_zero=True)
        manifest = build_manifest(
            pair, scale=factor, select=graft["select"], dtype=dtype, coverage=plan.coverage, config=config,
            metrics=stage.graft["metrics"] if scored else {}, transforms=transforms.specs,
        )  # fmt: skip
        manifest |= {} if chosen.main else {"subject": chosen.name}
        if "adapter" in wanted:
            assert adapter is not None and isinstance(learned, LoraUpdate | MergedUpdate)
            _complete(adapter, pair, towers)
            factors = learned.scaled_factors(lambda name: factor if name in plan.selected else 0.0)
            export_adapter(target / "adapter", pair, adapter, factors, manifest)
        if "delta" in wanted:
            delta = Delta.from_update(update)
            tensors = ((name, delta.stored(name)) for name in sorted(plan.selected))
            write_delta(target / "delta", tensors, manifest=manifest, max_shard_bytes=max_shard_bytes)
        if "model" in wanted:
            write(plan, lambda: manifest, str(target / "model"), max_shard_bytes, None, False)
            with rejecting(target / "model"):
                require_loadable(target / "model", pair.trust_remote_code)
    if graft.get("fit_scales"):
        make_console().print(
            f"export: the run's fitted scales (graft.fit_scales) are not in it; its scale is {factor:g}. To graft with "
            "them: shadowlit graft BASE CKPT INSTRUCT OUT --scale RUN/export/scales.json"
        )
    for part in wanted:
        make_console().print(f"export: {part}: {LOADED[part].format(str(target / part))}")


def _chosen(name: str, graft: Mapping[str, Any], home: Path) -> tuple[Subject, str]:
    """The graft of a run that has a name in its metrics, and the key of its transforms."""
    variants = {each: Variant(**(given or {})) for each, given in (graft.get("variants") or {}).items()}
    grafts = all_grafts(graft["scales"], variants)
    found = next((each for each in grafts if each.name == name), None)
    if found is None:
        names = ", ".join(each.name for each in grafts)
        reason = "fit chooses by its scores" if name == BEST else f"{home / 'config.yaml'} does not have"
        raise ExportError(f"subject is {name!r}, which {reason}; expected one of {names}. Give it as --subject.")
    return found, f"graft.variants.{found.variant}.transforms" if found.variant else "graft.transforms"


def _require_exportable(stage: TrainedReader, pair: ModelPair, adapter: PeftConfig | None, home: Path) -> None:
    """Raise where a checkpoint's update can't be computed from disk."""
    for who, fingerprint in pair.fingerprints().items():
        if stage.fingerprints.get(who, fingerprint) != fingerprint:
            raise GraftError(
                f"{stage.folder} was written with another {who} than pair.{who} of {home / 'config.yaml'} is now (the "
                "fingerprints of the files differ), so its update belongs to other weights. Restore that model."
            )
    if not stage.step:
        raise ExportError(f"{stage.folder} is of step 0: the graft would be the untouched Instruct. Give a later one.")
    if adapter is not None and starts_from_weights(adapter):
        raise ExportError(
            f"{stage.folder} lacks the residual that an adapter with {dependence(adapter)} "
            "leaves in the weights, so its update can't be computed from disk. Let the run export it, without another "
            f"step: fit --config {home / 'config.yaml'} --run.name null --ckpt_path {stage.folder} "
            f"--trainer.max_steps {stage.step}"
        )


def _complete(adapter: PeftConfig, pair: ModelPair, towers: list[str]) -> None:
    """Name in the adapter's settings the layers that it adapts, as a training does."""
    adapt_all_linear(adapter)
    load_for_training(
        None, pair.base_config(), adapter=adapter, device=torch.device("meta"), mesh=None, parallelize=lambda _: None,
        towers=towers, trust_remote_code=pair.trust_remote_code,
    )  # fmt: skip
