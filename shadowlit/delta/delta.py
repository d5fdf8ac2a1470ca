"""The update as an object: read lazily, added, scaled and compared a few rows at a time, stored on its own.

A delta that is stored as a delta loses next to nothing in bfloat16 (its own relative precision is 2⁻⁹), where the
tuned weights, rounded to bfloat16, lose most of a small one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shadowlit.checkpoint.folder import DELTA_FILE, CheckpointReader, CheckpointWriter, Streamed, atomic_folder
from shadowlit.checkpoint.headers import TensorInfo, dtype_code, some_of
from shadowlit.checkpoint.streaming import THREADS, ordered, row_windows
from shadowlit.delta.spectrum import effective_rank
from shadowlit.delta.transforms import ties
from shadowlit.errors import GraftError
from shadowlit.grafting.arithmetic import widen
from shadowlit.grafting.disk import linear_on_disk
from shadowlit.grafting.manifest import MANIFEST_FILE, describe_source, plain, read_manifest, versions, write_json
from shadowlit.grafting.selection import resolve
from shadowlit.grafting.update import Update, by_tensor, open_update
from shadowlit.pair.folders import model_folder

SINGLE_FILE = DELTA_FILE
STEM = SINGLE_FILE.removesuffix(".safetensors")

Rows = Callable[[str, int, int], Tensor]


class Delta(Update):
    """An update, by tensor names; nothing is read or computed before its rows are asked for.

    Sums and multiples are deltas again. A tensor that one summand lacks counts as an update of zero.

    Example::

        delta = Delta.make("Qwen/Qwen3-0.6B-Base", "runs/my-tuned-base")
        (0.5 * delta).save(Path("half-a-delta"))
        print(delta.norm(), delta.cosine(Delta.open("another-delta")))

    Args:
        shapes: the shape of every tensor.
        rows: gives rows ``start`` to ``stop`` of a tensor in float32.
        manifest: where it comes from.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], rows: Rows, manifest: Mapping[str, Any] | None = None
    ) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = dict(shapes)
        self.manifest: dict[str, Any] = dict(manifest or {})
        self._rows = rows

    @classmethod
    def open(cls, folder: str | Path) -> Delta:
        """The delta stored in a folder by :meth:`save`; its files stay open as long as the object lives.

        Raises:
            CheckpointError: there is none, or its files are broken.
            ExportError: its manifest is missing or broken.
        """
        reader = CheckpointReader(folder, single_file=SINGLE_FILE)

        shapes = {name: info.shape for name, info in reader.tensors.items()}
        return cls(shapes, _as_tensors(reader.rows), read_manifest(Path(folder)))

    @classmethod
    def make(cls, base: str | Path, tuned: str | Path, select: str | list[str] = "all") -> Delta:
        """Return the update ``tuned - base`` of two models; their files stay open as long as the object lives.

        Args:
            base: Folder or hub id of the model that the tuning started from.
            tuned: Folder or hub id of the tuned one: a whole model, or a LoRA or rsLoRA adapter in peft's form.
            select: ``all``, ``linear`` (every linear layer but the output head), or regular expressions for tensor
                names.

        Raises:
            CheckpointError: A checkpoint is missing or broken.
            GraftError: The two don't have the same tensors, or the selection matches none.
        """
        folder = model_folder("base", str(base))
        reader = CheckpointReader(folder)
        update = open_update(reader, model_folder("tuned", str(tuned)))
        manifest = {
            "base": describe_source(str(base), folder, reader.fingerprint()),
            "tuned": {"id": str(tuned)},
            "select": select,
            "history": [],
            "versions": versions(),
        }
        chosen = resolve(select, update.shapes, linear_on_disk(reader.tensors), "of the update")
        return cls(update.shapes, _as_tensors(update.rows), manifest).only(chosen)

    @classmethod
    def from_update(cls, update: Update) -> Delta:
        """What a tuned checkpoint has learned; see :func:`shadowlit.grafting.update.open_update`."""
        return cls(update.shapes, _as_tensors(update.rows))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Delta:
        """A delta of tensors in memory."""

        def rows(name: str, start: int, stop: int) -> Tensor:
            return widen(tensors[name][start:stop] if tensors[name].ndim else tensors[name])

        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()}, rows)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in float32; a scalar has one row."""
        return self._rows(name, start, stop)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in float32.

        Raises:
            GraftError: there is none of this name.
        """
        if name not in self.shapes:
            raise GraftError(f"the delta has no tensor {name!r}; it has {some_of(self.shapes)}. Check the name.")
        return self._rows(name, 0, self.shapes[name][0] if self.shapes[name] else 1)

    def __add__(self, other: Delta) -> Delta:
        return weighted_sum([self, other], [1.0, 1.0])

    def __sub__(self, other: Delta) -> Delta:
        return weighted_sum([self, other], [1.0, -1.0])

    def __mul__(self, scale: float) -> Delta:
        return weighted_sum([self], [scale])

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        return self * -1.0

    def only(self, names: Iterable[str]) -> Delta:
        """The part of the delta on these tensors."""
        kept = frozenset(names)
        return Delta({n: shape for n, shape in self.shapes.items() if n in kept}, self._rows, self.manifest)

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Delta:
        """Apply a function to every whole tensor, one at a time, when its rows are first needed.

        Args:
            function: from name and tensor to a tensor of the same shape; called again only if the same tensor is
                asked for after two others.
        """
        return Delta(self.shapes, by_tensor(lambda name: function(name, self.tensor(name))), self.manifest)

    @property
    def num_elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def norm(self) -> float:
        """The Euclidean norm over all tensors."""
        return math.sqrt(sum(tensor.square for tensor in self.statistics()))

    def sparsity(self) -> float:
        """The share of elements that are zero."""
        return sum(tensor.num_zeros for tensor in self.statistics()) / max(1, self.num_elements)

    def effective_rank(self, name: str) -> float:
        """``exp(H)`` of the normalised singular values of a matrix (Roy and Vetterli, 2007); all of it is in memory."""
        return effective_rank(self.tensor(name))

    def cosine(self, other: Delta) -> float:
        """``⟨a, b⟩ / (‖a‖ ‖b‖)`` over all tensors."""
        return overlap(self, other).cosine

    def sign_agreement(self, other: Delta) -> float:
        """The share of equal signs among the elements that are not zero in either."""
        return overlap(self, other).sign_agreement

    def statistics(self, advance: Callable[[int], None] = lambda _: None) -> list[TensorStatistics]:
        """Size and sparsity of every tensor, streamed; ``advance`` is told the elements that are done."""
        found: dict[str, Tensor] = {name: torch.zeros(3, dtype=torch.float64) for name in self.shapes}

        def one(window: tuple[str, int, int]) -> tuple[str, Tensor, int]:
            part = self._rows(*window)
            peak = part.abs().max() if part.numel() else part.new_zeros(())
            zeros = part.numel() - int(torch.count_nonzero(part))
            return window[0], torch.stack([_square(part), peak.double(), torch.tensor(float(zeros))]), part.numel()

        with ThreadPoolExecutor(THREADS) as pool:
            for name, sums, count in ordered(pool, one, windows(self.shapes)):
                peak = torch.maximum(found[name][1], sums[1])
                found[name] += sums
                found[name][1] = peak
                advance(count)
        return [
            TensorStatistics(name, self.shapes[name], float(sums[0]), float(sums[1]), int(sums[2]))
            for name, sums in found.items()
        ]

    @torch.no_grad()
    def save(
        self,
        folder: Path,
        dtype: torch.dtype = torch.bfloat16,
        manifest: Mapping[str, Any] | None = None,
        max_shard_bytes: int = 5_000_000_000,
        advance: Callable[[int], None] = lambda _: None,
    ) -> float:
        """Write the delta to a folder that appears complete or not at all.

        Args:
            folder: the folder to make; must not exist, or be empty.
            dtype: that the delta is stored in.
            manifest: replaces this delta's own.
            max_shard_bytes: the largest number of data bytes per file.
            advance: called with the number of elements of every part.

        Returns:
            What storing it in ``dtype`` lost: ``‖stored − delta‖ / ‖delta‖``.

        Raises:
            ExportError: the folder is taken or can't be written.
            CheckpointError: a value is NaN or infinite.
        """
        code = dtype_code(dtype)
        assert code is not None
        squares = torch.zeros(2, dtype=torch.float64)

        def one(window: tuple[str, int, int]) -> tuple[Tensor, Tensor]:
            exact = self._rows(*window)
            stored = exact.to(dtype)
            return stored, torch.stack([_square(exact), _square(stored.to(exact.dtype) - exact)])

        def parts(pool: ThreadPoolExecutor, name: str, info: TensorInfo) -> Iterator[Tensor]:
            for stored, sums in ordered(pool, one, ((name, *window) for window in row_windows(info))):
                squares.add_(sums)
                advance(stored.numel())
                yield stored

        with atomic_folder(folder) as partial, ThreadPoolExecutor(THREADS) as pool:
            with CheckpointWriter(partial, max_shard_bytes, stem=STEM) as writer:
                for name, shape in self.shapes.items():
                    writer.add(name, Streamed(code, shape, parts(pool, name, TensorInfo(name, code, shape, ""))))
            lost = math.sqrt(float(squares[1] / squares[0])) if squares[0] else 0.0
            told = {**plain(manifest if manifest is not None else self.manifest), "kind": STEM, "stored_error": lost}
            write_json(partial / MANIFEST_FILE, told)
        return lost


