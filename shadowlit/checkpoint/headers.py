"""Headers of safetensors folders, read and checked without torch in milliseconds.

A folder is untrusted input: every count in a header is checked against the file before anything is allocated, and only
regular files are opened. Links are followed (the hub's cache is made of them), wherever they lead: what is read is
parsed as tensors or refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.checkpoint.names import is_weight, next_to_modules
from shadowlit.errors import CheckpointError, counted

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"

# The dtype codes of the format: their names in torch, and bytes per element.
_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1), "C64": ("complex64", 8),
}  # fmt: skip
_CODES = {name: code for code, (name, _) in _DTYPES.items()}

# The format's own limit: a longer header is refused by every reader, and would fill the memory of ours.
_MAX_HEADER_BYTES = 100_000_000
_MAX_INDEX_BYTES = 100_000_000
_MAX_DIMENSIONS = 16
_MAX_NAME_CHARS = 1000
_MAX_DIGITS = 18  # of a count: below 2**63
# A tensor without elements may have any shape, such as [2**60, 0], and a loop over its rows would never end.
_MAX_EMPTY_SHAPE = 2**31


def dtype_code(dtype: torch.dtype | str) -> str | None:
    """Return the format's code of a torch dtype or its name, such as ``BF16``; ``None`` if it has none."""
    return _CODES.get(dtype_name(dtype))


def dtype_name(dtype: object) -> str:
    """Return a torch dtype as configs spell it, ``bfloat16``; anything else as its text."""
    return str(dtype).removeprefix("torch.")


def dtype_of(code: str | None) -> str:
    """Return the name of the torch dtype that a code of the format stands for."""
    return _DTYPES[code][0] if code in _DTYPES else "a dtype that safetensors lacks"


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    name: str
    code: str  # the format's code of the stored dtype, e.g. BF16
    shape: tuple[int, ...]
    file: str  # name of the file inside the folder
    start: int = field(default=0, compare=False)  # of its data, in bytes from the beginning of the file

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype in torch."""
        import torch

        return getattr(torch, _DTYPES[self.code][0])

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _DTYPES[self.code][1]

    @property
    def is_floating_point(self) -> bool:
        """Whether the dtype is a floating-point one."""
        return "float" in _DTYPES[self.code][0]

    @property
    def is_weight(self) -> bool:
        """Whether the values are weights by themselves: 8-bit floats and integers need a scale as well."""
        return self.is_floating_point and self.itemsize > 1

    @property
    def is_packed(self) -> bool:
        """Whether this may be quantised weights: 8-bit numbers, or smaller ones packed into a matrix of integers."""
        packed = self.code in ("I16", "U16", "I32", "U32") and len(self.shape) >= 2
        return packed or (self.itemsize == 1 and self.code != "BOOL")

    def converted(self, dtype: torch.dtype | str | None) -> TensorInfo:
        """Return the description after floating-point tensors are converted to ``dtype``; ``None`` changes nothing."""
        return self if dtype is None or not self.is_floating_point else replace(self, code=_CODES[dtype_name(dtype)])

    @property
    def num_elements(self) -> int:
        """The number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """The number of bytes that the data take in the file."""
        return self.num_elements * self.itemsize

    @property
    def row_bytes(self) -> int:
        """The number of bytes of one row; a scalar has one."""
        return math.prod(self.shape[1:]) * self.itemsize


FileState = tuple[int, int]  # size in bytes, and time of the last change in nanoseconds: by which a file is recognised


def read_folder(folder: Path, single_file: str) -> tuple[dict[str, TensorInfo], dict[str, FileState]]:
    """Return all tensors of a folder, sorted by name, checked against the index if there is one; and the
    files' states.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"There is no folder {folder}. Give the folder that holds the model's safetensors files.")
    # Whatever has this name is meant as the model: a dangling link is an error and is not skipped.
    if os.path.lexists(folder / single_file):
        tensors, state = _read_header(folder, single_file)
        return dict(sorted(tensors.items())), {single_file: state}
    index = folder / f"{single_file}.index.json"
    if not os.path.lexists(index):
        raise _no_safetensors(folder, single_file)
    weight_map = read_weight_map(index)
    headers, states = {}, {}
    for file in sorted(set(weight_map.values())):
        headers[file], states[file] = _read_header(folder, file)
    match_index(index, weight_map, headers)
    return {name: headers[file][name] for name, file in sorted(weight_map.items())}, states


def read_weight_map(path: Path) -> dict[str, str]:
    """Return the index's map from tensor to file; every file exists and lies in the folder."""
    size = require_regular(path).st_size
    if size > _MAX_INDEX_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes, expected at most {_MAX_INDEX_BYTES}. Download or save the model again."
        )
    try:
        index = _parse(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). Download or save the model again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(
            f"{path} has no 'weight_map' from tensor names to file names. Download or save the model again."
        )
    unnamed = [name for name in weight_map if not _is_name(name)]
    if unnamed:
        raise CheckpointError(
            f"{path} has names that no tensor has: {some_of(map(ascii, unnamed))}. Expected 1 to {_MAX_NAME_CHARS} "
            "printable characters; download or save the model again."
        )
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if file in (".", "..") or re.search(r"[/\\]", file) or not _is_name(file)]
    if outside:
        raise CheckpointError(
            f"{path} names files outside of its folder: {some_of(map(repr, outside))}. Shards must be plain file "
            "names in the index's own folder; save the model again, and do not trust this one."
        )
    missing = [file for file in files if not os.path.lexists(path.parent / file)]
    if missing:
        raise CheckpointError(
            f"{path} names {counted(len(files), 'file')}, of which {len(missing)} can't be found: {some_of(missing)}. "
            "Finish the download, or copy the missing shards into the index's folder."
        )
    _require_distinct(path, files)
    return weight_map


