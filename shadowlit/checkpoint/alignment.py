"""A Base in the shape of its Instruct, where their vocabularies differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.names import stored_names
from shadowlit.checkpoint.reader import ComputedReader, TensorReader

if TYPE_CHECKING:
    from torch import Tensor


class AlignedReader(ComputedReader):
    """Reads the Base's checkpoint as if it had the Instruct's vocabulary.

    An Instruct may have more rows in its embedding and output head than its Base (tokens added for the chat), or
    fewer (other padding). The Instruct's tokenizer is the one in use, so its rows count: those that the Base lacks
    are the Instruct's own, and those that only the Base has are left out. All other tensors are the Base's. The names
    of the two may be those of different library versions.
    """

    def __init__(self, base: TensorReader, instruct: TensorReader) -> None:
        self._base, self._instruct = base, instruct
        self._names: dict[str, str] = {}
        infos = dict(base.tensors)
        for name, other in stored_names(base.tensors, instruct.tensors).items():
            shape, target = infos[name].shape, instruct.tensors[other].shape if other in instruct.tensors else ()
            if len(shape) == len(target) == 2 and shape[0] != target[0] and shape[1] == target[1]:
                self._names[name] = other
                infos[name] = dataclasses.replace(infos[name], shape=target)
        super().__init__(base.folder, infos, self._aligned)

    @classmethod
    def open(cls, base: Path, instruct: Path) -> AlignedReader:
        """Open the checkpoints in two folders."""
        return cls(CheckpointReader(base), CheckpointReader(instruct))

    def read_into(self, buffer: memoryview, name: str, offset: int = 0) -> None:
        """See :meth:`shadowlit.checkpoint.reader.TensorReader.read_into`."""
        if name in self._names:
            super().read_into(buffer, name, offset)
        else:
            self._base.read_into(buffer, name, offset)

    def close(self) -> None:
        """Close the files of both."""
        self._base.close()
        self._instruct.close()

    def _aligned(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor that has other rows in the Instruct: the Base's, and after them the Instruct's."""
        import torch

        end = min(stop, max(start, self._base.tensors[name].shape[0]))
        own = self._base.read_slice(name, (slice(start, end),))
        added = self._instruct.read_slice(self._names[name], (slice(end, stop),))
        return torch.cat([own, added.to(own.dtype)])
