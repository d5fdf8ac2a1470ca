"""Proof that a written folder holds the graft: tensors read back one by one, names that transformers maps, logits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.streaming import row_windows
from shadowlit.errors import ExportError, ShadowlitError
from shadowlit.files import unused
from shadowlit.pair.folders import is_image_text, load_config

_REMEDY = "Export a checkpoint of the run again (shadowlit export --ckpt)."


@contextmanager
def rejecting(folder: Path) -> Iterator[None]:
    """Rename a folder to ``<folder>-rejected`` if a check of it fails, so that nobody mistakes it for a model."""
    try:
        yield
    except ShadowlitError as error:
        rejected = unused(folder.with_name(f"{folder.name}-rejected"))
        folder.rename(rejected)
        raise ExportError(f"{error} The folder was renamed to {rejected}; do not use it.") from error


def digested(tensors: Iterable[tuple[str, Tensor]], digests: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on, and put the SHA-256 of each one's bytes into ``digests`` by its name."""
    for name, tensor in tensors:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        digests[name] = hashlib.sha256(raw.numpy().data).hexdigest()
        yield name, tensor


def require_written(folder: Path, instruct: Path, digests: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """Read an exported folder back, a few rows at a time, and compare it bit for bit with what was to be written.

    ``digests`` are those of :func:`digested`; names, shapes and dtypes are the Instruct's, except for ``dtype``.

    Raises:
        ExportError: A tensor is missing, is not one of the Instruct's, or differs.
        CheckpointError: A file can't be read.
    """
    with CheckpointReader(folder) as reader:
        stored = CheckpointReader(instruct).tensors
        expected = {name: (info.converted(dtype).code, info.shape) for name, info in stored.items()}
        found = {name: (info.code, info.shape) for name, info in reader.tensors.items()}
        wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
        wrong = wrong or [name for name in found if _digest(reader, name) != digests.get(name)]
    if wrong:
        raise ExportError(
            f"{folder} has tensors that are not the graft's, or changed after they were written: {some_of(wrong)}. "
            f"Check the disk. {_REMEDY}"
        )


def _digest(reader: CheckpointReader, name: str) -> str:
    digest = hashlib.sha256()
    for window in row_windows(reader.info(name)):
        digest.update(reader.raw_rows(name, *window).data)
    return digest.hexdigest()


def require_loadable(folder: Path, trust_remote_code: bool = False) -> None:
    """Let transformers map a folder's tensors to the model of its config.json, on the meta device: no data are read.

    Raises:
        ExportError: Transformers cannot load the folder, or finds tensors missing or left over in it.
    """
    try:
        config = load_config("instruct", folder, trust_remote_code)
        auto: Any = AutoModelForImageTextToText if is_image_text(config) else AutoModelForCausalLM
        with _no_progress_bar():
            _, report = auto.from_pretrained(
                folder, device_map="meta", dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"{folder} does not load: {error}. {_REMEDY}") from error
    odd = {what: sorted(map(str, names)) for what, names in report.items() if names}
    if odd:
        told = "; ".join(f"{what.replace('_', ' ')}: {some_of(names)}" for what, names in odd.items())
        raise ExportError(f"{folder} loads incompletely: {told}. The weights do not belong to its config.json.")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' bar, which would count tensors that aren't read."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def logit_difference(one: Tensor, other: Tensor, attention_mask: Tensor) -> dict[str, float]:
    """Return the difference of two models' logits [B, T, V] for the same tokens, without padding by the mask [B, T].

    Returns:
        ``max_abs`` and ``rms`` of the difference, in logits, and ``top1_agreement``, the fraction of positions at which
        both have the same most likely token.
    """
    one, other = (logits[attention_mask.bool().cpu()] for logits in (one, other))
    difference = one - other
    return {
        "max_abs": float(difference.abs().max()),
        "rms": float(difference.double().square().mean().sqrt()),
        "top1_agreement": float((one.argmax(-1) == other.argmax(-1)).double().mean()),
    }
