"""One pass over several checkpoints, in constant memory: the sums from which every measure of similarity follows.

Tensors are cut into windows that stay in a core's cache, whatever their shape; a large tensor keeps all cores busy.
In numpy: importing torch would take longer than comparing two small models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt

from shadowlit.errors import CheckpointError
from shadowlit.graft.checkpoint import CheckpointReader
from shadowlit.graft.headers import TensorInfo
from shadowlit.graft.numeric import split_bfloat16
from shadowlit.graft.workers import in_order

_TASK_ELEMENTS = 2**23  # of a tensor, computed by one process or thread
_WINDOW_ELEMENTS = 2**18  # of all vectors of a window together, in float32
_CHUNK = 1024  # products are added in float32 over so many elements, and in float64 from there on

# Types of numpy in which it reads what the format's codes stand for; torch reads the others.
_PLAIN = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip

Values = npt.NDArray[np.float32]
Totals = npt.NDArray[np.float64]
Stored = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Sums:
    """What two tensors a and b of one shape come to; the sums of parts add up to those of the whole.

    Attributes:
        num_elements: elements of each.
        size_a: ``Σ|a|``.
        size_b: ``Σ|b|``.
        distance: ``Σ|a − b|``; only for weights.
        square_a: ``‖a‖²``.
        square_b: ``‖b‖²``.
        square_difference: ``‖b − a‖²``; only for weights.
        dot: ``⟨a, b⟩``.
        num_both: elements that are zero in neither; only for updates and offsets.
        num_same_sign: those of them with the same sign.
    """

    num_elements: int = 0
    size_a: float = 0.0
    size_b: float = 0.0
    distance: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0
    square_difference: float = 0.0
    dot: float = 0.0
    num_both: float = 0.0
    num_same_sign: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def sigma(self) -> float:
        """``Σ|a − b| / (Σ|a| + Σ|b|)``: 0 for equal tensors, about 0.7 for unrelated ones of equal size, 1 at most.

        Two tensors of zeros are equal; an empty one has none (NaN).
        """
        if not self.num_elements:
            return math.nan
        return self.distance / (self.size_a + self.size_b) if self.size_a + self.size_b else 0.0

    @property
    def cosine(self) -> float:
        """``⟨a, b⟩ / (‖a‖ ‖b‖)``; NaN if one of the two is zero."""
        norms = math.sqrt(self.square_a) * math.sqrt(self.square_b)
        return max(-1.0, min(1.0, self.dot / norms)) if norms else math.nan

    @property
    def relative_norm(self) -> float:
        """``‖b − a‖ / ‖a‖``; NaN if a is zero."""
        return math.sqrt(self.square_difference / self.square_a) if self.square_a else math.nan

    @property
    def norm_ratio(self) -> float:
        """``‖b‖ / ‖a‖``; NaN if a is zero."""
        return math.sqrt(self.square_b / self.square_a) if self.square_a else math.nan

    @property
    def sign_agreement(self) -> float:
        """Share of equal signs among the elements that are zero in neither; 0.5 by chance, NaN if there are none."""
        return self.num_same_sign / self.num_both if self.num_both else math.nan


@dataclass(frozen=True)
class Moments:
    """The sums over a tensor of k checkpoints, for all of their pairs; in float64.

    The vectors are the k tensors, and, for weights, the k - 1 offsets of the others from the first after them. The
    differences are these offsets; for deltas they are the k tensors themselves.

    Attributes:
        num_elements: of each vector.
        sizes: [v], ``Σ|x|`` of every vector.
        products: [v, v], ``⟨x, y⟩`` of the vectors that are compared: the first with all tensors, every two
            differences, and each with itself; zero elsewhere.
        signs: [d, d], number of equal minus number of opposite signs of every two differences; zero if there is one.
        both: [d, d], number of elements that are zero in neither.
    """

    num_elements: int
    sizes: Totals
    products: Totals
    signs: Totals
    both: Totals

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def weights(self, b: int) -> Sums:
        """The first checkpoint's tensor and that of checkpoint ``b``."""
        return self._sums(0, b, offset=(len(self.sizes) - 1) // 2 + b)

    def differences(self, a: int, b: int) -> Sums:
        """Two differences: deltas by their number, or offsets, of which the first is number 0."""
        first = len(self.sizes) - len(self.signs)
        both, signs = float(self.both[a, b]), float(self.signs[a, b])
        return self._sums(
            first + a, first + b, num_both=both, num_same_sign=(both + signs) / 2
        )  # the sum and the difference of two counts

    def _sums(self, a: int, b: int, offset: int | None = None, **signs: float) -> Sums:
        distance, square = (0.0, 0.0) if offset is None else (self.sizes[offset], self.products[offset, offset])
        return Sums(
            num_elements=self.num_elements,
            size_a=float(self.sizes[a]),
            size_b=float(self.sizes[b]),
            distance=float(distance),
            square_a=float(self.products[a, a]),
            square_b=float(self.products[b, b]),
            square_difference=float(square),
            dot=float(self.products[a, b]),
            **signs,
        )


def stream_moments(
    readers: Sequence[CheckpointReader],
    names: Sequence[str],
    *,
    deltas: bool,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[str, Moments]]:
    """The moments of the tensors ``names`` of several checkpoints.

    Computed in float32, added up in float64; a tensor that a checkpoint lacks counts as zero; where the numbers of rows
    differ, the shared rows count. The result doesn't depend on the number of threads.

    Args:
        readers: the checkpoints.
        names: tensors, with equal shapes but for the number of rows.
        deltas: the checkpoints hold updates, not weights, so that no offsets are formed.
        advance: called with the number of elements of every part that is done.

    Yields:
        Name and moments, in the order of ``names``.

    Raises:
        CheckpointError: a tensor holds NaN or infinities.
    """
    sizes = {name: min(r.tensors[name].num_elements for r in readers if name in r.tensors) for name in names}
    tasks = [
        (name, start, min(start + _TASK_ELEMENTS, size))
        for name, size in sizes.items()
        for start in range(0, max(1, size), _TASK_ELEMENTS)
    ]
    num_bytes = sum(
        r.tensors[name].itemsize * size for name, size in sizes.items() for r in readers if name in r.tensors
    )
    parts = in_order(lambda task, _: _moments(readers, *task, deltas), tasks, room_bytes=0, num_bytes=num_bytes)
    whole: Moments | None = None
    for (name, _, stop), (part, _) in zip(tasks, parts, strict=True):
        whole = part if whole is None else whole + part
        advance(part.num_elements)
        if stop == sizes[name]:
            finite = np.isfinite(whole.products.diagonal())
            if not finite.all():
                found = [str(reader.folder) for reader, well in zip(readers, finite, strict=False) if not well]
                raise CheckpointError(
                    f"tensor '{name}' of {' and '.join(found)} holds NaN or infinities. Check the run that made it."
                )
            yield name, whole
            whole = None


def _moments(readers: Sequence[CheckpointReader], name: str, start: int, stop: int, deltas: bool) -> Moments:
    """The moments of elements ``start`` to ``stop`` of a tensor."""
    infos = [reader.tensors.get(name) for reader in readers]
    plan = _Plan.of(len(readers), deltas)
    step = _round_up(_WINDOW_ELEMENTS // (plan.num_vectors + 1))
    num_chunks = _round_up(stop - start) // _CHUNK
    dots = np.zeros((plan.num_sums, num_chunks), np.float32)
    window: _Window | None = None
    with np.errstate(invalid="ignore", over="ignore"):  # told of a whole tensor, by its name
        for first in range(start, stop, step):
            size = min(step, stop - first)
            if window is None or window.size != size:
                window = _Window(plan, infos, size)
            for reader, memory, itemsize in zip(readers, window.stored, window.itemsizes, strict=True):
                if memory is not None:
                    reader.read_into(memory[: size * itemsize].data, name, first * itemsize)
            begin = (first - start) // _CHUNK
            window.sums(dots[:, begin : begin + _round_up(size) // _CHUNK])
        return plan.moments(stop - start, dots.sum(1, dtype=np.float64))


@dataclass(frozen=True)
class _Plan:
    """Which sums there are, in their order: of each vector's size, of pairs' products, signs, and common elements."""

    num_stored: int
    num_vectors: int
    products: tuple[tuple[int, int], ...]
    differences: range
    signs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, num_stored: int, deltas: bool) -> _Plan:
        num_vectors = num_stored if deltas else 2 * num_stored - 1
        differences = range(0 if deltas else num_stored, num_vectors)
        pairs = tuple(combinations_with_replacement(differences, 2))
        products = pairs if deltas else ((0, 0), *((i, j) for i in range(1, num_stored) for j in (0, i)), *pairs)
        first = differences.start
        signs = tuple((i - first, j - first) for i, j in pairs) if len(differences) > 1 else ()
        return cls(num_stored, num_vectors, products, differences, signs)

    @property
    def num_sums(self) -> int:
        return self.num_vectors + len(self.products) + 2 * len(self.signs)

    def moments(self, num_elements: int, sums: Totals) -> Moments:
        ends = np.cumsum([self.num_vectors, len(self.products), len(self.signs)])
        sizes, products, signs, both = np.split(sums, ends)
        d = len(self.differences)
        return Moments(
            num_elements, sizes, _symmetric(self.num_vectors, self.products, products),
            _symmetric(d, self.signs, signs), _symmetric(d, self.signs, both),
        )  # fmt: skip


class _Window:
    """Memory for ``size`` elements of a tensor in every checkpoint, as they are stored and as vectors in the cache.

    All views are made once: a model has ten thousand windows, and a view takes as long as a thousand elements.
    """

    def __init__(self, plan: _Plan, infos: Sequence[TensorInfo | None], size: int) -> None:
        self.size, width = size, _round_up(size)
        self.itemsizes = [info.itemsize if info else 0 for info in infos]
        # Zeros behind the last element, which nothing is read into, add nothing.
        self.stored = [np.zeros(width * info.itemsize, np.uint8) if info else None for info in infos]
        vectors = np.zeros((plan.num_vectors, width), np.float32)
        # The order of elements means nothing if it is the same in all; bfloat16 widens fastest in another one.
        in_pairs = all(info is None or info.code == "BF16" for info in infos) and width % 2 == 0
        self._fills = [
            (memory, "pairs" if in_pairs else info.code, vector)
            for memory, info, vector in zip(self.stored, infos, vectors, strict=False)
            if info is not None and memory is not None
        ]
        n = plan.num_stored
        self._offsets = [(vectors[i], vectors[0], vectors[n + i - 1]) for i in range(1, n) if n < plan.num_vectors]
        chunks = vectors.reshape(plan.num_vectors, -1, _CHUNK)
        self._products = [(chunks[i], chunks[j]) for i, j in plan.products]
        self._vectors, self._chunks, self._ones = list(vectors), list(chunks), np.ones(_CHUNK, np.float32)
        differences = [vectors[i] for i in plan.differences] if plan.signs else []
        signs = np.zeros((len(differences), width), np.float32)
        self._signs = list(zip(differences, signs, strict=True))
        sign_chunks = signs.reshape(len(differences), width // _CHUNK, _CHUNK)
        self._sign_products = [(sign_chunks[i], sign_chunks[j]) for i, j in plan.signs]

    def sums(self, out: Values) -> None:
        """The plan's sums of what is stored, [sums, chunks]."""
        for memory, code, vector in self._fills:
            _fill(memory, code, vector)
        for one, first, offset in self._offsets:
            np.subtract(one, first, out=offset)
        rows = iter(out)
        sizes = [next(rows) for _ in self._chunks]
        for one, other in self._products:
            np.vecdot(one, other, out=next(rows))
        for vector, sign in self._signs:
            np.sign(vector, out=sign)
        for one, other in self._sign_products:
            np.vecdot(one, other, out=next(rows))
        for _, sign in self._signs:
            np.abs(sign, out=sign)
        for one, other in self._sign_products:
            np.vecdot(one, other, out=next(rows))
        for vector, chunks, size in zip(self._vectors, self._chunks, sizes, strict=True):
            np.abs(vector, out=vector)
            np.vecdot(chunks, self._ones, out=size)


def _fill(memory: Stored, code: str, vector: Values) -> None:
    """Widen stored elements into a vector; ``pairs`` are bfloat16 in whatever order is fastest."""
    if code == "pairs":
        split_bfloat16(memory.view(np.uint32), vector)
    elif code == "BF16":
        bits = vector.view(np.uint32)
        np.copyto(bits, memory.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    elif code in _PLAIN:
        np.copyto(vector, memory.view(_PLAIN[code]), casting="unsafe")
    else:
        import torch

        dtype = TensorInfo("", code, (), "").dtype
        np.copyto(vector, torch.from_numpy(memory).view(dtype).float().numpy())


def _symmetric(size: int, pairs: Sequence[tuple[int, int]], values: Totals) -> Totals:
    """[size, size], with the values at their pairs and zeros elsewhere."""
    matrix = np.zeros((size, size))
    for (i, j), value in zip(pairs, values, strict=True):
        matrix[i, j] = matrix[j, i] = value
    return matrix


def _round_up(size: int) -> int:
    return -(-size // _CHUNK) * _CHUNK
