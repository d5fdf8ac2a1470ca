"""Pickled checkpoints (``pytorch_model.bin``), read as tensors and nothing else.

A pickle can run code when it is loaded. Here it is read by torch's restricted unpickler alone, which knows tensors and
plain containers and refuses everything else, and only when the user has asked for it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.headers import SINGLE_FILE as SAFETENSORS_FILE
from shadowlit.checkpoint.headers import TensorInfo, dtype_code, match_index, read_weight_map, require_regular, some_of
from shadowlit.checkpoint.reader import ComputedReader, TensorReader, rows_of
from shadowlit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "pytorch_model.bin"
_MODEL_FILES = (SAFETENSORS_FILE, SINGLE_FILE)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class PickledReader(ComputedReader):
    """Reads tensors, or some of their rows, from ``pytorch_model.bin`` or its shards; files are mapped, not loaded.

    Args:
        folder: Folder that holds the files.
        single_file: Name of the file where there is only one, e.g. ``adapter_model.bin``.

    Raises:
        CheckpointError: There is no such file, a file is missing, lies outside the folder, holds anything but
            tensors or can't be mapped, or the index and the shards disagree.
    """

    def __init__(self, folder: str | Path, single_file: str = SINGLE_FILE) -> None:
        folder = Path(folder)
        index = folder / f"{single_file}.index.json"
        if (folder / single_file).is_file():
            files = {single_file: _load(folder / single_file)}
        elif index.is_file():
            weight_map = read_weight_map(index)
            files = {file: _load(folder / file) for file in sorted(set(weight_map.values()))}
            match_index(index, weight_map, files)
        else:
            raise CheckpointError(
                f"{folder} holds no {single_file} and no {index.name}. Give the folder into which the model was "
                "saved, or finish its download."
            )
        held = {name: (file, tensor) for file, tensors in files.items() for name, tensor in tensors.items()}
        infos = {name: _info(folder, file, name, tensor) for name, (file, tensor) in sorted(held.items())}
        super().__init__(folder, infos, rows_of(lambda name: held[name][1]))


def open_checkpoint(folder: Path, allow_pickle: bool = False, adapter: bool = False) -> TensorReader:
    """Open the model or adapter in a folder: safetensors, or pickles if those are allowed and there are no others.

    Raises:
        CheckpointError: There is no checkpoint, or it can't be read.
    """
    safetensors, pickled = files = _ADAPTER_FILES if adapter else _MODEL_FILES
    names = [f"{file}{suffix}" for file in files for suffix in ("", ".index.json")]
    present = [name for name in names if (folder / name).is_file()]
    if not present or not present[0].startswith(pickled):
        return CheckpointReader(folder, safetensors)
    if allow_pickle:
        return PickledReader(folder, pickled)
    try:
        return CheckpointReader(folder, safetensors)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Or give --allow_pickle=true, which reads them as tensors alone, in 'graft' and 'delta make'."
        ) from error


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped."""
    import torch

    require_regular(path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a zip archive, the form that torch has saved since version 1.6, and can't be mapped: it is "
            "older, or was cut short. Load it once where you trust it (torch.load with weights_only=True) and save its "
            "tensors with safetensors."
        )
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of pickle, zipfile or torch: many types, one meaning
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} can't be read as tensors alone ({type(error).__name__}: {reason}). Expected a state dict; "
            "nothing else in it was run. Don't trust this file; ask its author for safetensors."
        ) from error
    if not isinstance(state, Mapping) or not state:
        found = "nothing" if state == {} else f"a {type(state).__name__}"
        raise CheckpointError(f"{path} holds {found}, expected tensors by name. Save a state dict.")
    others = [
        name
        for name, value in state.items()
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta
    ]
    if others:
        raise CheckpointError(
            f"{path} holds more than plain tensors ({some_of(others)}), expected tensors by name. Save the model's "
            "state dict alone, not a training checkpoint."
        )
    return {str(name): value.detach() for name, value in state.items()}


def _info(folder: Path, file: str, name: str, tensor: torch.Tensor) -> TensorInfo:
    code = dtype_code(tensor.dtype)
    if code is None:
        raise CheckpointError(
            f"{folder / file} holds tensor '{name}' of dtype {tensor.dtype}, which safetensors cannot store. Convert "
            "the model to bfloat16 or float32."
        )
    return TensorInfo(name, code, tuple(tensor.shape), file)
