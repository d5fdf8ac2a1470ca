"""What the parts of a training's checkpoint must be, checked in one place before anything reads them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch.distributed.checkpoint import metadata

from shadowlit.checkpoint.headers import some_of
from shadowlit.errors import CheckpointError

_Box = tuple[tuple[int, ...], tuple[int, ...]]  # where a chunk begins, and its sizes


class DamagedError(CheckpointError):
    """A checkpoint that was cut short, or has changed since it was written."""


def damaged(path: Path, what: str) -> DamagedError:
    """Return the error about a checkpoint, of which ``what`` says what is wrong: ``lacks meta.pt``."""
    return DamagedError(f"{path} is damaged: it {what}.")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_version(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(Version(value))
    except InvalidVersion:
        return False


def _holds_maps(value: Any, kind: type, *needed: str) -> bool:
    """Whether it is a collection of a kind whose values are mappings that have the keys."""
    parts = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, kind) and all(isinstance(each, Mapping) and {*needed} <= {*each} for each in parts)


def _is_optimizer_list(value: Any) -> bool:
    return _holds_maps(value, list, "state", "param_groups") and all(
        isinstance(each["state"], Mapping) and _holds_maps(each["param_groups"], list) for each in value
    )


_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "state_dict": (lambda value: isinstance(value, Mapping) and all(isinstance(n, str) for n in value), "names"),
    "global_step": (_is_count, "a count"),
    "epoch": (_is_count, "a count"),
    "pytorch-lightning_version": (_is_version, "a version"),
    "loops": (lambda value: _holds_maps(value, dict) and "fit_loop" in value, "states, fit_loop among them"),
    "callbacks": (lambda value: _holds_maps(value, dict), "states by name"),
    "optimizer_states": (_is_optimizer_list, "a list of states with param_groups"),
    "lr_schedulers": (lambda value: _holds_maps(value, list), "a list of states"),
}


def require_parts(path: Path, content: Mapping[str, Any]) -> None:
    """Raise unless each of Lightning's parts that a checkpoint holds has the form that Lightning writes.

    Raises:
        DamagedError: With the first one that has another.
    """
    for key, (is_right, expected) in _PARTS.items():
        if key in content and not is_right(value := content[key]):
            shown = repr(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
            raise damaged(path, f"holds {some_of([shown])} as {key}, expected {expected}")


def require_index(folder: Path, index: metadata.Metadata) -> None:
    """Raise unless the index of a sharded checkpoint places every element of every tensor once, in files that exist.

    Torch reads what no chunk covers as uninitialised memory, and extends lists up to any number in ``planner_data``.

    Raises:
        DamagedError: It doesn't.
    """
    problem = _of_index(folder, index)
    if problem is not None:
        raise damaged(folder, problem)


def _of_index(folder: Path, index: metadata.Metadata) -> str | None:
    entries, places = index.state_dict_metadata, index.storage_data
    ends: dict[str, int] = {}
    for place in places.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    if missing := [file for file, end in ends.items() if _size(folder / file) < end]:
        return f"lacks {some_of(missing)}, or a part of it"
    for name, entry in entries.items():
        if isinstance(entry, metadata.TensorStorageMetadata) and not _covers(name, entry, places):
            return f"has an index whose chunks don't cover {some_of([name])} exactly once"
    return _of_paths(entries, index.planner_data)


def _of_paths(entries: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]) -> str | None:
    """What is wrong with the nested keys of the entries: names for mappings, numbers for lists without gaps."""
    through: Counter[tuple[str | int, ...]] = Counter()
    lengths: Counter[tuple[str | int, ...]] = Counter()
    for name in entries:
        path = paths.get(name, ())
        if ".".join(map(str, path)) != name or not all(isinstance(part, str) or _is_count(part) for part in path):
            return f"has an index without the nested keys of {some_of([name])}"
        for at, part in enumerate(path):
            if isinstance(part, int):
                through[path[:at]] += 1
                lengths[path[:at]] = max(lengths[path[:at]], part + 1)
    if long := [".".join(map(str, place)) for place, length in lengths.items() if length > through[place]]:
        return f"has an index with a list that lacks values, {some_of(long)}"
    return None


def _covers(name: str, entry: metadata.TensorStorageMetadata, places: Mapping[Any, Any]) -> bool:
    """Whether the chunks are disjoint, within the tensor and as large together, and each has a place that can hold it.

    Each is compared with those that begin before it and have not ended, along the dimension of most beginnings.
    """
    size, itemsize = tuple(entry.size), entry.properties.dtype.itemsize
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    for starts, sizes in boxes:
        if not len(starts) == len(sizes) == len(size):
            return False
        sides = zip(starts, sizes, size, strict=True)
        if not all(start >= 0 and length >= 0 and start + length <= whole for start, length, whole in sides):
            return False
        place = places.get(metadata.MetadataIndex(name, torch.Size(starts)))
        if place is None or place.length < math.prod(sizes) * itemsize:
            return False
    along = max(range(len(size)), key=lambda d: len({starts[d] for starts, _ in boxes}), default=None)
    begun: list[_Box] = []
    for box in boxes if along is None else sorted((b for b in boxes if all(b[1])), key=lambda b: b[0][along]):
        begun = [other for other in begun if along is None or other[0][along] + other[1][along] > box[0][along]]
        if any(_overlap(box, other) for other in begun):
            return False
        begun.append(box)
    return bool(boxes) and sum(math.prod(sizes) for _, sizes in boxes) == math.prod(size)


def _overlap(one: _Box, other: _Box) -> bool:
    return all(a < b + long and b < a + length for a, length, b, long in zip(*one, *other, strict=True))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else -1
    except OSError:
        return -1
