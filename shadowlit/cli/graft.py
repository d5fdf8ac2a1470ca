"""The commands that are plain typed functions; their docstrings are their ``--help``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.progress import DownloadColumn, TransferSpeedColumn

from shadowlit.checkpoint.layout import in_layout_of
from shadowlit.checkpoint.pickled import open_checkpoint
from shadowlit.errors import GraftError
from shadowlit.grafting.disk import DiskGraft, Strength, open_update
from shadowlit.grafting.export import export_folder
from shadowlit.grafting.manifest import add_to_manifest, build_manifest
from shadowlit.pair.folders import model_folder
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
) -> None:
    r"""Write the Instruct with the update that a tuned Base has learned: instruct + scale * (tuned - base).

    Streams: a few rows of each tensor are in memory at a time. Computed in float32, rounded once.

    Args:
        base: Folder or hub id of the Base that the tuning started from.
        tuned: Folder or hub id of the tuned Base: a whole model, or a LoRA or rsLoRA adapter in peft's form.
        instruct: Folder or hub id of the Instruct that gets the update.
        out: Folder to make. Appears complete or not at all; an existing one is never overwritten.
        scale: Strength of the graft, and others by pattern: a number, or '1;layers\.(0|1)\.=0.5'.
        select: Which tensors: linear (every linear layer but the output head), all, or regular expressions.
        dtype: Of the result; auto for the Instruct's own.
        shard_size: Largest file, e.g. 5GB or 500MB.
        files_from: Take config, tokenizer, template and generation settings from this folder or hub id instead of the
            Instruct: where the update moves to a model that isn't the one to talk to (Chat Vector, ParamΔ).
        dry_run: Only say what would be grafted and how large the result is, from the headers alone.
        allow_pickle: Also read pytorch_model.bin in local folders, as tensors alone: nothing in it is run.
    """
    console = make_console()
    start = time.perf_counter()
    pair = ModelPair(base, instruct)
    with (
        open_checkpoint(pair.base_folder(), allow_pickle) as base_reader,
        open_checkpoint(pair.instruct_folder(), allow_pickle) as instruct_reader,
    ):
        in_place = in_layout_of(instruct_reader, base_reader)
        update = open_update(in_place, model_folder("tuned", tuned, None, False), allow_pickle)
        strength = Strength.parse(scale)
        wanted = None if dtype == "auto" else dtype
        plan = DiskGraft(update, instruct_reader, strength, select, wanted)
        console.print(f"graft: {plan.coverage}")
        console.print(f"graft: the result has {format_bytes(plan.num_bytes)}")
        if dry_run:
            return
        manifest = build_manifest(
            pair, scale=strength.default, select=select, dtype=wanted, coverage=plan.coverage,
            config={"tuned": tuned, "scale": scale},
            fingerprints={"base": base_reader.fingerprint(), "instruct": instruct_reader.fingerprint()},
        )  # fmt: skip
        write_graft(plan, instruct_reader.folder, Path(out), wanted, shard_size, manifest, files_from)
    console.print(f"graft: written in {time.perf_counter() - start:.1f} s")


def write_graft(
    plan: DiskGraft,
    instruct: Path,
    out: Path,
    dtype: str | None,
    shard_size: str,
    manifest: Mapping[str, Any],
    files_from: str | None,
) -> None:
    """Stream a planned graft to its folder, with a progress bar, and tell what arrived of the update."""
    console = make_console()
    with progress_bar("grafting", plan.num_bytes, DownloadColumn(), TransferSpeedColumn()) as advance:
        export_folder(
            out,
            instruct,
            plan.tensors(advance),
            dtype=dtype,
            max_shard_bytes=parse_bytes(shard_size),
            manifest=manifest,
            files_from=None if files_from is None else model_folder("files_from", files_from, None, False),
            stored=plan.stored,
        )
    add_to_manifest(out, {"survival": {"survival": plan.survival}})
    console.print(f"graft: {plan.survival:.1%} of the update arrives in the result's dtype")
    console.print(f"graft: {out} is complete")


def format_bytes(size: int) -> str:
    """A number of bytes for people: ``1.19 GB``."""
    unit = next((unit for unit, factor in reversed(_UNITS.items()) if size >= factor), "KB")
    return f"{size / _UNITS[unit]:.2f} {unit}"


def parse_bytes(size: str) -> int:
    """The number of bytes in a size such as ``5GB``.

    Raises:
        GraftError: it isn't a number and KB, MB or GB.
    """
    number, unit = size[:-2], size[-2:].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
        raise GraftError(f"shard_size is {size!r}; expected a number and KB, MB or GB, e.g. 5GB.")
    return int(float(number) * _UNITS[unit])