def write_delta(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.bfloat16,
    manifest: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write an update that comes whole tensor by whole tensor, in the form that :meth:`Delta.open` reads.

    Args:
        folder: the folder to make; must not exist, or be empty. It appears complete or not at all.
        tensors: names and updates, float32, on the CPU.
        dtype: that the delta is stored in.
        manifest: where it comes from.
        max_shard_bytes: the largest number of data bytes per file.

    Raises:
        ExportError: the folder is taken or can't be written.
        CheckpointError: a value is NaN or infinite.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    with atomic_folder(folder) as partial:
        with CheckpointWriter(partial, max_shard_bytes, stem=STEM) as writer:
            for name, exact in tensors:
                stored = exact.to(dtype)
                squares += torch.stack([_square(exact), _square(stored.float() - exact)])
                writer.add(name, stored)
        lost = math.sqrt(float(squares[1] / squares[0])) if squares[0] else 0.0
        write_json(partial / MANIFEST_FILE, {**plain(manifest or {}), "kind": STEM, "stored_error": lost})
    return folder


@dataclass(frozen=True)
class TensorStatistics:
    """Size of one tensor of a delta.

    Attributes:
        name: the tensor's name.
        shape: its shape.
        square: its squared Euclidean norm.
        peak: its largest magnitude.
        num_zeros: elements that are zero.
    """

    name: str
    shape: tuple[int, ...]
    square: float
    peak: float
    num_zeros: int


@dataclass(frozen=True)
class Overlap:
    """How two updates meet.

    Attributes:
        cosine: ``⟨a, b⟩ / (‖a‖ ‖b‖)``; NaN if one is zero.
        sign_agreement: share of equal signs among the elements that neither leaves at zero; NaN if there are none.
        shared: share of the elements that neither leaves at zero.
        norms: ``‖a‖`` and ``‖b‖``.
    """

    cosine: float
    sign_agreement: float
    shared: float
    norms: tuple[float, float]


def overlap(a: Delta, b: Delta, advance: Callable[[int], None] = lambda _: None) -> Overlap:
    """Compare two deltas of one architecture, streamed; a tensor that one lacks is zero there.

    Raises:
        GraftError: a tensor has another shape in the other delta.
    """
    shapes = _union([a, b])

    def one(window: tuple[str, int, int]) -> Tensor:
        left, right = _rows_or_zeros(a, window), _rows_or_zeros(b, window)
        if left is None or right is None:
            only = right if left is None else left
            assert only is not None
            square = _square(only)
            zero = square.new_zeros(())
            return torch.stack([zero, zero if left is None else square, zero if right is None else square, zero, zero])
        product = left.flatten() * right.flatten()
        both = torch.count_nonzero((left != 0) & (right != 0)).double()
        same = torch.count_nonzero((left.sign() == right.sign()) & (left != 0)).double()
        return torch.stack([product.sum(dtype=torch.float64), _square(left), _square(right), both, same])

    total = torch.zeros(5, dtype=torch.float64)
    with ThreadPoolExecutor(THREADS) as pool:
        for window, sums in zip(windows(shapes), ordered(pool, one, windows(shapes)), strict=True):
            total += sums
            advance((window[2] - window[1]) * math.prod(shapes[window[0]][1:]))
    dot, square_a, square_b, both, same = total.tolist()
    size = max(1, sum(math.prod(shape) for shape in shapes.values()))
    return Overlap(
        cosine=dot / math.sqrt(square_a * square_b) if square_a and square_b else math.nan,
        sign_agreement=same / both if both else math.nan,
        shared=both / size,
        norms=(math.sqrt(square_a), math.sqrt(square_b)),
    )


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """``Σ w_k Δ_k``: task arithmetic, arXiv 2212.04089.

    Args:
        deltas: at least one; a tensor that one lacks counts as zero there.
        weights: one for each.

    Raises:
        GraftError: no deltas, another number of weights, or unequal shapes under one name.
    """
    _require_weights(deltas, weights)
    shapes = _union(deltas)

    def rows(name: str, start: int, stop: int) -> Tensor:
        parts = [
            weight * d.rows(name, start, stop) for d, weight in zip(deltas, weights, strict=True) if name in d.shapes
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    return Delta(shapes, rows, deltas[0].manifest if len(deltas) == 1 else {})


def ties_sum(deltas: Sequence[Delta], density: float, weights: Sequence[float]) -> Delta:
    """Merge deltas of one Base by TIES, tensor by tensor; see :func:`shadowlit.delta.transforms.ties`.

    A delta that lacks a tensor has no say there.

    Args:
        deltas: at least one.
        density: share of elements of each that is kept, in (0, 1].
        weights: one for each, positive.

    Raises:
        GraftError: no deltas, another number of weights, or unequal shapes under one name.
    """
    _require_weights(deltas, weights)
    shapes = _union(deltas)

    def whole(name: str) -> Tensor:
        present = [(d.tensor(name), w) for d, w in zip(deltas, weights, strict=True) if name in d.shapes]
        return ties([tensor for tensor, _ in present], density, [weight for _, weight in present])

    return Delta(shapes, by_tensor(whole))


def windows(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    """Name, first row and end of every part of tensors of these shapes."""
    for name, shape in shapes.items():
        for start, stop in row_windows(TensorInfo(name, "F32", shape, "")):
            yield name, start, stop


def _require_weights(deltas: Sequence[Delta], weights: Sequence[float]) -> None:
    if not deltas or len(deltas) != len(weights):
        raise GraftError(f"{len(deltas)} deltas and {len(weights)} weights were given; expected one weight for each.")


def _union(deltas: Sequence[Delta]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for found in deltas:
        unequal = [n for n, shape in found.shapes.items() if shapes.get(n, shape) != shape]
        if unequal:
            told = [f"{name} {shapes[name]} and {found.shapes[name]}" for name in unequal]
            raise GraftError(f"deltas differ in the shapes of {some_of(told)}. Combine deltas of one architecture.")
        shapes.update(found.shapes)
    return shapes


def _rows_or_zeros(found: Delta, window: tuple[str, int, int]) -> Tensor | None:
    return found.rows(*window) if window[0] in found.shapes else None


def _as_tensors(rows: Callable[[str, int, int], Any]) -> Rows:
    return lambda name, start, stop: torch.from_numpy(rows(name, start, stop))


def _square(tensor: Tensor) -> Tensor:
    return tensor.square().sum(dtype=torch.float64)
