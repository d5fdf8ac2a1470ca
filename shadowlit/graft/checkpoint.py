"""Safetensors folders: a lazy reader, a streaming writer, and a folder that appears whole or not at all.

Imports no transformers: the start-up time of the disk commands is part of their speed. Nothing here
unpickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from shadowlit.errors import CheckpointError, ExportError

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
}  # fmt: skip
"""The dtype codes of the format, and what they are in torch."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}

# The format's own limit: a longer header is refused by every reader, and would fill the memory of ours.
_MAX_HEADER_BYTES = 100_000_000
# Room kept for a shard's header while its data are streamed; about a thousand tensors, else one more shard.
_HEADER_ROOM_BYTES = 128 * 1024

_SAMPLE_BYTES = 16 * 1024
_SAMPLE_READS = 2048


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        name: The tensor's name.
        dtype: The stored dtype.
        shape: The stored shape.
        file: The name of the file that holds it, inside the folder.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str

    @property
    def num_elements(self) -> int:
        """The number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """The number of bytes that the data take in the file."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class _Entry:
    """A tensor and where its bytes lie: ``start`` counts from the beginning of the file."""

    info: TensorInfo
    start: int


class CheckpointReader:
    """Reads tensors, or some of their rows, from a safetensors folder without loading the rest.

    Headers are read and checked at once, data only when asked for. Files are opened when first needed and
    kept open until :meth:`close`. As in transformers, ``model.safetensors`` is taken where both forms are
    present.

    Args:
        folder: A folder with ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.
        single_file: What the file is called where there is only one, e.g. ``adapter_model.safetensors``.

    Raises:
        CheckpointError: There is no safetensors file, a file is missing, lies outside the folder or is
            broken, or the index and the shards disagree.
    """

    def __init__(self, folder: str | Path, single_file: str = SINGLE_FILE) -> None:
        self.folder = Path(folder)
        self._streams: dict[str, FileIO] = {}
        self._entries = _read_entries(self.folder, single_file)
        self.tensors: dict[str, TensorInfo] = {name: entry.info for name, entry in self._entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor ``name`` in its stored dtype, in memory of its own.

        Raises:
            CheckpointError: There is no such tensor, or its file can no longer be read.
        """
        return self.read_slice(name, ())

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor; of the file only the rows (of the first dimension) from the first to the last are read.

        Args:
            name: The tensor's name.
            slices: One slice per leading dimension, as in ``tensor[slices]``; an empty tuple is the whole
                tensor.

        Returns:
            ``tensor[slices]`` in its stored dtype, in memory of its own.

        Raises:
            CheckpointError: There is no such tensor, there are more slices than dimensions, or the file can
                no longer be read.
        """
        info = self.info(name)
        if len(slices) > len(info.shape):
            raise CheckpointError(
                f"{len(slices)} slices were asked of tensor '{name}', which has {len(info.shape)} dimensions "
                f"{info.shape}. Give at most one slice per dimension."
            )
        first = slices[0] if slices else slice(None)
        rows = range(*first.indices(info.shape[0] if info.shape else 1))
        if rows.step < 1:
            raise CheckpointError(f"Slice {first} of tensor '{name}' has a negative step. Read forwards, then flip.")
        start, stop = (rows[0], rows[-1] + 1) if rows else (0, 0)
        part = self._read_rows(name, start, stop)
        if not info.shape:
            return part.reshape(())
        trimmed = part[(slice(None, None, rows.step), *slices[1:])]
        return part if trimmed.shape == part.shape else trimmed.clone(memory_format=torch.contiguous_format)

    def info(self, name: str) -> TensorInfo:
        """What the header says of ``name``.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"There is no tensor '{name}' in {self.folder}, which holds {len(self.tensors)} tensors "
                f"({some_of(self.tensors)}). Check the name, or whether this is the right model."
            )
        return self.tensors[name]

    def fingerprint(self) -> str:
        """A sha256 that tells two checkpoints apart, from all headers and a sample of the data.

        Hashed are the sorted names, dtypes and shapes, and from every tensor up to 32 evenly spread blocks of
        16 KiB, its beginning and end included (fewer blocks per tensor where there are more than 64 tensors,
        about 2,048 in all; smaller tensors whole). So it takes well under a second for 16 GB, does not depend
        on how the tensors are spread over files, and does not see a change that lies between the sampled
        blocks of a large tensor: it recognises a checkpoint, it is no proof against forgery.
        """
        digest = hashlib.sha256()
        num_blocks = min(32, max(2, _SAMPLE_READS // max(1, len(self._entries))))
        for name, entry in sorted(self._entries.items()):
            info = entry.info
            digest.update(json.dumps([name, _CODES[info.dtype], info.shape]).encode())
            for start, size in _sample_blocks(info.num_bytes, num_blocks):
                block = bytearray(size)
                self._fill(memoryview(block), info.file, entry.start + start)
                digest.update(block)
        return digest.hexdigest()

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop``, [stop - start, ...]; a scalar has one row.

        Read into memory of their own, not mapped: ``safe_open`` hands out views of one mapping, in which what a
        caller writes is what the next caller reads, and whose pages count as the process's memory.
        """
        entry = self._entries[name]
        shape = (stop - start, *entry.info.shape[1:])
        row_bytes = math.prod(shape[1:]) * entry.info.dtype.itemsize
        buffer = torch.empty(shape[0] * row_bytes, dtype=torch.uint8)
        self._fill(buffer.numpy().data, entry.info.file, entry.start + start * row_bytes)
        return buffer.view(entry.info.dtype).view(shape) if len(buffer) else torch.empty(shape, dtype=entry.info.dtype)

    def _fill(self, buffer: memoryview, file: str, offset: int) -> None:
        """Read bytes of a file, from ``offset``, until ``buffer`` is full."""
        path = self.folder / file
        try:
            if file not in self._streams:
                self._streams[file] = FileIO(path)
            while len(buffer):
                # Positional, so that threads may share the file; the system reads at most 2 GiB at once.
                count = os.preadv(self._streams[file].fileno(), [buffer], offset)
                if not count:
                    raise _broken(path, f"it ends before byte {offset + len(buffer)}")
                buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise _broken(path, str(error)) from error


def _sample_blocks(num_bytes: int, num_blocks: int) -> list[tuple[int, int]]:
    """(start, size) of the sampled blocks of a tensor of ``num_bytes``; the whole tensor if it is small."""
    if num_bytes <= num_blocks * _SAMPLE_BYTES:
        return [(0, num_bytes)]
    last = num_bytes - _SAMPLE_BYTES
    return [(i * last // (num_blocks - 1), _SAMPLE_BYTES) for i in range(num_blocks)]


def _read_entries(folder: Path, single_file: str) -> dict[str, _Entry]:
    """All tensors of a folder, sorted by name, checked against the index if there is one."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}. Give the folder that holds the model's safetensors files.")
    if (folder / single_file).is_file():
        return dict(sorted(_read_header(folder, single_file).items()))
    if not (folder / INDEX_FILE).is_file():
        raise _no_safetensors(folder)
    weight_map = _read_weight_map(folder / INDEX_FILE)
    headers = {file: _read_header(folder, file) for file in sorted(set(weight_map.values()))}
    _match_index(folder, weight_map, headers)
    return {name: headers[file][name] for name, file in sorted(weight_map.items())}


def _read_weight_map(path: Path) -> dict[str, str]:
    """The index's map from tensor to file; every file exists and lies in the folder."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). Download or save the model again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(
            f"{path} has no 'weight_map' from tensor names to file names. Download or save the model again."
        )
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if file in ("", ".", "..") or re.search(r"[/\\\0]", file)]
    if outside:
        raise CheckpointError(
            f"{path} names files that do not lie beside it: {some_of(outside)}. Shards must be plain file "
            "names in the index's own folder; save the model again, and do not trust this one."
        )
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} names {len(files)} files, of which {len(missing)} are missing: {some_of(missing)}. "
            "Finish the download, or copy the missing shards beside the index."
        )
    return weight_map


