"""Exports: a Hugging Face folder that is the Instruct's in everything but the weights, or a PEFT adapter for it.

The folder's config, tokenizer, chat template and generation settings are the Instruct's files, byte for byte, so that
the grafted model is used exactly as the Instruct is.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.checkpoint.folder import (
    CheckpointReader,
    CheckpointWriter,
    Streamed,
    atomic_folder,
    check_finite,
    shard_bytes,
)
from shadowlit.checkpoint.headers import TensorInfo, dtype_code, dtype_name, dtype_of, some_of
from shadowlit.checkpoint.names import is_peft_key
from shadowlit.errors import ExportError
from shadowlit.grafting.manifest import MANIFEST_FILE, plain, provenance, write_json
from shadowlit.pair.buffers import computed_buffers
from shadowlit.pair.folders import read_json
from shadowlit.pair.pair import ModelPair

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

log = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 5_000_000_000
LOADED = {
    "model": "AutoModelForCausalLM.from_pretrained({!r})",
    "adapter": "PeftModel.from_pretrained(instruct, {!r})",
    "delta": "shadowlit.Delta.open({!r})",
}
"""How each part of an export is used."""

# Weights in any form, and archives of them. A suffix that is missing here costs disk space, not correctness:
# transformers takes model.safetensors before all others.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".npz", ".pkl", ".pickle", ".tflite", ".index.json",
)  # fmt: skip
# The model card speaks of the Instruct, the manifest of an earlier graft; an adapter_config.json would make
# transformers look for an adapter.
_NOT_COPIED = ("readme.md", MANIFEST_FILE, "adapter_config.json")
# The one subfolder that belongs to a tokenizer.
_TEMPLATE_FOLDER = "additional_chat_templates"
_TOKENIZER_PREFIXES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
_TOKENIZER_SUFFIXES = (".model", ".tiktoken")
# How stores name a file after the hash of its content; before it, the name of the folder that it lies in.
_HASH = re.compile(
    r"(?P<start>[0-9a-f]{2})/(?P<rest>[0-9a-f]{30})"  # DVC: MD5
    r"|.*/([A-Z0-9]+-s\d+--)?(?P<whole>[0-9a-f]{32,128})(\.\w+)*"  # the hub: SHA-256, or Git's SHA-1; git-annex
)
_HASHES = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}


def export_folder(
    target: Path,
    instruct_folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor | Streamed]],
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    manifest: Mapping[str, Any] | None = None,
    files_from: Path | None = None,
    stored: Mapping[str, TensorInfo] | None = None,
) -> Path:
    """Write the folder ``target``, atomically, as the Instruct's in everything but the weights; return ``target``.

    Tensors are written as they come, so a generator keeps one of them in memory. Of several ranks one calls this.

    Args:
        target: Folder to create; it must not exist, or be empty.
        instruct_folder: Folder of the Instruct, whose other files are copied.
        tensors: Names and values, once for every tensor of the Instruct's files and no other (so a tied lm_head only if
            the Instruct stores it), in the Instruct's shapes, rounded once, from float32, to their final dtype.
        dtype: Dtype of all floating-point tensors, also written to ``config.json``; None for the Instruct's own.
        max_shard_bytes: Largest number of data bytes per file.
        manifest: Content of ``shadowlit.json``.
        files_from: Another folder whose config, tokenizer and template are copied instead of the Instruct's.
        stored: The Instruct's tensors, if its folder holds no safetensors.

    Raises:
        ExportError: ``target`` holds files already or cannot be written, a tensor is missing, unknown, or of another
            shape or dtype, or a file to be copied is a link that leaves its folder.
        CheckpointError: A tensor holds NaN or infinities, or the Instruct's folder cannot be read.
        PairError: The config.json is broken.
    """
    manifest = plain(manifest or {})
    expected = CheckpointReader(instruct_folder).tensors if stored is None else stored
    computed = computed_buffers(instruct_folder, expected)
    source = files_from or instruct_folder
    with atomic_folder(target, model_bytes(source, expected, dtype, max_shard_bytes)) as folder:
        _copy_files(source, folder)
        if dtype is not None:
            _set_config_dtype(folder / "config.json", dtype)
        with CheckpointWriter(folder, max_shard_bytes, provenance(manifest)) as writer:
            missing = dict(expected)
            for name, tensor in tensors:
                _check_tensor(name, tensor, expected, dtype)
                writer.add(name, _as_stored(tensor) if name in computed else tensor)
                missing.pop(name, None)
            if missing:
                raise ExportError(
                    f"{len(missing)} of {len(expected)} tensors of the Instruct were not given: "
                    f"{some_of(missing)}. Give the Instruct's own value for each tensor that was not grafted."
                )
        write_json(folder / MANIFEST_FILE, manifest)
    log.info("Exported the grafted model to %s", target)
    return target


def model_bytes(
    source: Path, tensors: Mapping[str, TensorInfo], dtype: torch.dtype | str | None, max_shard_bytes: int
) -> int:
    """Return the expected size of a model that :func:`export_folder` writes, with the files of the folder ``source``.

    Raises:
        ExportError: A file of ``source`` can't be copied, or the config.json is missing.
        PairError: The config.json is broken.
    """
    weights = sum(info.converted(dtype).num_bytes for info in tensors.values())
    return shard_bytes(weights, max_shard_bytes) + require_copyable(source)


def require_copyable(source: Path) -> int:
    """Raise as :func:`export_folder` would for the files of an Instruct that are not weights; return their size."""
    if not (source / "config.json").is_file():
        raise ExportError(f"{source} has no config.json. Give the folder of a complete Instruct model.")
    read_json("instruct", source / "config.json")
    return sum(path.stat().st_size for path, _ in _files_to_copy(source))


def _as_stored(tensor: torch.Tensor | Streamed) -> Streamed:
    """A buffer whose values are not checked: masks hold infinities."""
    import torch

    if isinstance(tensor, Streamed):
        return tensor
    code = dtype_code(tensor.dtype)
    assert code is not None
    return Streamed(code, tuple(tensor.shape), [tensor.contiguous().reshape(-1).view(torch.uint8).numpy()])


def export_adapter(
    target: Path,
    pair: ModelPair,
    peft_config: PeftConfig,
    adapter_state: Mapping[str, torch.Tensor],
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Write the folder ``target``, atomically, as a PEFT adapter of the Instruct, with its tokenizer and template.

    ``PeftModel.from_pretrained(instruct, target)`` loads it, and so does a server that takes adapters. Exact for LoRA
    and rsLoRA; whatever ``modules_to_save`` stores must already be grafted, because PEFT replaces the Instruct's own
    modules by it.

    Args:
        target: Folder to create; it must not exist, or be empty.
        pair: Pair whose Instruct the adapter names, at the commit that was read.
        peft_config: Config of the adapter.
        adapter_state: Tensors by PEFT's saved names, as from ``peft.get_peft_model_state_dict(model)``.
        manifest: Content of ``shadowlit.json``.

    Raises:
        ExportError: ``target`` holds files already or cannot be written, the names are not PEFT's saved ones, or an
            adapter of this kind means something else on the Instruct than on the Base.
        CheckpointError: A tensor holds NaN or infinities.
    """
    from safetensors.torch import save_file

    _require_movable(peft_config)
    _check_adapter_names(adapter_state)
    with atomic_folder(target) as folder:
        _copy_files(pair.instruct_folder(), folder, _belongs_to_tokenizer)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter_state.items()}
        for key, tensor in tensors.items():
            check_finite(key, tensor)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _adapter_config(pair, peft_config).save_pretrained(str(folder))
        write_json(folder / MANIFEST_FILE, plain(manifest or {}))
    log.info("Exported the adapter for %s to %s", pair.instruct, target)
    return target


