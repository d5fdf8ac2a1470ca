"""The update ``tuned - base`` of a tuned checkpoint, read a few rows at a time.

No transformers import: start-up is part of the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shadowlit.checkpoint.headers import TensorInfo, some_of, weights_in
from shadowlit.checkpoint.layout import (
    LayoutReader,
    head_and_embedding,
    with_head,
)
from shadowlit.checkpoint.names import layer_of, stored_factors
from shadowlit.checkpoint.numeric import narrow, require_finite
from shadowlit.checkpoint.reader import Fill, TensorReader, fingerprint_of
from shadowlit.checkpoint.streaming import row_windows
from shadowlit.errors import GraftError, counted

if TYPE_CHECKING:
    from shadowlit.grafting.factors import Factors

UNGATHERED = (0,)  # shape in which DeepSpeed ZeRO-3 leaves a parameter of which a process holds no shard

Part = tuple[str, TensorInfo, Fill]
"""A tensor as a delta stores it: its name there, its header, and its bytes."""
Rows = npt.NDArray[np.floating]
Bytes = npt.NDArray[np.uint8]


class Update:
    """The update of a tuned model, by the names of the Base's tensors and in their shapes."""

    shapes: Mapping[str, tuple[int, ...]]
    without: Mapping[str, str] = MappingProxyType({})  # tensors of which no update can be taken, and why
    tied = False  # whether the update of the embedding is that of the output head too, if there is none of a head

    transformed = False  # whether `rows` may differ from `learned_rows`
    transforms: Sequence[Mapping[str, Any]] = ()  # names and parameters of those by which they differ

    @property
    def factored(self) -> Mapping[str, Callable[[], Factors]]:
        """The matrices that are products of two small ones, by functions that read these, in float32."""
        return {}

    @property
    def weights(self) -> frozenset[str]:
        """Names of the updates that are numbers to add: all except those of integers and truth values."""
        return frozenset(self.shapes)

    def rows(self, name: str, start: int, stop: int) -> Any:
        """Return the rows ``start`` to ``stop`` of ``tuned - base``, [stop - start, ...]: an array, or a tensor on the
        CPU.
        """
        raise NotImplementedError

    def learned_rows(self, name: str, start: int, stop: int) -> Any:
        """Return the same rows before any transform."""
        return self.rows(name, start, stop)

    def fingerprint(self, names: Iterable[str]) -> str:
        """Return a sha256 that recognises what was learned of these tensors, before any transform.

        It is :meth:`shadowlit.checkpoint.reader.TensorReader.fingerprint` of products as their factors in float32, and
        everything else in bfloat16: the update as a delta stores it, unless a factor is larger than the product.
        """
        chosen, factored = sorted(names), self.factored

        def parts(name: str) -> Iterator[Part]:
            if name in factored:
                return factor_parts(name, factored[name]())
            return iter([dense_part(name, self.shapes[name], partial(self.learned_rows, name))])

        return fingerprint_of((part for name in chosen for part in parts(name)), len(chosen))

    def changes(self, name: str) -> bool:
        """Return whether a value of the tensor ``name`` is not zero; reads no further than to the first one."""
        windows = row_windows(TensorInfo(name, "F32", self.shapes[name], ""))
        return any(np.any(np.asarray(self.rows(name, *window))) for window in windows)

    def require_weights(self, names: Iterable[str]) -> None:
        """Raise a GraftError unless these are updates of floating-point weights; those of a stored delta always are."""

    def require_finite_base(self, name: str, start: int, stop: int) -> None:
        """Raise a CheckpointError if the Base holds NaN or infinities in these rows, as far as it is known."""

    def bfloat16_rows(self, name: str, start: int, stop: int) -> tuple[Bytes, Bytes] | None:
        """Return the rows of the Base and of the tuned model as flat bytes, where both are stored in bfloat16."""
        return None


class FromBase(Update):
    """An update that is computed with the Base's checkpoint, and that some tensors may lack."""

    _base: TensorReader

    def _set_without(self, without: Mapping[str, str], strict: bool) -> None:
        """Keep what has no update, and why; raise if any has none, or unless ``strict`` if its layer is unknown."""
        self.without = without
        unknown = [name for name in without if self._is_unknown(name)]
        if unknown or (strict and without):
            raise self._problem(sorted(without if strict else unknown))

    def _is_unknown(self, name: str) -> bool:
        """Whether the tuned model has a tensor in its layers that the Base lacks."""
        return name not in self._base.tensors and layer_of(name) is not None

    def _problem(self, names: list[str]) -> GraftError:
        """The error for tensors without an update, by its cause."""
        raise NotImplementedError

    def require_weights(self, names: Iterable[str]) -> None:
        """See :class:`Update`; that there are updates is checked, and the Base's tensors are."""
        names = list(names)
        if lacking := sorted(self.without.keys() & set(names)):
            raise self._problem(lacking)
        self._base.require_weights(names)

    def require_finite_base(self, name: str, start: int, stop: int) -> None:
        """See :class:`Update`."""
        stored, code = self._base.raw_rows(name, start, stop), self._base.info(name).code
        require_finite(name, stored, code, f"Base {self._base.folder}")


