"""Sharded checkpoints of ``torch.distributed.checkpoint``, read without running code from them.

torch unpickles their index, ``.metadata``, and every value that is no tensor without restriction, so that a checkpoint
from a stranger could run code. Here the index may name the classes of an index only, and values are read as
``torch.load(weights_only=True)`` reads them.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from shadowlit.checkpoint.headers import require_regular
from shadowlit.checkpoint.structure import require_index
from shadowlit.errors import CheckpointError, first_line

INDEX = ".metadata"  # written by torch, after the shards
_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    ("torch", "Size"), ("collections", "OrderedDict"),
}  # fmt: skip


def read_index(folder: Path) -> metadata.Metadata:
    """The index of a sharded checkpoint: shape, dtype and place of every tensor.

    Raises:
        CheckpointError: There is none, it is damaged, or it holds anything else.
    """
    require_regular(folder / INDEX)
    try:
        with (folder / INDEX).open("rb") as file:
            index = _Unpickler(file).load()
        if not isinstance(index, metadata.Metadata):
            raise pickle.UnpicklingError(f"it is a {type(index).__name__}")
    except Exception as error:  # of pickle and whatever a damaged file makes of it
        raise CheckpointError(
            f"{folder / INDEX} can't be read as the index of a sharded checkpoint ({first_line(error)}); nothing in it "
            "was run. Give a checkpoint that 'fit' has written, or an earlier one."
        ) from error
    require_index(folder, index)
    return index


def tensor_entries(index: metadata.Metadata, prefix: str = "") -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors whose keys begin with ``prefix``, by what follows it."""
    return {
        name.removeprefix(prefix): (tuple(entry.size), entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata)
    }


def read_tensors(folder: Path, tensors: dict[str, Any], *, alone: bool) -> None:
    """Read values into ``tensors``, by key: a tensor, whole or sharded, is filled; anything else is replaced.

    Args:
        folder: Folder of the checkpoint.
        tensors: Where to read to.
        alone: Whether this process reads for itself; otherwise this is a collective of all ranks.

    Raises:
        CheckpointError: On one of the ranks a shard can't be read, or holds anything but tensors and plain values.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            checkpoint.load(tensors, storage_reader=_Reader(folder), planner=planner, no_dist=alone)
        except checkpoint.CheckpointException as error:
            raise _unreadable(folder, next(iter(error.failures.values()))[0]) from error


def read_nested(
    folder: Path,
    prefixes: tuple[str, ...],
    make: Callable[[str, tuple[int, ...], torch.dtype], Tensor],
    *,
    alone: bool,
) -> dict[str, Any]:
    """Read parts of a checkpoint as the nested dict that was saved.

    Args:
        folder: Folder of the checkpoint.
        prefixes: What the keys of these parts begin with.
        make: Function that returns the tensor to fill for a key, a shape and a dtype.
        alone: As of :func:`read_tensors`.
    """
    index = read_index(folder)
    values: dict[str, Any] = {name: None for name in index.state_dict_metadata if name.startswith(prefixes)}
    values |= {name: make(name, *entry) for name, entry in tensor_entries(index).items() if name in values}
    read_tensors(folder, values, alone=alone)
    return dict(unflatten_state_dict(values, index.planner_data))


def load_plain(file: Path) -> Any:
    """What a file of ``torch.save`` holds, its tensors mapped.

    Raises:
        CheckpointError: It can't be read, or holds anything but tensors and plain values.
    """
    require_regular(file)
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of pickle, zipfile or torch: many types, one meaning
        raise _unreadable(file, error) from error


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    named = re.search(r"GLOBAL (\S+)", str(error))
    reason = f"it names {named[1]}" if named else first_line(error)
    return CheckpointError(
        f"{path} can't be read as tensors and plain values alone ({reason}); nothing in it was run. Give a *.ckpt, "
        "file or folder, that 'fit' has written."
    )


class _Unpickler(pickle.Unpickler):
    """Knows the classes of an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):  # where it was saved
            return getattr(pathlib, f"Pure{name.removeprefix('Pure')}")
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Reader(filesystem.FileSystemReader):
    """Torch's, with a restricted index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        index = read_index(Path(self.path))
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


class _Planner(DefaultLoadPlanner):
    """Torch's, with values that are read as plain ones."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