def _copy_files(source: Path, folder: Path, chosen: Callable[[Path], bool] = lambda _: True) -> None:
    """Copy the chosen files that are not weights: config, tokenizer, licence, code."""
    for path, relative in _files_to_copy(source):
        if chosen(relative):
            (folder / relative).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / relative)  # in the hub's cache it is a link, which may soon dangle


def _files_to_copy(source: Path) -> Iterator[tuple[Path, Path]]:
    """The files that are not weights, and their paths in the folder; raise if one can't be copied."""
    for path in sorted([*source.iterdir(), *(source / _TEMPLATE_FOLDER).glob("*")]):
        name = path.name.lower()
        if not (name.startswith(".") or name.endswith(_WEIGHT_SUFFIXES) or name in _NOT_COPIED or path.is_dir()):
            _require_own(path, source)
            if not os.access(path, os.R_OK):
                raise ExportError(f"{path} can't be read, but belongs to the export. Allow it: chmod u+r {path}.")
            yield path, path.relative_to(source)


def _require_own(path: Path, folder: Path) -> None:
    """Refuse what is not a file of the folder: through a link, a private file could be copied, and published.

    The hub's cache keeps a model's own files as links into the ``blobs`` next to ``snapshots``. Downloads to a folder
    of one's own (``--local-dir``, before huggingface_hub 0.23), DVC and git-annex link into stores where a file is
    named after the hash of its content: such a link can be followed from any folder, since whoever made it knew the
    content.
    """
    home = folder.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ExportError(f"{path} is a broken link ({error}). Finish the download, or delete the link.") from error
    if not real.is_file():
        raise ExportError(
            f"{path} is a pipe, socket or device, expected a file. Delete it, or download the model again."
        )
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(root) for root in roots) and not _is_named_by_hash(real):
        raise ExportError(
            f"{path} is a link to {real}, which lies outside of {home}. The export would hold a copy of that file; if "
            "it belongs to the model, put the file itself in the link's place."
        )