class FullUpdate(FromBase):
    """The difference of two checkpoints, whose names and layout may differ as :class:`LayoutReader` allows.

    Where one of the two is tied and the other is not, the head of the tied one is its embedding.

    Args:
        base: Checkpoint that the tuning started from.
        tuned: The tuned checkpoint.
        strict: Raise for every tensor that is not in both in one shape. Otherwise these are in ``without``, and an
            error only where :meth:`require_weights` asks for them, or where the tuned model has layers of its own.

    Raises:
        GraftError: The checkpoints do not hold the same tensors in the same shapes.
        CheckpointError: A checkpoint holds more than plain weights, or a tensor twice.
    """

    def __init__(self, base: TensorReader, tuned: TensorReader, strict: bool = True) -> None:
        self._tuned = LayoutReader(tuned, base)
        head = head_and_embedding(self._tuned.tensors)[0]
        tied = head_and_embedding(base.tensors)[0] is None
        self._base = with_head(base, head) if head and tied else base
        left, right = self._base.tensors, self._tuned.tensors
        self._of_base, self._of_tuned = (weights_in(side).keys() for side in (left, right))
        self.tied = head is None
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: info.shape for name, info in left.items() if name in right and right[name].shape == info.shape
        }
        without = {name: "only in the Base" for name in left if name not in right}
        without |= {name: "only in the tuned one" for name in right if name not in left}
        without |= {
            name: f"{left[name].shape} and {right[name].shape}"
            for name in sorted(left.keys() & right.keys())
            if name not in self.shapes
        }
        self._set_without(without, strict)

    def _problem(self, names: list[str]) -> GraftError:
        left, right = self._base.tensors, self._tuned.tensors
        both = {name: (left[name].shape, right[name].shape) for name in names if name in left and name in right}
        if empty := [name for name, (_, tuned) in both.items() if tuned == UNGATHERED]:
            return no_elements(self._tuned.folder, empty)
        outside = all(layer_of(name) is None for name in names)
        if outside and (resized := {name: shapes for name, shapes in both.items() if is_resized(*shapes)}):
            return other_vocabulary(self._base.folder, self._tuned.folder, resized)
        by_kind: dict[str, list[str]] = {}
        for name in names:
            kind, told = ("shapes", f"{name} {self.without[name]}") if name in both else (self.without[name], name)
            by_kind.setdefault(kind, []).append(told)
        problems = "; ".join(f"{kind}: {some_of(told)}" for kind, told in by_kind.items())
        if outside:
            return GraftError(
                f"{self._tuned.folder} and {self._base.folder} differ outside of their layers: {problems}. Expected "
                "both to hold what is selected; leave the rest out of the selection ('linear' does)."
            )
        if all(name not in right for name in names):
            return GraftError(
                f"{self._tuned.folder} is incomplete, or was not tuned from {self._base.folder}: {problems}. Finish "
                "its download or save the whole of it again, or leave what it lacks out of the selection."
            )
        return GraftError(
            f"{self._tuned.folder} was not tuned from {self._base.folder}: {problems}. Give the Base that the training "
            "started from."
        )

    def _is_unknown(self, name: str) -> bool:
        return super()._is_unknown(name) and name in self._of_tuned

    @property
    def weights(self) -> frozenset[str]:
        """See :class:`Update`."""
        return frozenset(self.shapes.keys() & self._of_base & self._of_tuned)

    def require_weights(self, names: Iterable[str]) -> None:
        """See :class:`Update`; both sides are checked."""
        names = list(names)
        super().require_weights(names)
        self._tuned.require_weights(names)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """See :class:`Update`."""
        tuned, base = self._tuned.rows(name, start, stop), self._base.rows(name, start, stop)
        return np.subtract(tuned, base, out=tuned) if tuned.dtype == base.dtype else tuned - base

    def changes(self, name: str) -> bool:
        """See :class:`Update`; tensors that hold no weights change with their bytes."""
        base, tuned = self._base.info(name), self._tuned.info(name)
        if base.code == tuned.code and all(
            np.array_equal(self._base.raw_rows(name, *window), self._tuned.raw_rows(name, *window))
            for window in row_windows(base)
        ):
            return False
        return not (base.is_weight and tuned.is_weight) or super().changes(name)

    def bfloat16_rows(self, name: str, start: int, stop: int) -> tuple[Bytes, Bytes] | None:
        """See :class:`Update`."""
        if {self._base.info(name).code, self._tuned.info(name).code} != {"BF16"}:
            return None
        return self._base.raw_rows(name, start, stop), self._tuned.raw_rows(name, start, stop)


