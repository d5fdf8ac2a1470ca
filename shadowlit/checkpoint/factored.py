"""Reads a stored update whose matrices may be products of two small ones, as LoRA's are. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from shadowlit.checkpoint.folder import DELTA_FILE, CheckpointReader
from shadowlit.checkpoint.headers import TensorInfo, some_of
from shadowlit.checkpoint.names import stored_factors, whole_of_factor
from shadowlit.checkpoint.reader import TensorReader, keeping
from shadowlit.errors import CheckpointError

Values = npt.NDArray[np.floating]


class FactoredReader(TensorReader):
    """Presents the products of stored factors as float32 matrices, one of which is in memory at a time.

    Attributes:
        factored: Names of the matrices that are stored as factors.

    Raises:
        CheckpointError: A factor lacks the other one, doesn't fit it, or its matrix is stored as well.
    """

    def __init__(self, files: TensorReader) -> None:
        self._files, self.folder = files, files.folder
        names = {whole for name in files.tensors if (whole := whole_of_factor(name))}
        self.factored = frozenset(names)
        shapes = {name: [files.tensors[one].shape for one in self._parts(name)] for name in names}
        wrong = [
            name
            for name, found in shapes.items()
            if name in files.tensors or [len(s) for s in found] != [2, 2] or found[0][1] != found[1][0]
        ]
        if wrong:
            raise CheckpointError(
                f"{self.folder} should hold two factors [out, r] and [r, in] of {some_of(sorted(wrong))}, and not the "
                "matrix itself. Make the delta again."
            )
        products = {
            name: TensorInfo(name, "F32", (up[0], down[1]), files.tensors[stored_factors(name)[0]].file)
            for name, (up, down) in shapes.items()
        }
        self.tensors = {
            name: info for name, info in sorted({**files.tensors, **products}.items()) if whole_of_factor(name) is None
        }
        self._product = keeping(self._multiplied, count=1)

    def factors(self, name: str) -> tuple[Values, Values]:
        """Return the factors [out, r] and [r, in] of a matrix, in float32."""
        up, down = (self._files.rows(one, 0, self._files.info(one).shape[0]) for one in stored_factors(name))
        return up, down

    def read_into(self, buffer: memoryview, name: str, offset: int = 0) -> None:
        """See :meth:`TensorReader.read_into`."""
        if name not in self.factored:
            self._files.read_into(buffer, name, offset)
            return
        stored = self._product(name).reshape(-1).view(np.uint8)
        buffer[:] = stored[offset : offset + len(buffer)].data

    def close(self) -> None:
        """See :meth:`TensorReader.close`."""
        self._files.close()

    def _parts(self, name: str) -> tuple[str, str]:
        lacking = [one for one in stored_factors(name) if one not in self._files.tensors]
        if lacking:
            raise CheckpointError(f"{self.folder} lacks {lacking[0]}, a factor of {name}. Make the delta again.")
        return stored_factors(name)

    def _multiplied(self, name: str) -> Values:
        up, down = self.factors(name)
        with np.errstate(all="ignore"):  # what isn't finite is reported by its name
            return np.ascontiguousarray(up @ down, dtype=np.float32)


def open_stored_delta(folder: str | Path) -> TensorReader:
    """Open the files of a stored update; a CheckpointError if there are none, or they are broken."""
    files = CheckpointReader(folder, DELTA_FILE)
    return FactoredReader(files) if any(map(whole_of_factor, files.tensors)) else files