def _is_named_by_hash(real: Path) -> bool:
    """Whether a file is named after the hash of its content, in one of the ways that ``_HASH`` lists."""
    found = _HASH.fullmatch(f"{real.parent.name}/{real.name}")
    if not found:
        return False
    content = real.read_bytes()
    texts = [content, content.replace(b"\r\n", b"\n"), b"blob %d\0" % len(content) + content]  # plain, DVC 2, Git
    name = found["whole"] or found["start"] + found["rest"]
    kind = _HASHES.get(len(name), "md5")
    return any(hashlib.new(kind, text, usedforsecurity=False).hexdigest() == name for text in texts)


def _belongs_to_tokenizer(name: Path) -> bool:
    return (
        name.parts[0] == _TEMPLATE_FOLDER
        or name.name.startswith(_TOKENIZER_PREFIXES)
        or name.suffix in _TOKENIZER_SUFFIXES
    )


def _set_config_dtype(path: Path, dtype: torch.dtype | str) -> None:
    """Write the dtype into config.json and its parts, under the keys that are there; or leave the file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    before = copy.deepcopy(config)
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in part.keys() & {"dtype", "torch_dtype"}:
            part[key] = dtype_name(dtype)
    if "torch_dtype" not in config:
        config["dtype"] = dtype_name(dtype)
    if config != before:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def _check_tensor(
    name: str, tensor: torch.Tensor | Streamed, expected: Mapping[str, TensorInfo], dtype: torch.dtype | str | None
) -> None:
    """Require the name, shape and dtype that the exported folder must have."""
    if name not in expected:
        raise ExportError(
            f"Tensor '{name}' is not among the Instruct's {len(expected)} ({some_of(expected)}). Use the "
            "names of the Instruct's files; leave out a tied lm_head that they do not hold."
        )
    info = expected[name]
    if tuple(tensor.shape) != info.shape:
        raise ExportError(
            f"Tensor '{name}' has shape {list(tensor.shape)}, the Instruct's has {list(info.shape)}. Export "
            "a graft of this Instruct, in whole tensors."
        )
    code = tensor.code if isinstance(tensor, Streamed) else dtype_code(tensor.dtype)
    wanted = info.converted(dtype).code
    if code != wanted:
        raise ExportError(
            f"Tensor '{name}' is {dtype_of(code)}, expected {dtype_of(wanted)}. Round it once, from float32, before "
            "it is exported."
        )


def _require_movable(peft_config: PeftConfig) -> None:
    """Refuse adapters whose update depends on the weights they adapt."""
    from shadowlit.grafting.adapter import dependence  # late: peft takes seconds

    if settings := dependence(peft_config):
        raise ExportError(
            f"An adapter with {settings} updates the Instruct differently from the Base "
            "it was trained on. Export the grafted model instead; a plain LoRA or rsLoRA adapter can be "
            "exported as it is."
        )


def _check_adapter_names(adapter_state: Mapping[str, torch.Tensor]) -> None:
    """PEFT ignores names that it does not know, and would load an adapter that does nothing."""
    wrong = [key for key in adapter_state if not is_peft_key(key)]
    if wrong or not adapter_state:
        found = f"{len(wrong)} of {len(adapter_state)} names ({some_of(wrong)})" if wrong else "no tensor"
        raise ExportError(
            f"The adapter has {found} that PEFT would not load. Give the names of its saved form, "
            "'base_model.model.<module>.lora_A.weight', as from peft.get_peft_model_state_dict(model)."
        )


def _adapter_config(pair: ModelPair, peft_config: PeftConfig) -> PeftConfig:
    """The adapter's config as it is saved: on the Instruct, for inference, sets in a fixed order."""
    config = copy.deepcopy(peft_config)
    local = Path(pair.instruct).expanduser()
    config.base_model_name_or_path = str(local.resolve()) if local.is_dir() else pair.instruct
    config.revision = pair.revisions()["instruct"] or pair.instruct_revision
    config.inference_mode = True
    for field in dataclasses.fields(config):
        if isinstance(getattr(config, field.name), set):
            setattr(config, field.name, sorted(getattr(config, field.name)))
    return config
