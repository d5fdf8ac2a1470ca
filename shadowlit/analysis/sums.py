"""One pass over several checkpoints, in constant memory: the sums from which every measure of similarity follows.

Tensors are cut into windows that stay in a core's cache, whatever their shape; a large tensor keeps all threads busy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from shadowlit.errors import CheckpointError
from shadowlit.graft.checkpoint import CheckpointReader
from shadowlit.graft.streaming import ordered

_THREADS = min(4, os.cpu_count() or 1)
_TASK_ELEMENTS = 2**23  # of a tensor, per task of a thread
_WINDOW_ELEMENTS = 2**19  # of all vectors of a window together, in float32: a usual L2 cache
# Operations shorter than the time that a thread takes to wake up would leave one of two threads waiting for the GIL.
_WINDOWS_PER_READ = 8
_CHUNK = 1024  # products are added in float32 over so many elements, and in float64 from there on


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
        products: [v, v], ``⟨x, y⟩`` of every two vectors.
        signs: [d, d], number of equal minus number of opposite signs of every two differences; zero if there is one.
        both: [d, d], number of elements that are zero in neither.
    """

    num_elements: int
    sizes: Tensor
    products: Tensor
    signs: Tensor
    both: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def weights(self, b: int) -> Sums:
        """The first checkpoint's tensor and that of checkpoint ``b``."""
        return self._sums(0, b, offset=(len(self.sizes) - 1) // 2 + b)

    def differences(self, a: int, b: int) -> Sums:
        """Two differences: deltas by their number, or offsets, of which the first is number 0."""
        first = len(self.sizes) - len(self.signs)
        both = self.both[a, b].item()
        return self._sums(
            first + a, first + b, num_both=both, num_same_sign=(both + self.signs[a, b].item()) / 2
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
    with (
        _kept_number_of_threads(),
        ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        parts = ordered(pool, lambda task: _task(readers, *task, deltas), tasks)
        whole: Moments | None = None
        for (name, _, stop), part in zip(tasks, parts, strict=True):
            whole = part if whole is None else whole + part
            advance(part.num_elements)
            if stop == sizes[name]:
                if not torch.isfinite(whole.products).all():
                    found = [str(r.folder) for i, r in enumerate(readers) if not math.isfinite(whole.products[i, i])]
                    raise CheckpointError(
                        f"tensor '{name}' of {' and '.join(found)} holds NaN or infinities. Check the run that made it."
                    )
                yield name, whole
                whole = None


@torch.inference_mode()
def _task(readers: Sequence[CheckpointReader], name: str, start: int, stop: int, deltas: bool) -> Moments:
    """The moments of elements ``start`` to ``stop`` of a tensor."""
    count = len(readers) if deltas else 2 * len(readers) - 1
    num_differences = len(readers) - (0 if deltas else 1)
    step = _round_up(_WINDOW_ELEMENTS // (count + 1)) * _WINDOWS_PER_READ
    parts: list[list[Tensor]] = []
    block = None
    for first in range(start, stop, step):
        size = min(step, stop - first)
        if block is None or block.size != size:
            block = _Block(readers, name, size, count, deltas)
        parts += block.sums(first)
    totals = [_total(found) for found in zip(*parts, strict=True)]
    shapes = ((count,), (count, count), (num_differences, num_differences), (num_differences, num_differences))
    missing = [torch.zeros(shape, dtype=torch.float64) for shape in shapes[len(totals) :]]
    return Moments(stop - start, *totals, *missing)


class _Block:
    """Memory for ``size`` elements of a tensor in every checkpoint, read at once and worked on window by window.

    All views are made once: a model has ten thousand windows, and a view takes as long as a thousand elements.
    """

    def __init__(self, readers: Sequence[CheckpointReader], name: str, size: int, count: int, deltas: bool) -> None:
        self.size, self._name = size, name
        self._reads: list[tuple[CheckpointReader, memoryview, int]] = []
        step = min(_round_up(_WINDOW_ELEMENTS // (count + 1)), _round_up(size))
        vectors = torch.zeros(count, step)
        casts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(0, size, step)]
        row = 0
        # Neighbours of one dtype share their memory, so that one operation converts them all.
        for dtype, members in groupby(readers, lambda r: r.tensors[name].dtype if name in r.tensors else None):
            group = list(members)
            rows = vectors[row : row + len(group)]
            row += len(group)
            if dtype is None:
                continue  # zeros, and they stay
            stored = torch.zeros(len(group), _round_up(size), dtype=dtype)
            for reader, own in zip(group, stored, strict=True):
                self._reads.append((reader, own[:size].view(torch.uint8).numpy().data, dtype.itemsize))
            for window, part in zip(casts, stored.split(step, dim=1), strict=True):
                window.append((rows[:, : part.shape[1]], part))
        widths = [min(step, _round_up(size) - first) for first in range(0, size, step)]
        # One memory for all: a fresh one per window would leave the heap full of holes.
        signs = torch.zeros(len(readers) - (0 if deltas else 1), step)
        self._windows = [
            _Window(vectors[:, :width], signs[:, :width], window, len(readers), deltas)
            for width, window in zip(widths, casts, strict=True)
        ]

    def sums(self, start: int) -> list[list[Tensor]]:
        """The sums of every window of the block that begins at element ``start``."""
        for reader, memory, itemsize in self._reads:
            reader.read_into(memory, self._name, start * itemsize)
        return [window.sums() for window in self._windows]


class _Window:
    """Vectors [v, n] in the cache; ``casts`` (target, source) fill the first of them, ``signs`` [d, n] is scratch."""

    def __init__(
        self,
        vectors: Tensor,
        signs: Tensor,
        casts: Sequence[tuple[Tensor, Tensor]],
        num_stored: int,
        deltas: bool,
    ) -> None:
        self._vectors, self._chunks, self._casts = vectors, _chunks(vectors), casts
        self._first, self._others, self._offsets = vectors[0], vectors[1:num_stored], vectors[num_stored:]
        self._differences = vectors[:num_stored] if deltas else self._offsets
        self._signs, self._sign_chunks, self._deltas = signs, _chunks(signs), deltas

    def sums(self) -> list[Tensor]:
        """In the order of the attributes of :class:`Moments`; those of the signs only of several differences."""
        for target, source in self._casts:
            target.copy_(source)
        if not self._deltas:
            torch.sub(self._others, self._first, out=self._offsets)
        products = _products(self._chunks)
        if len(self._differences) == 1:
            return [self._vectors.abs_().sum(1), products]
        torch.sign(self._differences, out=self._signs)
        sums = [self._vectors.abs_().sum(1), products, _products(self._sign_chunks)]
        self._signs.abs_()
        return [*sums, _products(self._sign_chunks)]


def _chunks(vectors: Tensor) -> Tensor:
    """[v, n] as [n / chunk, v, chunk]."""
    return vectors.unflatten(1, (-1, _CHUNK)).transpose(0, 1)


def _products(chunks: Tensor) -> Tensor:
    """``⟨x, y⟩`` of every two vectors, [c, v, chunk], in every chunk: [c, v, v], float32."""
    return torch.bmm(chunks, chunks.mT)


def _total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of a task's parts in float64: [v] of each window, or [c, v, v] of its chunks."""
    if parts[0].ndim == 1:
        return torch.stack(list(parts)).sum(0, dtype=torch.float64)
    return torch.cat(list(parts)).sum(0, dtype=torch.float64)


def _round_up(size: int) -> int:
    return -(-size // _CHUNK) * _CHUNK


@contextmanager
def _kept_number_of_threads() -> Iterator[None]:
    """Put torch's number of threads back.

    The windows are what the threads share; an operation that forks more of them only waits. torch keeps the number both
    for the process and, in MKL, for each thread, so that every thread has to set it.
    """
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