class SummedUpdate(Update):
    """The update of a tuned checkpoint plus that of an adapter that was trained on it, added in float32."""

    def __init__(self, tuned: Update, adapter: Update) -> None:
        self._parts, self.tied = (tuned, adapter), tuned.tied
        self.shapes: Mapping[str, tuple[int, ...]] = {**tuned.shapes, **adapter.shapes}
        self.without = {**tuned.without, **adapter.without}

    @property
    def weights(self) -> frozenset[str]:
        """See :class:`Update`."""
        return self._parts[0].weights | self._parts[1].weights

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """See :class:`Update`."""
        found = [part.rows(name, start, stop) for part in self._parts if name in part.shapes]
        return found[0] if len(found) == 1 else found[0] + found[1]

    def require_weights(self, names: Iterable[str]) -> None:
        """See :class:`Update`."""
        names = list(names)
        for part in self._parts:
            part.require_weights(name for name in names if name in part.shapes or name in part.without)

    def require_finite_base(self, name: str, start: int, stop: int) -> None:
        """See :class:`Update`."""
        self._parts[0].require_finite_base(name, start, stop)


def factor_parts(name: str, factors: Factors) -> Iterator[Part]:
    """Yield both factors of a matrix, in float32, in the order of their names."""
    for key, factor in sorted(zip(stored_factors(name), (factors.up, factors.down), strict=True)):
        raw = np.ascontiguousarray(factor.float().numpy()).reshape(-1).view(np.uint8)
        yield key, TensorInfo(key, "F32", tuple(factor.shape), ""), partial(_copy, raw)


def dense_part(name: str, shape: tuple[int, ...], rows: Callable[[int, int], Any]) -> Part:
    """Return a tensor in bfloat16; ``rows(start, stop)`` gives its rows in float32, a scalar's one row too."""
    info = TensorInfo(name, "BF16", shape, "")

    def fill(buffer: memoryview, offset: int) -> None:
        if len(buffer):
            start, stop = offset // info.row_bytes, -(-(offset + len(buffer)) // info.row_bytes)
            raw = narrow(np.asarray(rows(start, stop)).reshape(-1), "BF16").view(np.uint8)
            _copy(raw, buffer, offset - start * info.row_bytes)

    return name, info, fill


def _copy(raw: Bytes, buffer: memoryview, offset: int) -> None:
    buffer[:] = raw[offset : offset + len(buffer)].data


def is_resized(base: tuple[int, ...], tuned: tuple[int, ...]) -> bool:
    """Return whether two matrices differ in their numbers of rows alone."""
    return len(base) == len(tuned) == 2 and base[0] != tuned[0] and base[1] == tuned[1]


def other_vocabulary(base: Path, tuned: Path, shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> GraftError:
    """Return the error for embeddings or heads that have other numbers of rows in the tuned model."""
    found = [f"{there[0]} rows of {name}, the Base {here[0]}" for name, (here, there) in shapes.items()]
    return GraftError(
        f"the tuned model has {some_of(found)}: its vocabulary was resized in {tuned}, so that no update of the "
        f"embedding or the output head of {base} can be taken from it. Leave them out of the selection: 'linear' "
        "grafts everything else that the layers have learned."
    )


def no_elements(folder: Path, names: list[str]) -> GraftError:
    """Return the error for tensors without elements."""
    return GraftError(
        f"{folder} holds {counted(len(names), 'tensor')} without any elements ({some_of(names)}), which is what "
        "DeepSpeed ZeRO-3 saves if the shards are not gathered first. Gather them from the training's checkpoint with "
        "zero_to_fp32.py, or train again with stage3_gather_16bit_weights_on_model_save=true, and give the result."
    )


def zero_update(found: str) -> GraftError:
    """Return the error for an update in which nothing changes."""
    return GraftError(
        f"the update is zero ({found}), so nothing would change. Check that tuned is the trained model and not the "
        "Base (an adapter whose lora_B are all zero has learned nothing), that select chooses what was trained, and "
        "that the scale is not 0. With --allow-zero (allow_zero=True) it is not an error."
    )
