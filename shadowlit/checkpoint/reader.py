"""What every reader of a model's tensors can do, whatever holds them: a folder, another reader, or memory.

Imports no torch before a tensor is asked for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np

from shadowlit.checkpoint.headers import TensorInfo, shown, some_of
from shadowlit.checkpoint.numeric import FLOATS, widen
from shadowlit.errors import CheckpointError, GraftError, counted

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

Fill = Callable[[memoryview, int], None]
"""Fills a buffer with the bytes of a tensor from an offset."""
_Tensor = TypeVar("_Tensor")
_SAMPLE_BYTES = 16 * 1024
_SAMPLE_READS = 2048


class TensorReader(ABC):
    """Reads the tensors of one model, or some of their rows, without loading the rest.

    A subclass sets ``folder`` and ``tensors`` and implements :meth:`read_into`; everything else follows from these.
    """

    folder: Path  # for messages
    tensors: Mapping[str, TensorInfo]
    tied = False  # whether it is known that the output head is the embedding, and need not be stored
    computed: frozenset[str] = frozenset()  # names of stored buffers that the model computes for itself

    @abstractmethod
    def read_into(self, buffer: memoryview, name: str, offset: int = 0) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from byte ``offset`` of its data.

        Raises:
            CheckpointError: There is no such tensor, or its file can no longer be read or has been replaced.
        """

    def close(self) -> None:  # noqa: B027 - most readers hold nothing open
        """Close all files; a later read opens them again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def learned(self) -> Self:
        """Return the same reader without the buffers that the model computes for itself; both share their files."""
        reader = copy.copy(self)
        reader.tensors = {name: info for name, info in self.tensors.items() if name not in self.computed}
        reader.computed = frozenset()
        return reader

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of the tensor ``name``; raise a CheckpointError if there is none."""
        if name not in self.tensors:
            raise CheckpointError(
                f"There is no tensor '{shown(name)}' in {self.folder}, which holds "
                f"{counted(len(self.tensors), 'tensor')} "
                f"({some_of(self.tensors)}). Check the name, or whether this is the right model."
            )
        return self.tensors[name]

    def require_weights(self, names: Iterable[str]) -> None:
        """Raise a GraftError unless these tensors hold plain weights: no integers, packed, 8-bit or complex numbers."""
        others = [f"{info.name} ({info.code})" for info in map(self.info, names) if not info.is_weight]
        if others:
            raise GraftError(
                f"{self.folder} holds {some_of(others)}, expected F64, F32, F16 or BF16: an update can be neither "
                "taken from other dtypes nor added to them. Dequantise the model first (load it with transformers, "
                "dequantize(), save it in bfloat16), or leave the tensors out of the selection."
            )

    def raw_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of rows ``start`` to ``stop`` of a tensor, flat; a scalar has one row."""
        row = self.info(name).row_bytes
        raw = np.empty((stop - start) * row, np.uint8)
        self.read_into(raw.data, name, start * row)
        return raw

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.floating]:
        """Return the values of rows ``start`` to ``stop``, [stop - start, ...] in float32 (float64 if stored so).

        Raises:
            CheckpointError: As :meth:`read_into`, or the dtype is not a floating-point one of 16 bits or more.
        """
        info = self.info(name)
        if not info.is_weight:
            raise CheckpointError(
                f"Tensor '{name}' in {self.folder / info.file} has dtype {info.code}; expected one of "
                f"{', '.join(sorted(FLOATS))}. Give the unquantised model."
            )
        values = widen(self.raw_rows(name, start, stop), info.code)
        return values.reshape(stop - start, *info.shape[1:]) if info.shape else values.reshape(())

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor ``name`` in its stored dtype, in memory of its own."""
        return self.read_slice(name, ())

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """Return ``tensor[slices]`` in its stored dtype, in memory of its own, with a slice per leading dimension.

        Only the rows (of the first dimension) from the first to the last are read.

        Raises:
            CheckpointError: As :meth:`read_into`, or there are more slices than dimensions.
        """
        import torch

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
        # Read into memory of their own, not mapped: `safe_open` hands out views of one mapping, in which what a caller
        # writes is what the next caller reads, and whose pages count as the process's memory.
        raw, shape = self.raw_rows(name, start, stop), (stop - start, *info.shape[1:])
        part = torch.from_numpy(raw).view(info.dtype) if len(raw) else torch.empty(shape, dtype=info.dtype)
        if not info.shape:
            return part.reshape(())
        part = part.view(shape)
        trimmed = part[(slice(None, None, rows.step), *slices[1:])]
        return part if trimmed.shape == part.shape else trimmed.clone(memory_format=torch.contiguous_format)

    def fingerprint(self) -> str:
        """Return a sha256 of all names, dtypes and shapes, and a sample of the data: it recognises a checkpoint.

        The sample is up to 32 evenly spread blocks of 16 KiB of every tensor, its beginning and end included (fewer per
        tensor if there are more than 64 tensors, about 2,048 in all; smaller tensors whole). So it takes well under a
        second for 16 GB, does not depend on how tensors are split into files, and is no proof against forgery: a change
        between the sampled blocks goes unnoticed.
        """
        tensors = ((name, info, partial(self._fill, name)) for name, info in sorted(self.tensors.items()))
        return fingerprint_of(tensors, len(self.tensors))

    def _fill(self, name: str, buffer: memoryview, offset: int) -> None:
        self.read_into(buffer, name, offset)