def _require_distinct(path: Path, files: list[str]) -> None:
    """No file goes by two names: links to one file, or two spellings where the file system knows no case."""
    seen: dict[tuple[int, int], str] = {}
    for file in files:
        found = require_regular(path.parent / file)
        first = seen.setdefault((found.st_dev, found.st_ino), file)
        if first != file:
            raise CheckpointError(
                f"{path} names one file twice, as {shown(first)} and as {shown(file)}. Expected a file for each "
                "name; download or save the model again."
            )


def match_index(path: Path, weight_map: Mapping[str, str], headers: Mapping[str, Collection[str]]) -> None:
    """Check that index and shards name the same tensors in the same files."""
    absent = sorted(name for name, file in weight_map.items() if name not in headers[file])
    unlisted = sorted(name for file, entries in headers.items() for name in entries if weight_map.get(name) != file)
    if absent or unlisted:
        told = [f"it names the wrong file for {counted(len(absent), 'tensor')} ({some_of(absent)})"] if absent else []
        told += (
            [f"it doesn't list {counted(len(unlisted), 'tensor')} of the shards ({some_of(unlisted)})"]
            if unlisted
            else []
        )
        raise CheckpointError(
            f"{path} does not match its shards: {'; '.join(told)}. The folder mixes files of "
            "two saves; download or save the model again into an empty folder."
        )


def _read_header(folder: Path, file: str) -> tuple[dict[str, TensorInfo], FileState]:
    """The checked header of one safetensors file, and the file's state when it was read."""
    path = folder / file
    require_regular(path)
    try:
        with path.open("rb") as stream:
            state = file_state(os.fstat(stream.fileno()))
            total = state[0]
            prefix = stream.read(8)
            size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
            if size > min(total - 8, _MAX_HEADER_BYTES):
                raise broken_file(
                    path,
                    f"its header would have {size} bytes, the file has {total}, a header at most {_MAX_HEADER_BYTES}",
                )
            header = _parse(stream.read(size))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise broken_file(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise broken_file(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken_file(path, f"its __metadata__ {reprlib.repr(metadata)} are not a map of strings")
    tensors = {name: _read_entry(path, name, value, 8 + size) for name, value in header.items()}
    end = 8 + size
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.num_bytes)):
        if info.start != end:
            raise broken_file(path, f"tensor '{shown(info.name)}' begins at byte {info.start}, expected {end}")
        end += info.num_bytes
    if end != total:
        raise broken_file(path, f"its tensors end at byte {end}, the file at {total}")
    return tensors, state