def _match_index(folder: Path, weight_map: dict[str, str], headers: dict[str, dict[str, _Entry]]) -> None:
    """Check that index and shards name the same tensors in the same files."""
    absent = sorted(name for name, file in weight_map.items() if name not in headers[file])
    unlisted = sorted(name for file, entries in headers.items() for name in entries if weight_map.get(name) != file)
    if absent or unlisted:
        told = [f"{len(absent)} tensors are not in the file it names ({some_of(absent)})"] if absent else []
        told += [f"{len(unlisted)} tensors of the shards are not listed ({some_of(unlisted)})"] if unlisted else []
        raise CheckpointError(
            f"{folder / INDEX_FILE} does not match its shards: {'; '.join(told)}. The folder mixes files of "
            "two saves; download or save the model again into an empty folder."
        )


def _read_header(folder: Path, file: str) -> dict[str, _Entry]:
    """The checked header of one safetensors file."""
    path = folder / file
    try:
        with path.open("rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
            if size > min(total - 8, _MAX_HEADER_BYTES):
                raise _broken(path, f"its header would have {size} bytes, the file has {total}")
            header = json.loads(stream.read(size))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _broken(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _read_entry(path, name, value, 8 + size) for name, value in header.items()}
    end = 8 + size
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.info.num_bytes)):
        if entry.start != end:
            raise _broken(path, f"tensor '{entry.info.name}' begins at byte {entry.start}, expected {end}")
        end += entry.info.num_bytes
    if end != total:
        raise _broken(path, f"its tensors end at byte {end}, the file at {total}")
    return entries


