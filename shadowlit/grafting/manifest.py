"""The manifest of what was written: where it comes from, what was done to it, and how good it was."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from shadowlit.errors import ExportError
from shadowlit.files import replace_text
from shadowlit.pair.folders import commit_of
from shadowlit.pair.pair import ModelPair, Select
from shadowlit.version import __version__

if TYPE_CHECKING:
    import torch

MANIFEST_FILE = "shadowlit.json"


class Source(TypedDict):
    """Where one model of the pair comes from: id or folder, revision asked for, commit read, fingerprint."""

    id: str
    revision: str | None
    commit: str | None
    fingerprint: str


def describe_source(source: str, folder: Path, fingerprint: str, revision: str | None = None) -> Source:
    """Where one model comes from.

    Args:
        source: Folder or hub id that the user gave.
        folder: Folder of its files.
        fingerprint: Fingerprint of its checkpoint.
        revision: Revision that the user asked for.
    """
    return Source(id=source, revision=revision, commit=commit_of(folder), fingerprint=fingerprint)


class Manifest(TypedDict):
    """What ``shadowlit.json`` says of an exported model: where it comes from and how good it was."""

    base: Source
    instruct: Source
    scale: float
    select: str | list[str]
    dtype: str | None
    coverage: dict[str, Any]
    survival: dict[str, Any]
    metrics: dict[str, Any]
    versions: dict[str, str]
    config: dict[str, Any]
    transforms: NotRequired[list[dict[str, Any]]]


def build_manifest(
    pair: ModelPair,
    *,
    scale: float,
    select: Select,
    dtype: torch.dtype | str | None = None,
    coverage: Any = None,
    survival: Any = None,
    metrics: Mapping[str, Any] | None = None,
    config: Any = None,
    transforms: Sequence[Mapping[str, Any]] = (),
    fingerprints: Mapping[str, str] | None = None,
) -> Manifest:
    """Collect the manifest of a graft. It holds no time and no host, so that equal runs export equal folders.

    Args:
        pair: The pair; its folders are read for commits and fingerprints.
        scale: λ of the graft.
        select: The selection of the graft.
        dtype: The dtype of the exported weights; None for the Instruct's own.
        coverage: What was grafted and what was not: a mapping or a dataclass.
        survival: How much of the delta lives through the exported dtype: a mapping or a dataclass.
        metrics: Metrics of the validation that was exported, e.g. ``{"val/grafted/loss": 1.23}``.
        config: The resolved config of the run: a mapping or a dataclass.
        transforms: Names and parameters of the functions that were applied to the update.
        fingerprints: Of ``base`` and ``instruct``, where their folders hold no safetensors.

    Returns:
        The manifest, of plain JSON types; values that JSON does not know are written as strings.

    Raises:
        PairError: A folder of the pair is missing.
        CheckpointError: A folder of the pair holds no readable safetensors.
    """
    prints = fingerprints or pair.fingerprints()
    manifest = Manifest(
        base=describe_source(pair.base, pair.base_folder(), prints["base"], pair.base_revision),
        instruct=describe_source(pair.instruct, pair.instruct_folder(), prints["instruct"], pair.instruct_revision),
        scale=scale,
        select=select if isinstance(select, str) else list(select),
        dtype=None if dtype is None else dtype_name(dtype),
        coverage=plain(coverage or {}),
        survival=plain(survival or {}),
        metrics=plain(metrics or {}),
        versions=versions(),
        config=plain(config or {}),
    )
    if transforms:
        manifest["transforms"] = plain(transforms)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
        ExportError: There is none, or it is not readable JSON.
    """
    path = Path(folder) / MANIFEST_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path} cannot be read ({error}). Give a folder that shadowlit exported, or export it again."
        ) from error


def add_to_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Add what is known only after the export, e.g. the difference of the reloaded model's logits.

    Args:
        folder: An exported folder.
        entries: New or replaced entries of its manifest.

    Raises:
        ExportError: The folder has no manifest.
    """
    path = Path(folder) / MANIFEST_FILE
    write_json(path, {**read_manifest(folder), **plain(entries)})


def provenance(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The part of the manifest that travels in every weight file's header."""
    keys = [key for key in ("base", "instruct", "scale", "select", "arm", "delta", "transforms") if key in manifest]
    return {f"shadowlit.{key}": json.dumps(manifest[key], sort_keys=True) for key in keys}


def versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    installed = {}
    for package in ("torch", "transformers", "peft", "lightning", "safetensors"):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return {"python": platform.python_version(), "shadowlit": __version__, **installed}


def plain(value: Any) -> Any:
    """The value in JSON's types; NaN and infinities, which JSON lacks, as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # of torch or numpy
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else dtype_name(value)


def dtype_name(dtype: object) -> str:
    """A torch dtype as configs spell it, ``bfloat16``; anything else as its text."""
    return str(dtype).removeprefix("torch.")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, replacing the file in one step.

    Raises:
        ExportError: The file cannot be written; what was there before is still there.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    try:
        replace_text(path, text + "\n")
    except OSError as error:
        raise ExportError(f"{path} could not be written: {error}. Free some disk space.") from error
