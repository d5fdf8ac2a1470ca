"""The graft of three folders: what may be brought together, and how."""

from __future__ import annotations

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.layout import LayoutReader
from shadowlit.checkpoint.names import is_computed, layer_of
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.errors import GraftError


def base_of(instruct: TensorReader, base: TensorReader) -> TensorReader:
    """Return the Base under the names and in the layout of its Instruct.

    Either may have tensors that the other lacks: an Instruct a vision tower, say. If both have some in their layers,
    those are one another's under names that are unknown here, and no update would reach them.

    Raises:
        CheckpointError: One of them holds more than plain weights, or one tensor twice.
        GraftError: They have different architectures.
    """
    presented = LayoutReader(base, instruct)
    ours, theirs = _only_in(presented, instruct), _only_in(instruct, presented)
    if ours and theirs:
        raise GraftError(
            f"{base.folder} has {some_of(ours)}, {instruct.folder} has {some_of(theirs)} instead. Expected one "
            "architecture, and names or layouts that are known here; load the one with the transformers version that "
            "saved the other, and save it again."
        )
    return presented


def _only_in(reader: TensorReader, other: TensorReader) -> list[str]:
    """Names of the tensors of ``reader``'s layers that ``other`` lacks."""
    return [
        name
        for name in reader.tensors
        if name not in other.tensors and layer_of(name) is not None and not is_computed(name)
    ]