def _read_entry(path: Path, name: str, value: Any, data_start: int) -> TensorInfo:
    """One header entry, with dtype, shape and offsets that agree."""
    if not _is_name(name):
        raise broken_file(
            path, f"it has a tensor named {shown(ascii(name))}, expected 1 to {_MAX_NAME_CHARS} printable characters"
        )
    told = f"tensor '{shown(name)}'"
    fields = value if isinstance(value, dict) else {}
    code, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(code, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise broken_file(path, f"the entry of {told} is not dtype, shape and data_offsets")
    if not all(type(n) is int for n in [*shape, *offsets]):
        raise broken_file(
            path, f"shape {reprlib.repr(shape)} or offsets {reprlib.repr(offsets)} of {told} are not counts"
        )
    if len(shape) > _MAX_DIMENSIONS:
        raise broken_file(path, f"{told} has {len(shape)} dimensions, expected at most {_MAX_DIMENSIONS}")
    if code not in _DTYPES:
        raise CheckpointError(
            f"{path} holds {told} of dtype {shown(code)}; known are {', '.join(_DTYPES)}. Convert the model "
            "to one of the floating-point dtypes, e.g. bfloat16, with transformers and save it as "
            "safetensors."
        )
    start, stop = offsets
    info = TensorInfo(name, code, tuple(shape), path.name, data_start + start)
    if info.num_bytes != stop - start:
        raise broken_file(path, f"{told} of {code} {shape} takes {info.num_bytes} bytes, not {stop - start}")
    if not info.num_elements and math.prod(filter(None, shape)) > _MAX_EMPTY_SHAPE:
        raise broken_file(path, f"{told} has the shape {shape} but no elements")
    return info


def require_regular(path: Path) -> os.stat_result:
    """Return the status of a regular file; checked before opening it, since opening a pipe would block."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        leads = f"is a link to {os.readlink(path)!r} and " if path.is_symlink() else ""
        raise CheckpointError(
            f"{path} {leads}cannot be read: {error}. Finish the download, or put the file itself in its place."
        ) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise CheckpointError(f"{path} is {kind}, expected a file. Download or save the model again.")
    return found


def file_state(found: os.stat_result) -> FileState:
    """Return the state of a file."""
    return found.st_size, found.st_mtime_ns


def _parse(text: bytes) -> Any:
    """Read JSON as strictly as the format's own reader: no other encoding, no key twice, no NaN.

    Integers are counts; one that is none, or has too many digits, becomes a float.
    """
    return json.loads(
        text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_int=_count,
        parse_float=_finite,
    )  # fmt: skip


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key '{shown(key)}' occurs twice")
        found[key] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _count(text: str) -> int | float:
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else _finite(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {shown(text)} is out of range")
    return number


def _is_name(name: str) -> bool:
    return 0 < len(name) <= _MAX_NAME_CHARS and name.isprintable()


def _no_safetensors(folder: Path, single_file: str) -> CheckpointError:
    """The error for a folder in which there is no model in safetensors form."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return CheckpointError(f"{folder} cannot be read: {error}. Give a folder whose files you may read.")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    others = [name for name in names if name.endswith(".safetensors")]
    files = ("adapter_config.json", single_file, f"{single_file}.index.json")
    below = sorted({path.parent for file in files for path in [*folder.glob(f"*/{file}"), *folder.glob(f"*/*/{file}")]})
    if below and not others:
        found = f"but models or adapters below it ({some_of(below)})"
        remedy = (
            "Give the folder of one of these; but the 'model' among a run's exports is the grafted Instruct, and where "
            "the tuned Base is wanted, 'graft' takes the run's own folder."
        )
    elif any(re.search(r"-of-\d+\.safetensors$", name) for name in others):
        found = f"but shards ({some_of(others)}) without their index"
        remedy = "Copy the index into the folder, or finish the download."
    elif "adapter_model.safetensors" in names and "adapter_config.json" not in names:
        found = "but an adapter (adapter_model.safetensors) without its adapter_config.json"
        remedy = "Copy that file from where the adapter was saved; where a whole model is wanted, merge the adapter."
    elif others:
        found = f"but other safetensors files ({some_of(others)})"
        remedy = f"Merge an adapter into its model first; rename a single weight file to {single_file}."
    elif pickles:
        found = f"only pickled weights ({some_of(pickles)}), never loaded here because they can run code"
        remedy = (
            "Convert them once, on a machine where you trust them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors."
        )
    else:
        found = f"{len(names)} other files ({some_of(names)})" if names else "nothing at all"
        remedy = "Give the folder into which the model was saved, or finish its download."
    return CheckpointError(f"{folder} holds no {single_file} and no {single_file}.index.json, {found}. {remedy}")


def weights_in(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors that hold weights, in any dtype, and are not buffers of integers or truth values."""
    buffers = next_to_modules(tensors)
    return {
        name: info
        for name, info in tensors.items()
        if info.is_weight or is_weight(name) or (info.is_packed and (info.is_floating_point or name not in buffers))
    }


def broken_file(path: Path, what: str) -> CheckpointError:
    """Return the error for a file that is not a valid safetensors file."""
    return CheckpointError(
        f"{path} is not a valid safetensors file: {what}. It was cut short or changed; download or save it again."
    )


def some_of(names: Iterable[Any], limit: int = 5) -> str:
    """Return the first ``limit`` names of a collection and the number of the others, for messages."""
    listed = [shown(str(name)) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def shown(name: str) -> str:
    """Return a name from an untrusted file as a message may show it: without control characters, and cut."""
    cut = name if len(name) <= 200 else name[:200] + "…"
    return cut if cut.isprintable() else ascii(cut)[1:-1]
