"""The manifest of what was written: where it comes from, what was done to it, and how good it was."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.checkpoint.headers import dtype_name
from shadowlit.errors import ExportError
from shadowlit.files import replace_text
from shadowlit.masking import masked
from shadowlit.pair.folders import commit_of
from shadowlit.pair.pair import ModelPair, Select
from shadowlit.version import __version__

if TYPE_CHECKING:
    import torch

MANIFEST_FILE = "shadowlit.json"


def describe_source(source: str, folder: Path, fingerprint: str, revision: str | None = None) -> dict[str, str | None]:
    """Return where a model comes from: the folder or hub id, and revision, that the user gave, and the commit of its
    files.
    """
    return {"id": source, "revision": revision, "commit": commit_of(folder), "fingerprint": fingerprint}


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
) -> dict[str, Any]:
    """Collect the manifest of a graft, in JSON's types. It holds no time and no host: equal runs export equal folders.

    Secrets in the configuration are masked, since the manifest is published with the weights.

    ``survival`` are norms and the fraction of the update that survives rounding; ``metrics`` those of the exported
    validation, e.g. ``{"val/grafted/loss": 1.23}``. ``fingerprints`` of ``base`` and ``instruct`` are needed if their
    folders hold no safetensors.

    Raises:
        PairError: A folder of the pair is missing.
        CheckpointError: A folder of the pair holds no readable safetensors.
    """
    prints = fingerprints or pair.fingerprints()
    manifest = {
        "base": describe_source(pair.base, pair.base_folder(), prints["base"], pair.base_revision),
        "instruct": describe_source(pair.instruct, pair.instruct_folder(), prints["instruct"], pair.instruct_revision),
        "scale": scale,
        "select": select,
        "dtype": dtype,
        "coverage": coverage or {},
        "survival": survival or {},
        "metrics": metrics or {},
        "versions": versions(),
        "config": config or {},
    }
    return masked(plain({**manifest, "transforms": transforms} if transforms else manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an exported folder; raise an ExportError if there is none, or it is not readable JSON."""
    path = Path(folder) / MANIFEST_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path} cannot be read ({error}). Give a folder that shadowlit exported, or export it again."
        ) from error


def add_to_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Add entries to the manifest of an exported folder, or replace them there."""
    path = Path(folder) / MANIFEST_FILE
    try:
        write_json(path, {**read_manifest(folder), **plain(entries)})
    except OSError as error:
        raise ExportError(f"{path} could not be written: {error}. Free some disk space.") from error


def provenance(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the part of the manifest that every weight file's header repeats."""
    keys = [key for key in ("base", "instruct", "scale", "select", "arm", "delta", "transforms") if key in manifest]
    return {f"shadowlit.{key}": json.dumps(manifest[key], sort_keys=True) for key in keys}


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    packages = ("torch", "transformers", "peft", "lightning", "safetensors")
    installed = {package: metadata.version(package) for package in packages}
    return {"python": platform.python_version(), "shadowlit": __version__, **installed}


def plain(value: Any) -> Any:
    """Return the value in JSON's types; NaN and infinities, which JSON lacks, as strings."""
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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, atomically; secrets are masked."""
    replace_text(path, json.dumps(masked(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
