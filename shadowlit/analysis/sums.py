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

import torch
from torch import Tensor

from shadowlit.errors import CheckpointError
from shadowlit.graft.checkpoint import CheckpointReader
from shadowlit.graft.streaming import ordered

_THREADS = min(4, os.cpu_count() or 1)
_TASK_ELEMENTS = 2**23  # of a tensor, per task of a thread
_WINDOW_ELEMENTS = 2**18  # of all vectors of a window together, in float32: half of a usual L2 cache
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
    step = _round_up(_WINDOW_ELEMENTS // (count + 1))
    parts = []
    window = None
    for first in range(start, stop, step):
        size = min(step, stop - first)
        if window is None or window.size != size:
            window = _Window(readers, name, size, count, deltas)
        parts.append(window.sums(first))
    totals = [torch.stack(found).sum(0, dtype=torch.float64) for found in zip(*parts, strict=True)]
    shapes = ((count,), (count, count), (num_differences, num_differences), (num_differences, num_differences))
    missing = [torch.zeros(shape, dtype=torch.float64) for shape in shapes[len(totals) :]]
    return Moments(stop - start, *totals, *missing)


class _Window:
    """Memory for ``size`` elements of every vector of a tensor.

    All views are made once: a model has ten thousand windows, and a view takes as long as a thousand elements.
    """

    def __init__(self, readers: Sequence[CheckpointReader], name: str, size: int, count: int, deltas: bool) -> None:
        self.size, self._name = size, name
        vectors = torch.zeros(count, _round_up(size))
        self._stored, self._offsets = vectors[: len(readers)], vectors[len(readers) :]
        differences = self._stored if deltas else self._offsets
        self._differences = differences if len(differences) > 1 else None
        self._vectors, self._chunks = vectors, _chunks(vectors)
        self._reads: list[tuple[CheckpointReader, memoryview, int]] = []
        self._casts: list[tuple[Tensor, Tensor]] = []
        for reader, vector in zip(readers, vectors[:, :size], strict=False):
            if name not in reader.tensors:
                continue  # zeros, and they stay
            info = reader.tensors[name]
            source = vector if info.dtype == torch.float32 else torch.empty(size, dtype=info.dtype)
            self._reads.append((reader, source.view(torch.uint8).numpy().data, info.itemsize))
            if source is not vector:
                self._casts.append((vector, source))

    def sums(self, start: int) -> list[Tensor]:
        """The sums over ``size`` elements from ``start``, in the order of the attributes of :class:`Moments`.

        Those of the signs only where there are several differences.
        """
        for reader, memory, itemsize in self._reads:
            reader.read_into(memory, self._name, start * itemsize)
        for target, source in self._casts:
            target.copy_(source)
        if len(self._offsets):
            torch.sub(self._stored[1:], self._stored[0], out=self._offsets)
        products = _products(self._chunks)
        signs = None if self._differences is None else self._differences.sign()
        sums = [self._vectors.abs_().sum(1), products]
        if signs is None:
            return sums
        return [*sums, _products(_chunks(signs)), _products(_chunks(signs.abs_()))]


def _chunks(vectors: Tensor) -> Tensor:
    """[v, n] as [n / chunk, v, chunk]."""
    return vectors.unflatten(1, (-1, _CHUNK)).transpose(0, 1)


def _products(chunks: Tensor) -> Tensor:
    """``⟨x, y⟩`` of every two vectors, [c, v, chunk], in float64 over chunks that are added in float32."""
    return torch.bmm(chunks, chunks.mT).sum(0, dtype=torch.float64)


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