def _read_entry(path: Path, name: str, value: Any, data_start: int) -> _Entry:
    """One header entry, with dtype, shape and offsets that agree."""
    try:
        code, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in [*shape, start, stop])
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"the entry of tensor '{name}' is not dtype, shape and data_offsets") from error
    if not whole:
        raise _broken(path, f"shape {shape} or offsets [{start}, {stop}] of tensor '{name}' are not counts")
    if code not in DTYPES:
        raise CheckpointError(
            f"Tensor '{name}' in {path} has dtype {code}; known are {', '.join(DTYPES)}. Convert the model "
            "to one of the floating-point dtypes, e.g. bfloat16, with transformers and save it as "
            "safetensors."
        )
    info = TensorInfo(name, DTYPES[code], tuple(shape), path.name)
    if info.num_bytes != stop - start:
        raise _broken(path, f"tensor '{name}' of {code} {shape} takes {info.num_bytes} bytes, not {stop - start}")
    return _Entry(info, data_start + start)


def _no_safetensors(folder: Path) -> CheckpointError:
    """The error for a folder in which there is no model in safetensors form."""
    names = sorted(p.name for p in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        found = f"but other safetensors files ({some_of(others)})"
        remedy = f"Merge an adapter into its model first; rename a single weight file to {SINGLE_FILE}."
    elif pickles:
        found = f"only pickled weights ({some_of(pickles)}), never loaded here because they can run code"
        remedy = (
            "Convert them once, on a machine where you trust them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors."
        )
    else:
        found = f"{len(names)} other files ({some_of(names)})" if names else "nothing at all"
        remedy = "Give the folder into which the model was saved, or finish its download."
    return CheckpointError(f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}, {found}. {remedy}")


def _broken(path: Path, what: str) -> CheckpointError:
    """The error for a file that is not a valid safetensors file."""
    return CheckpointError(
        f"{path} is not a valid safetensors file: {what}. It was cut short or changed; download or save it again."
    )


def some_of(names: Iterable[Any], limit: int = 5) -> str:
    """The first ``limit`` names of a collection, and how many more there are: for messages."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


@dataclass
class _Shard:
    """A file being written: header room first, then the tensors' bytes, the header last of all."""

    path: Path
    stream: BinaryIO
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_bytes: int = 0
    header_bytes: int = 0


@dataclass
class Streamed:
    """A tensor that comes in parts, for one that need not be in memory as a whole.

    Attributes:
        dtype: The dtype of all parts.
        shape: The shape of the whole.
        parts: Its rows in order: tensors of that dtype, which make up the whole when concatenated along the first
            dimension.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[torch.Tensor]


class CheckpointWriter:
    """Writes tensors one after the other into shards, in the layout that transformers saves and loads.

    Every tensor goes to the disk when it is added, so no more than one is held in memory. :meth:`close` gives
    the shards their final names and writes the index; as a context manager the writer closes itself, and
    after an exception it removes what it wrote. Together with :func:`atomic_folder` a crash leaves nothing
    behind.

    Args:
        folder: The folder to write to; created if it is missing.
        max_shard_bytes: The largest number of data bytes per file; a single larger tensor gets a file of its
            own.
        metadata: Strings for the header of every file, e.g. where the weights come from.

    Raises:
        CheckpointError: The folder holds safetensors files already, or ``max_shard_bytes`` is not positive.
    """

    def __init__(
        self, folder: str | Path, max_shard_bytes: int = 5_000_000_000, metadata: dict[str, str] | None = None
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
        self._files: dict[str, int] = {}
        self._num_elements = 0
        self._closed = False

    def add(self, name: str, tensor: torch.Tensor | Streamed) -> None:
        """Write a tensor in its own dtype.

        Args:
            name: The tensor's name, not yet used.
            tensor: Any shape, any device; a whole one, not sharded, or its rows part by part.

        Raises:
            CheckpointError: The name was added before, the dtype cannot be stored, the values are elsewhere
                (sharded, or on the meta device), or one is NaN or infinite.
        """
        if self._closed:
            raise CheckpointError(f"Tensor '{name}' was added to the closed writer of {self.folder}. Add it before.")
        if name in self._files:
            raise CheckpointError(f"Tensor '{name}' was added twice to {self.folder}. Add every tensor once.")
        if isinstance(tensor, torch.Tensor) and (tensor.is_meta or hasattr(tensor, "full_tensor")):
            raise CheckpointError(
                f"Tensor '{name}' is {'on the meta device' if tensor.is_meta else 'sharded'}, so that its values are "
                "not here. Gather or load it first."
            )
        if tensor.dtype not in _CODES:
            raise CheckpointError(
                f"Tensor '{name}' has dtype {tensor.dtype}, which safetensors cannot store. Convert it first."
            )
        if isinstance(tensor, torch.Tensor):
            check_finite(name, tensor)  # before anything is written
            tensor = Streamed(tensor.dtype, tuple(tensor.shape), [tensor])
            parts: Iterable[torch.Tensor] = tensor.parts
        else:
            parts = _finite_parts(name, tensor.parts)
        num_elements = math.prod(tensor.shape)
        num_bytes = num_elements * tensor.dtype.itemsize
        entry: dict[str, Any] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape)}
        shard = self._shard_for(num_bytes, tensor.dtype.itemsize, len(json.dumps({name: entry})) + 64)
        entry["data_offsets"] = [shard.num_bytes, shard.num_bytes + num_bytes]
        written = 0
        try:
            for part in parts:
                assert part.dtype == tensor.dtype
                flat = part.detach().cpu().contiguous().reshape(-1)
                if flat.numel():
                    shard.stream.write(flat.view(torch.uint8).numpy().data)
                written += flat.nbytes
        except OSError as error:
            self.abort()  # the file now holds half a tensor
            raise CheckpointError(
                f"Tensor '{name}' could not be written to {self.folder}: {error}. Free some disk space."
            ) from error
        except BaseException:
            self.abort()
            raise
        assert written == num_bytes, f"the parts of {name} have {written} bytes, the whole has {num_bytes}"
        shard.entries[name] = entry
        shard.num_bytes += num_bytes
        self._files[name] = len(self._shards) - 1
        self._num_elements += num_elements

    def close(self) -> None:
        """Finish the last shard, give all their final names, write the index if there are several.

        Raises:
            CheckpointError: No tensor was added.
        """
        if self._closed:
            return
        if not self._shards:
            raise CheckpointError(f"No tensor was added to {self.folder}. Add the model's tensors before closing.")
        self._finish_shard()
        self._closed = True
        count = len(self._shards)
        names = (
            [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        )
        for shard, name in zip(self._shards, names, strict=True):
            shard.path.rename(self.folder / name)
        if count > 1:
            total = sum(shard.num_bytes for shard in self._shards)
            index = {
                "metadata": {"total_parameters": self._num_elements, "total_size": total},
                "weight_map": {name: names[i] for name, i in sorted(self._files.items())},
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abort(self) -> None:
        """Remove the unfinished shards; nothing happens after :meth:`close`."""
        if self._closed:
            return
        self._closed = True
        for shard in self._shards:
            shard.stream.close()
            shard.path.unlink(missing_ok=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

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
        shard.stream.write(b" " * (8 + max(_HEADER_ROOM_BYTES, _round_up(shard.header_bytes))))
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


def _finite_parts(name: str, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for part in parts:
        check_finite(name, part)
        yield part


def _round_up(num_bytes: int, multiple: int = 4096) -> int:
    """The next multiple."""
    return -(-num_bytes // multiple) * multiple


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinities: a model that holds one is useless, and loads without a word.

    Args:
        name: The tensor's name, for the message.
        tensor: Any shape and dtype.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    if not tensor.dtype.is_floating_point:
        return
    # The smallest and the largest value are NaN if any value is: one pass without a copy. The 8-bit floats lack it.
    values = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    if not values.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(values)):
        return
    count = int((~torch.isfinite(values)).sum())
    raise CheckpointError(
        f"Tensor '{name}' has {count} of {tensor.numel()} values that are NaN or infinite. Nothing was "
        "exported; look for a diverged run (lower the learning rate), or a dtype too small for the values "
        "(use bfloat16)."
    )


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A folder that appears at ``target`` complete, or not at all.

    Yields a temporary folder beside ``target``. When the block ends well, its files are flushed to the disk
    and it is renamed to ``target``; after any exception it is removed. Only a killed process or a power cut
    can leave it behind, as ``.<name>.partial-*``.

    Args:
        target: Where the folder shall appear; may exist only if it is an empty folder. Missing parents are
            created.

    Raises:
        ExportError: ``target`` exists and is not an empty folder, or its parent cannot be written.
    """
    # A link to an (empty) folder on a larger disk is followed: the rename must stay on one file system.
    path = Path(os.path.realpath(target))
    _refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise ExportError(f"Cannot write beside {path}: {error}. Choose a target in a folder you can write.") from error
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp's own mode would hide the result from everybody else
        yield partial
        _sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        partial.rename(path)  # fails, as it must, if something has come to lie there meanwhile
    except OSError as error:
        raise ExportError(
            f"{path} could not be put in place: {error}. The finished folder was kept as {partial}; move it yourself."
        ) from error
    _sync_folder(path.parent)


def _refuse_existing(path: Path) -> None:
    """Raise unless ``path`` is free: missing, or an empty folder."""
    if path.is_dir():
        present = sorted(p.name for p in path.iterdir())
        if present:
            raise ExportError(
                f"{path} exists and is not empty ({some_of(present)}). Nothing was written. Choose another "
                "target, or delete the folder first if it is no longer needed."
            )
    elif path.exists():
        raise ExportError(f"{path} exists and is a file. Nothing was written. Choose another target.")


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    """Flush all files below ``folder``, and the folders themselves, to the disk."""
    for root, _, files in os.walk(folder):
        for file in files:
            with (Path(root) / file).open("rb") as stream:
                os.fsync(stream.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    """Flush a folder's own entries; without it a rename may not survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
