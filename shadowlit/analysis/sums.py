"""One pass over several checkpoints, in constant memory: the sums from which every measure of similarity follows.

Tensors are cut into windows that stay in a core's cache, whatever their shape; a large tensor keeps all cores busy.
In numpy: importing torch would take longer than comparing two small models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt

from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.checkpoint.numeric import split_bfloat16, vectors
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.checkpoint.workers import in_order
from shadowlit.errors import CheckpointError

_TASK_ELEMENTS = 2**23  # of a tensor, computed by one process or thread
_WINDOW_ELEMENTS = 2**18  # of all vectors of a window together, in float32: half of a usual L2 cache
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
    """Sums over two tensors a and b of one shape; the sums of parts add up to those of the whole.

    Attributes:
        num_elements: Elements of each.
        size_a: ``Σ|a|``.
        size_b: ``Σ|b|``.
        distance: ``Σ|a − b|``; only for weights.
        square_a: ``‖a‖²``.
        square_b: ``‖b‖²``.
        square_difference: ``‖b − a‖²``; only for weights.
        dot: ``⟨a, b⟩``.
        num_both: Elements that are zero in neither; only for updates and offsets.
        num_same_sign: Number of these with the same sign.
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
        num_elements: Number of elements of each vector.
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
        """Return the first checkpoint's tensor and that of checkpoint ``b``."""
        return self._sums(0, b, offset=(len(self.sizes) - 1) // 2 + b)

    def differences(self, a: int, b: int) -> Sums:
        """Return two differences: deltas by their number, or offsets, of which the first is number 0."""
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
    readers: Sequence[TensorReader],
    names: Sequence[str],
    *,
    deltas: bool,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[str, Moments]]:
    """Yield the moments of tensors of several checkpoints, in their order; of updates, no offsets are formed.

    Computed in float32, added up in float64; a tensor that a checkpoint lacks counts as zero; where the numbers of rows
    differ, the shared rows count. The result doesn't depend on the number of threads. ``advance`` is called with the
    number of elements of every part that is done.

    Raises:
        CheckpointError: A tensor holds NaN or infinities.
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
    with closing(parts):  # see DiskGraft.tensors
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


def _moments(readers: Sequence[TensorReader], name: str, start: int, stop: int, deltas: bool) -> Moments:
    """The moments of elements ``start`` to ``stop`` of a tensor."""
    infos = [reader.tensors.get(name) for reader in readers]
    plan = _Plan(len(readers), deltas)
    step = _round_up(_WINDOW_ELEMENTS // (len(readers) + 1))
    sums = np.zeros((plan.ends[-1], _round_up(stop - start) // _CHUNK), np.float32)
    window: _Window | None = None
    with np.errstate(invalid="ignore", over="ignore"):  # reported for a whole tensor, by its name
        for first in range(start, stop, step):
            size = min(step, stop - first)
            if window is None or window.size != size:
                window = _Window(plan, infos, size)
            for reader, itemsize, memory in window.stored(readers):
                reader.read_into(memory, name, first * itemsize)
            begin = (first - start) // _CHUNK
            sums[:, begin : begin + _round_up(size) // _CHUNK] = window.sums()
        return plan.moments(stop - start, sums.sum(1, dtype=np.float64))


class _Plan:
    """Which sums there are, in their order: every vector's size, products, signs of pairs, common elements of pairs.

    The first vectors are the tensors as stored. Angles count between the ``differences``, whose pairs go by their own
    numbers; there are none if there is only one difference.
    """

    def __init__(self, num_stored: int, deltas: bool) -> None:
        self.num_stored = num_stored
        self.num_vectors = num_stored if deltas else 2 * num_stored - 1
        self.differences = range(0 if deltas else num_stored, self.num_vectors)
        of_stored = [] if deltas else [(0, 0), *((i, j) for i in range(1, num_stored) for j in (0, i))]
        self.products = [*of_stored, *combinations_with_replacement(self.differences, 2)]
        count = len(self.differences)
        self.pairs = list(combinations_with_replacement(range(count), 2)) if count > 1 else []
        self.ends = np.cumsum([self.num_vectors, len(self.products), len(self.pairs), len(self.pairs)])

    def moments(self, num_elements: int, sums: Totals) -> Moments:
        sizes, products, signs, both = np.split(sums, self.ends[:-1])
        d = len(self.differences)
        return Moments(
            num_elements, sizes, _symmetric(self.num_vectors, self.products, products),
            _symmetric(d, self.pairs, signs), _symmetric(d, self.pairs, both),
        )  # fmt: skip


class _Window:
    """Memory for ``size`` elements of a tensor in every checkpoint, and the operations on them, in their order.

    They are listed once, with all the views that they need: a model has ten thousand windows, and making a view takes
    as long as a thousand elements.
    """

    def __init__(self, plan: _Plan, infos: Sequence[TensorInfo | None], size: int) -> None:
        self.size, width, n = size, _round_up(size), plan.num_stored
        # Zeros behind the last element, into which nothing is read, add nothing.
        self._stored = [
            None if info is None else (info.itemsize, np.zeros(width * info.itemsize, np.uint8)) for info in infos
        ]
        self._program: list[tuple[Callable[..., object], tuple[object, ...]]] = []
        self._sums = np.zeros((plan.ends[-1], width // _CHUNK), np.float32)
        rows_of_kinds = np.split(self._sums, plan.ends[:-1])
        self._rows = dict(zip(["size", "product", "sign", "both"], rows_of_kinds, strict=True))
        *rows, self._scratch = vectors(n + 1, width)
        self._ones = np.ones(_CHUNK, np.float32)
        self._widen(infos, rows)
        values = dict(enumerate(rows))
        if plan.num_vectors > n:
            self._multiply(plan, [pair for pair in plan.products if pair[1] < n], values)
            self._measure(range(n), values)
            for i in range(1, n):  # the tensors themselves aren't needed any more
                self._add(np.subtract, rows[i], rows[0], rows[i])
                values[n + i - 1] = rows[i]
        self._multiply(plan, [(i, j) for i, j in plan.products if i in plan.differences], values)
        self._measure(plan.differences, values)
        if plan.pairs:
            self._compare_signs(plan, [values[i] for i in plan.differences])

    def stored(self, readers: Sequence[TensorReader]) -> Iterator[tuple[TensorReader, int, memoryview]]:
        """What is to be filled before the sums are taken: reader, bytes per element, memory."""
        for reader, own in zip(readers, self._stored, strict=True):
            if own is not None:
                itemsize, memory = own
                yield reader, itemsize, memory[: self.size * itemsize].data

    def sums(self) -> Values:
        """The plan's sums, [sums, chunks]; the next call overwrites them."""
        for function, arguments in self._program:
            function(*arguments)
        return self._sums

    def _add(self, function: Callable[..., object], *arguments: object) -> None:
        self._program.append((function, arguments))

    def _widen(self, infos: Sequence[TensorInfo | None], rows: Sequence[Values]) -> None:
        # The order of elements means nothing if it is the same in all; bfloat16 widens fastest in another one.
        in_pairs = all(info is None or info.code == "BF16" for info in infos)
        for info, own, row in zip(infos, self._stored, rows, strict=True):
            if info is None or own is None:
                self._add(row.fill, 0.0)
            elif in_pairs:
                self._add(split_bfloat16, own[1].view(np.uint32), row)
            else:
                self._add(_fill, own[1], info.code, row)

    def _multiply(self, plan: _Plan, pairs: Sequence[tuple[int, int]], values: Mapping[int, Values]) -> None:
        for i, j in pairs:
            row = self._rows["product"][plan.products.index((i, j))]
            self._add(np.vecdot, _chunks(values[i]), _chunks(values[j]), row)

    def _measure(self, numbers: Sequence[int], values: Mapping[int, Values]) -> None:
        for i in numbers:
            self._add(np.abs, values[i], self._scratch)
            self._add(np.vecdot, _chunks(self._scratch), self._ones, self._rows["size"][i])

    def _compare_signs(self, plan: _Plan, differences: Sequence[Values]) -> None:
        """Products of signs, and of their sizes: 1 for elements that are zero in neither, of which they are counts."""
        for kind, function in (("sign", np.sign), ("both", np.abs)):
            for values in differences:
                self._add(function, values, values)
            for (i, j), row in zip(plan.pairs, self._rows[kind], strict=True):
                self._add(np.vecdot, _chunks(differences[i]), _chunks(differences[j]), row)


def _chunks(vector: Values) -> Values:
    return vector.reshape(-1, _CHUNK)


def _fill(memory: Stored, code: str, vector: Values) -> None:
    """Widen stored elements into a vector."""
    if code == "BF16":
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


def mean_of_defined(values: Iterable[float]) -> float:
    """Return the mean of the values that aren't NaN; NaN if there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _round_up(size: int) -> int:
    return -(-size // _CHUNK) * _CHUNK
