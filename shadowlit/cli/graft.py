"""``shadowlit graft``; the docstring is the help."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

from rich.filesize import decimal
from rich.progress import DownloadColumn, TransferSpeedColumn

from shadowlit.checkpoint.folder import require_room
from shadowlit.delta.folders import MakeManifest, plan_graft, write_graft
from shadowlit.errors import GraftError
from shadowlit.grafting.disk import LEAST_SURVIVAL, DiskGraft, Scale, describe_shares
from shadowlit.grafting.manifest import plain
from shadowlit.grafting.scales import FitScales, FittedScales
from shadowlit.pair.pair import ModelPair
from shadowlit.progress import make_console, progress_bar

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def graft(
    base: str,
    tuned: str,
    instruct: str,
    out: str,
    scale: str = "1",
    select: str | list[str] = "linear",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    shard_size: str = "5GB",
    dry_run: bool = False,
    files_from: str | None = None,
    allow_pickle: bool = False,
    transforms: list[dict[str, Any]] = [],  # noqa: B006 - read only, and shown by --help
    allow_zero: bool = False,
    fit_scales: FitScales | None = None,
) -> None:
    r"""Write the Instruct with the update that a tuned Base has learned: instruct + scale * (tuned - base).

    Streams: a few rows of each tensor are in memory at a time, of an adapter the update of one layer, and with
    --transforms a few copies of one whole tensor.
    Computed in float32, rounded once.

    Args:
        base: Folder or hub id of the Base that the tuning started from.
        tuned: Folder or hub id of the tuned Base: a whole model, or a LoRA or rsLoRA adapter in peft's format; or a run
            of fit, its folder (the newest checkpoint counts) or a *.ckpt.
        instruct: Folder or hub id of the Instruct that gets the update.
        out: Folder to create. It is written atomically; an existing one is never overwritten.
        scale: Scale of the update, and other scales by pattern: a number, or '1;layers\.(0|1)\.=0.5'; or the
            scales.json of an export or of --fit-scales.
        select: Tensors that get the update: linear (every linear layer except the output head), all, or regular
            expressions.
        dtype: Dtype of the result; auto for the Instruct's own.
        shard_size: Size of the largest file, e.g. 5GB or 500MB.
        files_from: Folder or hub id whose config, tokenizer, template and generation settings are taken instead of the
            Instruct's, for updates that move to a model other than the one to talk to (Chat Vector, ParamΔ).
        dry_run: Only report what would be grafted and how large the result is, from the headers alone.
        allow_pickle: Also read pytorch_model.bin and adapter_model.bin in local folders, as tensors alone: nothing in
            them is run.
        transforms: Transforms of the update, applied in this order before it is scaled, e.g.
            '[{"name": "dare", "density": 0.2}]': magnitude, dare, svd, ties, or the import path of a function.
        allow_zero: Whether an update of zero is allowed, which leaves the Instruct unchanged.
        fit_scales: Calibration rows on which scales of layers, kinds or tensors are found first, and how, e.g. '{data:
            rows.jsonl, groups: kind}'; they start at --scale. The Instruct is then loaded into memory (docs/beyond.md).
    """
    start = time.perf_counter()
    wanted = None if dtype == "auto" else dtype
    with plan_graft(
        base, tuned, instruct, scale=scale, select=select, dtype=wanted, allow_pickle=allow_pickle,
        transforms=transforms, key="--transforms", allow_zero=allow_zero,
    ) as (plan, manifest):  # fmt: skip
        found, stated = None, manifest
        if fit_scales is not None and not dry_run:
            found = _fit(plan, ModelPair(base, instruct), fit_scales, Scale.parse(scale), out)
            fitted = {"fitted_scales": plain(found.about)}
            stated = lambda: {**manifest(), **fitted}  # noqa: E731
        write(plan, stated, out, parse_bytes(shard_size), files_from, dry_run)
        if found is not None:
            from shadowlit.callbacks.fit_scales import write_scales  # late, since torch takes seconds

            update = plan.update.fingerprint(found.by_tensor)
            on = plan.instruct.fingerprint()
            write_scales(Path(out), found, found.by_tensor, update, plan.update.transforms, on)
    if not dry_run:
        make_console().print(f"graft: written in {time.perf_counter() - start:.1f} s")


def _fit(plan: DiskGraft, pair: ModelPair, options: FitScales, scale: Scale, out: str) -> FittedScales:
    """Fit the scales of a planned graft, and give them to it."""
    if scale.by_pattern or scale.by_name:
        raise GraftError("--fit-scales starts from one scale, but --scale gives several. Give a number.")
    require_room(out, plan.num_bytes)
    from shadowlit.training.fit_scales import fit_on_disk  # late, since torch and transformers take seconds

    found = fit_on_disk(plan, pair, options, scale.default)
    make_console().print(f"graft: {found.line}")
    plan.rescale(Scale(by_name=found.by_tensor))
    return found


def write(
    plan: DiskGraft, manifest: MakeManifest, out: str, max_shard_bytes: int, files_from: str | None, dry_run: bool
) -> None:
    """Report what a planned graft covers; unless it is a dry run, write it and report what survives of the update."""
    console = make_console()
    covered = plan.planned.describe("left out, trained or not") if dry_run else plan.coverage
    console.print(f"graft: {covered}")
    console.print(f"graft: the result has {decimal(plan.num_bytes, precision=2)}")
    if dry_run:
        return
    with progress_bar("grafting", plan.num_bytes, DownloadColumn(), TransferSpeedColumn()) as advance:
        write_graft(plan, manifest, out, max_shard_bytes=max_shard_bytes, files_from=files_from, advance=advance)
    survives = f"{plan.survival:.1%} of the update survives rounding to the result's dtype"
    console.print(f"graft: {'the update is zero' if math.isnan(plan.survival) else survives}")
    parts = plan.survival_by_component
    if lost := [f"{survival:.1%} of that of {part}" for part, survival in parts.items() if survival < LEAST_SURVIVAL]:
        console.print(f"graft: by component, {', '.join(lost)} survives")
    if plan.shares:
        console.print(f"graft: left out of the update's norm: {describe_shares(plan.shares)}")
    if plan.survival < LEAST_SURVIVAL:
        console.print(
            "graft: warning: most of the update is lost. Write float32 (--dtype=float32), or use the update itself: "
            "an adapter on the Instruct, or 'delta make'"
        )
    console.print(f"graft: {out} is complete")


def parse_bytes(size: str) -> int:
    """Return the number of bytes in a size such as ``5GB``; a GraftError if it isn't one."""
    number, unit = size[:-2], size[-2:].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
        raise GraftError(f"shard_size is {size!r}; expected a number and KB, MB or GB, e.g. 5GB.")
    return int(float(number) * _UNITS[unit])
