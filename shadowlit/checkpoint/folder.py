"""Safetensors folders: a lazy reader, a streaming writer, and a folder that is written atomically.

Imports no transformers: the start-up time of the disk commands is part of their speed. Nothing here unpickles.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from safetensors import SafetensorError

from shadowlit.checkpoint.headers import (
    SINGLE_FILE,
    TensorInfo,
    broken_file,
    dtype_code,
    file_state,
    read_folder,
    some_of,
)
from shadowlit.checkpoint.numeric import Raw, not_finite
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.checkpoint.streaming import reserve, start_write_back
from shadowlit.errors import CheckpointError, ExportError
from shadowlit.files import require_writable, sync
from shadowlit.text import size

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DELTA_FILE = "delta.safetensors"
"""The single file of a stored update; see :class:`shadowlit.delta.delta.Delta`."""

# Room kept for a shard's header while its data are streamed; about a thousand tensors, else one more shard.
_HEADER_ROOM_BYTES = 128 * 1024

_FLUSH_BYTES = 32 * 2**20
_RESERVE_BYTES = 2**20  # smaller tensors aren't worth a call


class CheckpointReader(TensorReader):
    """Reads tensors, or some of their rows, from a safetensors folder without loading the rest.

    All headers are read and checked at once. Files are opened when first needed and kept open until :meth:`close`;
    threads may share them. As in transformers, the single file is taken where both forms are present.

    Args:
        folder: Folder with ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.
        single_file: Name of the file where there is only one, e.g. ``adapter_model.safetensors``.

    Raises:
        CheckpointError: There is no safetensors file, a file is missing, outside the folder or broken, or the index and
            the shards disagree.
    """

    def __init__(self, folder: str | Path, single_file: str = SINGLE_FILE) -> None:
        self.folder = Path(folder)
        self._streams: dict[str, FileIO] = {}
        self.tensors, self._states = read_folder(self.folder, single_file)

    def read_into(self, buffer: memoryview, name: str, offset: int = 0) -> None:
        """See :meth:`shadowlit.checkpoint.reader.TensorReader.read_into`."""
        info = self.info(name)
        assert offset + len(buffer) <= info.num_bytes
        path, position = self.folder / info.file, info.start + offset
        try:
            stream = self._streams.get(info.file)
            if stream is None:
                # The offsets are those of the file whose header was read; another save may have replaced it.
                if file_state(os.stat(path)) != self._states[info.file]:
                    raise broken_file(path, "it is not the file any more whose header was read")
                # One stream for all threads, atomically: a replaced one would be closed under the thread that reads
                # it, and its descriptor be that of the next file opened.
                stream = self._streams.setdefault(info.file, FileIO(path))
            while len(buffer):
                # Positional, so that threads may share the file; the system reads at most 2 GiB at once.
                count = os.preadv(stream.fileno(), [buffer], position)
                if not count:
                    raise broken_file(path, f"it ends before byte {position + len(buffer)}")
                buffer, position = buffer[count:], position + count
        except OSError as error:
            raise broken_file(path, str(error)) from error

    def close(self) -> None:
        """See :meth:`shadowlit.checkpoint.reader.TensorReader.close`."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()


@dataclass
class _Shard:
    """A file being written: header room first, then the tensors' bytes, the header last of all."""

    path: Path
    stream: BinaryIO
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_bytes: int = 0
    header_bytes: int = 0
    sent_bytes: int = 0

    def flush_ahead(self) -> None:
        """Let the system begin to write what has come since the last time, so that the flush at the end is short."""
        if (end := self.stream.tell()) - self.sent_bytes >= _FLUSH_BYTES:
            start_write_back(self.stream.fileno(), self.sent_bytes, end - self.sent_bytes)
            self.sent_bytes = end


@dataclass
class Streamed:
    """A tensor that comes in parts, so that the whole of it need not be in memory.

    The parts are its rows in order: tensors of the dtype with this code, or numpy arrays of bytes whose values were
    already found finite.
    """

    code: str
    shape: tuple[int, ...]
    parts: Iterable[torch.Tensor | Raw]

    @property
    def info(self) -> TensorInfo:
        """As a header would describe it."""
        return TensorInfo("", self.code, self.shape, "")


