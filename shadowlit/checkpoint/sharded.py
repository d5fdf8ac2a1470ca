"""Sharded checkpoints of ``torch.distributed.checkpoint``, read without running code from them.

torch unpickles their index, ``.metadata``, and every value that is not a tensor without restriction, so that a
checkpoint from a stranger could run code. Here the index may name the classes of an index only, and values are read as
``torch.load(weights_only=True)`` reads them.
"""

from __future__ import annotations

import io
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
_METADATA = "torch.distributed.checkpoint.metadata"


def read_index(folder: Path) -> metadata.Metadata:
    """Return the index of a sharded checkpoint: shape, dtype and place of every tensor.

    Raises:
        CheckpointError: There is none, it is damaged, or it holds anything else.
    """
    require_regular(folder / INDEX)
    try:
        with (folder / INDEX).open("rb") as file:
            index = _metadata(_Unpickler(file).load())
    except Exception as error:  # of pickle and whatever a damaged file makes of it
        raise CheckpointError(
            f"{folder / INDEX} can't be read as the index of a sharded checkpoint ({first_line(error)}); nothing in it "
            "was run. Give a checkpoint that 'fit' has written, or an earlier one."
        ) from error
    require_index(folder, index)
    return index


def tensor_entries(index: metadata.Metadata, prefix: str = "") -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of the tensors whose keys begin with ``prefix``, by what follows it."""
    return {
        name.removeprefix(prefix): (tuple(entry.size), entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata)
    }


def read_tensors(folder: Path, tensors: dict[str, Any], *, alone: bool) -> None:
    """Read values into ``tensors``, by key: a tensor, whole or sharded, is filled; anything else is replaced.

    Args:
        folder: Folder of the checkpoint.
        tensors: Tensors to read into.
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
        prefixes: Beginnings of the keys of these parts.
        make: Function that returns the tensor to fill for a key, a shape and a dtype.
        alone: See :func:`read_tensors`.
    """
    index = read_index(folder)
    values: dict[str, Any] = {name: None for name in index.state_dict_metadata if name.startswith(prefixes)}
    values |= {name: make(name, *entry) for name, entry in tensor_entries(index).items() if name in values}
    read_tensors(folder, values, alone=alone)
    return dict(unflatten_state_dict(values, index.planner_data))


def load_plain(file: Path) -> Any:
    """Return what a file of ``torch.save`` holds, its tensors mapped.

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


class _Part:
    """What an index holds of an object. No class of torch's is handed to pickle, which can set attributes of classes.

    That of a state is for instances alone: on the class, ``__setstate__`` lacks an argument.
    """

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Value(_Part):
    """What is stored by its arguments, of which the first counts."""

    def __new__(cls, value: Any = (), *_: Any) -> Any:
        """Return the argument."""
        return value


class _Metadata(_Part): ...


class _Place(_Part): ...


class _Stored(_Part): ...


class _Tensor(_Part): ...


class _Bytes(_Part): ...


_KINDS: dict[tuple[str, str], type[_Part]] = {
    (_METADATA, "Metadata"): _Metadata, (_METADATA, "MetadataIndex"): _Place, (_METADATA, "StorageMeta"): _Part,
    (_METADATA, "TensorStorageMetadata"): _Tensor, (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "TensorProperties"): _Part, (_METADATA, "ChunkStorageMetadata"): _Part,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Value, ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Stored,
    ("torch.serialization", "_get_layout"): _Value, ("torch", "Size"): _Value,
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Knows the classes of an index, and nothing else; returns their parts."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KINDS:
            return _KINDS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):  # where it was saved
            return _Value
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _metadata(found: Any) -> metadata.Metadata:
    """The index that its parts make.

    Raises:
        Exception: Of whatever type, if a part is another than torch writes.
    """
    index = _state(found, _Metadata)
    return metadata.Metadata(
        {_plain(name, str): _entry(entry) for name, entry in index["state_dict_metadata"].items()},
        {_plain(name, str): _path(path) for name, path in index["planner_data"].items()},
        {_place(place): _stored(stored) for place, stored in index["storage_data"].items()},
    )


def _entry(found: Any) -> metadata.TensorStorageMetadata | metadata.BytesStorageMetadata:
    if type(found) is _Bytes:
        return metadata.BytesStorageMetadata()
    entry = _state(found, _Tensor)
    chunks = [_state(chunk, _Part) for chunk in _plain(entry["chunks"], list)]
    return metadata.TensorStorageMetadata(
        metadata.TensorProperties(getattr(torch, _plain(entry["properties"].state[0], str))),
        _size(entry["size"]),
        [metadata.ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _place(found: Any) -> metadata.MetadataIndex:
    place = _state(found, _Place)
    offset, index = place.get("offset"), place.get("index")
    return metadata.MetadataIndex(
        _plain(place["fqn"], str), None if offset is None else _size(offset), index and _plain(index, int)
    )


def _stored(found: Any) -> filesystem._StorageInfo:
    stored = _state(found, _Stored)
    if Path(name := _plain(stored["relative_path"], str)).name != name or name == "..":
        raise pickle.UnpicklingError("it places tensors outside the folder")
    return filesystem._StorageInfo(name, *_size((stored["offset"], stored["length"])))


def _path(found: Any) -> tuple[str | int, ...]:
    return tuple(_plain(part, str if isinstance(part, str) else int) for part in _plain(found, tuple))


def _size(found: Any) -> torch.Size:
    if any(_plain(number, int) < 0 for number in _plain(found, tuple)):
        raise pickle.UnpicklingError(f"it holds the size or place {found}")
    return torch.Size(found)


def _state(found: Any, kind: type[_Part]) -> dict[str, Any]:
    state: dict[str, Any] = _plain(_plain(found, kind).state, dict)
    return state


def _plain(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__} where a {kind.__name__} belongs")
    return value


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