class ComputedReader(TensorReader):
    """Presents tensors that are in memory, or computed when they are needed, as a checkpoint.

    ``rows(name, start, stop)`` returns rows of a tensor in the dtype that ``tensors`` has; a scalar has one row. It is
    ``None`` for tensors that are only described.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        rows: Callable[[str, int, int], torch.Tensor] | None = None,
    ) -> None:
        self.folder, self.tensors, self._rows = folder, tensors, rows

    def read_into(self, buffer: memoryview, name: str, offset: int = 0) -> None:
        """See :meth:`TensorReader.read_into`."""
        import torch

        info = self.info(name)
        assert self._rows is not None and offset + len(buffer) <= info.num_bytes
        if not len(buffer):
            return
        start, stop = offset // info.row_bytes, -(-(offset + len(buffer)) // info.row_bytes)
        raw = self._rows(name, start, stop).contiguous().reshape(-1).view(torch.uint8)
        within = offset - start * info.row_bytes
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(raw[within : within + len(buffer)])


def fingerprint_of(tensors: Iterable[tuple[str, TensorInfo, Fill]], count: int) -> str:
    """Return the fingerprint of about ``count`` tensors that come one after the other; see
    :meth:`TensorReader.fingerprint`.
    """
    digest = hashlib.sha256()
    num_blocks = min(32, max(2, _SAMPLE_READS // max(1, count)))
    for name, info, fill in tensors:
        digest.update(json.dumps([name, info.code, info.shape]).encode())
        for start, size in _sample_blocks(info.num_bytes, num_blocks):
            block = bytearray(size)
            fill(memoryview(block), start)
            digest.update(block)
    return digest.hexdigest()


def rows_of(tensor_of: Callable[[str], torch.Tensor]) -> Callable[[str, int, int], torch.Tensor]:
    """Return the function of rows that :class:`ComputedReader` needs, from one that returns whole tensors by name."""

    def rows(name: str, start: int, stop: int) -> torch.Tensor:
        tensor = tensor_of(name)
        return tensor[start:stop] if tensor.ndim else tensor

    return rows


def keeping(tensor_of: Callable[[str], _Tensor], count: int = 2) -> Callable[[str], _Tensor]:
    """Keep the last ``count`` tensors that a function returns by name; threads do not compute one twice."""
    kept: dict[str, _Tensor] = {}
    lock = threading.Lock()

    def tensor(name: str) -> _Tensor:
        with lock:
            if name not in kept:
                while len(kept) >= count:  # first, so that no more are in memory while the next one is computed
                    del kept[next(iter(kept))]
                kept[name] = tensor_of(name)
            return kept[name]

    return tensor


def described(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """Describe float32 tensors of these shapes as a header would."""
    return {name: TensorInfo(name, "F32", shape, "") for name, shape in shapes.items()}


def _sample_blocks(num_bytes: int, num_blocks: int) -> list[tuple[int, int]]:
    """(start, size) of the sampled blocks of a tensor; the whole tensor if it is small."""
    if num_bytes <= num_blocks * _SAMPLE_BYTES:
        return [(0, num_bytes)]
    last = num_bytes - _SAMPLE_BYTES
    return [(i * last // (num_blocks - 1), _SAMPLE_BYTES) for i in range(num_blocks)]
