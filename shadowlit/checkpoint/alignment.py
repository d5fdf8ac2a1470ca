"""A Base in the shape of its Instruct, where their vocabularies differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.checkpoint.layout import in_layout_of_module


class AlignedReader:
    """Reads the Base's checkpoint as if it had the Instruct's vocabulary.

    An Instruct may have more rows in its embedding and output head than its Base (tokens added for the chat), or
    fewer (other padding). The Instruct's tokenizer is the one in use, so its rows count: those that the Base lacks
    are the Instruct's own, those that only the Base has are left out. All other tensors are the Base's.

    Args:
        base: reader of the Base's checkpoint.
        instruct: reader of the Instruct's checkpoint.
    """

    def __init__(self, base: CheckpointReader, instruct: CheckpointReader) -> None:
        self._base, self._instruct = base, instruct
        self._rows = {
            name: min(info.shape[0], instruct.tensors[name].shape[0])
            for name, info in base.tensors.items()
            if name in instruct.tensors and _differ_in_rows(info, instruct.tensors[name])
        }
        self.tensors: dict[str, TensorInfo] = {
            name: dataclasses.replace(info, shape=instruct.tensors[name].shape) if name in self._rows else info
            for name, info in base.tensors.items()
        }

    @classmethod
    def open(cls, base: Path, instruct: Path) -> AlignedReader:
        """Open the checkpoints in two folders."""
        return cls(CheckpointReader(base), CheckpointReader(instruct))

    def of_module(self, shapes: Mapping[str, tuple[int, ...]]) -> AlignedReader:
        """The same by the names of a module's parameters, ``shapes``, and with experts as the module holds them.

        Raises:
            CheckpointError: as :class:`shadowlit.checkpoint.layout.Layout`.
            GraftError: likewise.
        """
        base, instruct = (in_layout_of_module(reader, shapes) for reader in (self._base, self._instruct))
        return self if (base, instruct) == (self._base, self._instruct) else AlignedReader(base, instruct)

    @property
    def folder(self) -> Path:
        """The Base's folder."""
        return Path(self._base.folder)

    @property
    def num_aligned(self) -> int:
        """How many tensors have the Instruct's rows instead of the Base's."""
        return len(self._rows)

    def close(self) -> None:
        """Close the files of both checkpoints; a later read opens them again."""
        self._base.close()
        self._instruct.close()

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """Read the rows and columns ``slices`` of tensor ``name``, in the Base's dtype."""
        if name not in self._rows:
            return self._base.read_slice(name, slices)
        shared, rows = self._rows[name], slices[0]
        start, stop, _ = rows.indices(self.tensors[name].shape[0])
        own = slice(start, max(start, min(stop, shared)))
        added = slice(min(max(start, shared), stop), stop)
        parts = []
        if own.stop > own.start:
            parts.append(self._base.read_slice(name, (own, *slices[1:])))
        if added.stop > added.start:
            parts.append(self._instruct.read_slice(name, (added, *slices[1:])).to(self.tensors[name].dtype))
        return torch.cat(parts) if parts else self._base.read_slice(name, (slice(0, 0), *slices[1:]))


def _differ_in_rows(left: TensorInfo, right: TensorInfo) -> bool:
    return len(left.shape) == 2 and left.shape[0] != right.shape[0] and left.shape[1:] == right.shape[1:]