class CheckpointWriter:
    """Writes tensors one after the other into shards, in the layout that transformers saves and loads.

    Every tensor goes to the disk when it is added. :meth:`close` gives the shards their final names and writes the
    index; as a context manager the writer closes itself, and after an exception it removes what it wrote.

    Args:
        max_shard_bytes: Largest number of data bytes per file; a single larger tensor gets a file of its own.
        metadata: Strings for the header of every file, e.g. where the weights come from.

    Raises:
        CheckpointError: The folder holds safetensors files already, or ``max_shard_bytes`` is not positive.
    """

    def __init__(
        self,
        folder: str | Path,
        max_shard_bytes: int = 5_000_000_000,
        metadata: dict[str, str] | None = None,
        stem: str = "model",
    ) -> None:
        self.folder = Path(folder)
        if max_shard_bytes <= 0:
            raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; give a positive number, e.g. 5_000_000_000.")
        self.folder.mkdir(parents=True, exist_ok=True)
        present = sorted(p.name for p in self.folder.iterdir() if ".safetensors" in p.name)
        if present:
            raise CheckpointError(
                f"{self.folder} holds safetensors files already ({some_of(present)}). Write to an empty folder."
            )
        self.max_shard_bytes = max_shard_bytes
        # transformers refuses a file whose metadata do not name the framework.
        self.metadata = {"format": "pt", **(metadata or {})}
        self._shards: list[_Shard] = []
        self._closed = False
        self._stem = stem

    def add(self, name: str, tensor: torch.Tensor | Streamed) -> None:
        """Write a tensor of any shape, from any device, in its own dtype.

        Raises:
            CheckpointError: The name was added before, the dtype cannot be stored, the values are not here (sharded, or
                on the meta device), one is NaN or infinite, or the disk is full.
        """
        if self._closed:
            raise CheckpointError(f"Tensor '{name}' was added to the closed writer of {self.folder}. Add it before.")
        if any(name in shard.entries for shard in self._shards):
            raise CheckpointError(f"Tensor '{name}' was added twice to {self.folder}. Add every tensor once.")
        streamed = tensor if isinstance(tensor, Streamed) else _whole(name, tensor)
        num_bytes = streamed.info.num_bytes
        entry: dict[str, Any] = {"dtype": streamed.code, "shape": list(streamed.shape)}
        written = 0
        with self._complete(f"Tensor '{name}' could not be written to {self.folder}"):
            shard = self._shard_for(num_bytes, streamed.info.itemsize, len(json.dumps({name: entry})) + 64)
            if num_bytes >= _RESERVE_BYTES:
                reserve(shard.stream.fileno(), shard.stream.tell(), num_bytes)
            for part in streamed.parts:
                data = _bytes_of(name, part)
                shard.stream.write(data)
                shard.flush_ahead()
                written += len(data)
        assert written == num_bytes, f"the parts of {name} have {written} bytes, the whole has {num_bytes}"
        shard.entries[name] = {**entry, "data_offsets": [shard.num_bytes, shard.num_bytes + num_bytes]}
        shard.num_bytes += num_bytes

    def close(self) -> None:
        """Finish the last shard, give all their final names, write the index if there are several.

        Raises:
            CheckpointError: No tensor was added, or the disk is full; then nothing is left.
        """
        if self._closed:
            return
        if not self._shards:
            raise CheckpointError(f"No tensor was added to {self.folder}. Add the model's tensors before closing.")
        with self._complete(f"{self.folder} could not be completed"):
            self._finish_shard()
            self._name_shards()
        self._closed = True

    def abort(self) -> None:
        """Remove the unfinished shards; nothing happens after :meth:`close`."""
        if self._closed:
            return
        self._closed = True
        for shard in self._shards:
            with contextlib.suppress(OSError):  # what a full disk did not take is tried again
                shard.stream.close()
            shard.path.unlink(missing_ok=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @contextlib.contextmanager
    def _complete(self, problem: str) -> Iterator[None]:
        """Remove all shards if the block fails: one of them may hold half a tensor."""
        try:
            yield
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise CheckpointError(f"{problem}: {error}. Free some disk space.") from error
            raise

    def _shard_for(self, num_bytes: int, itemsize: int, entry_bytes: int) -> _Shard:
        """The shard that takes a tensor of this size: the open one if it fits there, else a new one."""
        if self._shards:
            shard = self._shards[-1]
            fits = not shard.num_bytes or shard.num_bytes + num_bytes <= self.max_shard_bytes
            # A tensor must begin at a multiple of its item size, or readers that map the file cannot view it.
            aligned = shard.num_bytes % itemsize == 0
            if fits and aligned and shard.header_bytes + entry_bytes <= _HEADER_ROOM_BYTES:
                shard.header_bytes += entry_bytes
                return shard
            self._finish_shard()
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors.part"
        shard = _Shard(path, path.open("xb"))
        shard.header_bytes = len(json.dumps({"__metadata__": self.metadata})) + entry_bytes
        shard.stream.write(b" " * (8 + max(_HEADER_ROOM_BYTES, -(-shard.header_bytes // 4096) * 4096)))
        self._shards.append(shard)
        return shard

    def _finish_shard(self) -> None:
        """Write the open shard's header into its room, padded with spaces as the format allows."""
        shard = self._shards[-1]
        room = shard.stream.tell() - shard.num_bytes - 8
        header = json.dumps({"__metadata__": self.metadata, **shard.entries}).encode()
        shard.stream.seek(0)
        shard.stream.write(struct.pack("<Q", room) + header.ljust(room))
        shard.stream.close()

    def _name_shards(self) -> None:
        """Give all shards their final names; write the index if there are several."""
        count = len(self._shards)
        names = (
            [f"{self._stem}.safetensors"]
            if count == 1
            else [f"{self._stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        )
        for shard, name in zip(self._shards, names, strict=True):
            shard.path = shard.path.rename(self.folder / name)
        if count > 1:
            files = {name: shard.path.name for shard in self._shards for name in shard.entries}
            shapes = [entry["shape"] for shard in self._shards for entry in shard.entries.values()]
            total = sum(shard.num_bytes for shard in self._shards)
            index = {
                "metadata": {"total_parameters": sum(map(math.prod, shapes)), "total_size": total},
                "weight_map": dict(sorted(files.items())),
            }
            (self.folder / f"{self._stem}.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )


def _whole(name: str, tensor: torch.Tensor) -> Streamed:
    """A tensor in memory as one part, checked before any of it is written."""
    if tensor.is_meta or hasattr(tensor, "full_tensor"):
        raise CheckpointError(
            f"Tensor '{name}' is {'on the meta device' if tensor.is_meta else 'sharded'}, so that its values are "
            "not here. Gather or load it first."
        )
    code = dtype_code(tensor.dtype)
    if code is None:
        raise CheckpointError(
            f"Tensor '{name}' has dtype {tensor.dtype}, which safetensors cannot store. Convert it first."
        )
    check_finite(name, tensor)
    return Streamed(code, tuple(tensor.shape), [tensor])


def _bytes_of(name: str, part: torch.Tensor | Raw) -> memoryview:
    """The bytes of a part; a tensor's values are checked."""
    if isinstance(part, np.ndarray):
        return part.reshape(-1).view(np.uint8).data
    import torch

    check_finite(name, part)
    flat = part.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise a CheckpointError for NaN and infinities: a model that holds one is useless, and loads without warning."""
    if not is_finite(tensor):
        raise not_finite(name, int((~tensor.detach().double().isfinite()).sum()), tensor.numel())


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    import torch

    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    # The smallest and the largest value are NaN if any value is: one pass without a copy. The 8-bit floats lack it.
    values = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    return all(math.isfinite(float(end)) for end in torch.aminmax(values))


@contextlib.contextmanager
def atomic_folder(target: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    """Write the folder ``target`` atomically.

    Yields a temporary folder next to ``target``. When the block succeeds, its files are flushed to the disk and it is
    renamed to ``target``; after any exception it is removed. Only a killed process or a power cut can leave it behind,
    as ``.<name>.partial-*``: the next call for the same target warns of it, and leaves it alone, since another process
    may be writing there. ``target`` may exist if it is empty; missing parents are created.

    Args:
        target: Folder to write.
        num_bytes: Expected size, as far as it is known; a disk with less room is refused before anything is written.

    Raises:
        ExportError: ``target`` exists and is not an empty folder, its parent cannot be written, or the disk is full or
            fails.
    """
    require_room(target, num_bytes)
    # A link to an (empty) folder on a larger disk is followed: the rename must stay on one file system.
    path = Path(os.path.realpath(target))
    partial = path.parent / f".{path.name}.partial-{secrets.token_hex(8)}"
    finished = False
    try:
        _make_beside(path, partial)  # inside: a signal can't arrive between making it and being able to remove it
        yield partial
        _sync_all(partial)
        finished = True
        partial.rename(path)  # fails, as it must, if something has appeared there meanwhile
    except BaseException as error:
        if finished and isinstance(error, OSError):  # hours of work, which stay
            raise ExportError(
                f"{path} could not be put in place: {error}. The finished folder was kept as {partial}; move it "
                "yourself."
            ) from error
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a full disk as an error of its own.
        if isinstance(error, OSError | SafetensorError):
            raise ExportError(
                f"{path} could not be written: {error}. Nothing is left of it; free space or choose another target."
            ) from error
        raise
    with contextlib.suppress(OSError):  # the folder is whole and in place; a power cut could still undo the rename
        sync(path.parent)


def require_replaceable(target: Path, key: str, inputs: Iterable[str | Path]) -> None:
    """Raise if a single file that a user names as an output is one of a model's folder, or an input of the command.

    Args:
        target: The output, which may exist otherwise: results are written again.
        key: Setting that holds it, for the message.
        inputs: Files and folders that the command reads; what isn't there, such as a hub id, is passed over.

    Raises:
        ExportError: It is in such a folder.
    """
    place = target.resolve()
    read = [source for source in inputs if Path(source).exists() and place.is_relative_to(Path(source).resolve())]
    if read or any(map(_holds_model, (target.parent, place.parent))):
        whose = f"belongs to {read[0]}, which is read" if read else f"is in the folder of a model, {target.parent}"
        exists = "exists and " if target.exists() else ""
        raise ExportError(f"{key} is '{target}', which {exists}{whose}. Give another file; nothing was written.")


def _holds_model(folder: Path) -> bool:
    """Whether files of a model or an adapter are directly in a folder."""
    return any(any(folder.glob(name)) for name in ("config.json", "adapter_config.json", "*.safetensors"))


def require_no_model(folder: Path, key: str) -> None:
    """Raise if new folders would be made in the folder of a model.

    Raises:
        ExportError: It holds one.
    """
    if _holds_model(folder):
        raise ExportError(f"{key} is '{folder}', the folder of a model. Give another folder; nothing was written.")


def require_room(target: str | Path, num_bytes: int = 0, what: str | None = None) -> None:
    """Raise what :func:`atomic_folder` would raise for a folder of this size; nothing is written.

    Args:
        target: Folder that will be written.
        num_bytes: Expected size, or that of everything that will be written next to it as well.
        what: Name of what will take this size, for the error; None for the folder.

    Raises:
        ExportError: ``target`` exists and is not an empty folder, it cannot be written, or its disk is too full.
    """
    path = Path(os.path.realpath(target))
    with _refused(path):
        _refuse_existing(path)
        room = shutil.disk_usage(require_writable(path.parent))
    if num_bytes > room.free and room.total:  # some network file systems don't know their size
        raise ExportError(
            f"{what or path} will take {_exact(num_bytes)}, but only {_exact(room.free)} are free on the disk of "
            f"{path.parent}. Free space, or choose another target."
        )


def _make_beside(path: Path, partial: Path) -> None:
    """Make the temporary folder, if the target is free; warn of those that killed runs left behind."""
    with _refused(path):
        _refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _warn_of_leftovers(path)
        partial.mkdir()


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Raise an ExportError for an OSError."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"Cannot write next to {path}: {error}. Choose a folder you can write.") from error


def shard_bytes(num_bytes: int, max_shard_bytes: int) -> int:
    """Return the size of the files in which :class:`CheckpointWriter` keeps so many bytes of data, in about as many
    shards.
    """
    return num_bytes + (num_bytes // max_shard_bytes + 1) * _HEADER_ROOM_BYTES


def _exact(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes >= 1e6 else f"{num_bytes:,} bytes"


def _warn_of_leftovers(path: Path) -> None:
    """Log the unfinished folders that killed runs left next to ``path``, with their sizes."""
    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}.partial-*")):
        with contextlib.suppress(OSError):  # its writer may just be finishing
            num_bytes = sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
            log.warning(
                "%s (%s) was left unfinished by a killed run, or another one is writing it; "
                "delete it if none is running.", left, size(num_bytes),
            )  # fmt: skip


def _refuse_existing(path: Path) -> None:
    """Raise unless ``path`` is free: missing, or an empty folder."""
    if path.is_dir():
        present = sorted(p.name for p in path.iterdir())
        if present:
            raise ExportError(
                f"{path} exists and is not empty ({some_of(present)}). Nothing was written. Choose another "
                "target, or delete the folder first if it is no longer needed."
            )
    elif os.path.lexists(path):
        raise ExportError(f"{path} exists and is a file. Nothing was written. Choose another target.")


def _sync_all(folder: Path) -> None:
    """Flush all files below ``folder``, and the folders themselves, to the disk."""
    for root, _, files in os.walk(folder):
        for file in files:
            sync(Path(root) / file)
        sync(Path(root))
