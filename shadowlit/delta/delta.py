"""The update as an object: read lazily, added, scaled and compared a few rows at a time, stored on its own.

A delta that is stored as a delta loses next to nothing in bfloat16 (its own relative precision is 2⁻⁹), where the
tuned weights, rounded to bfloat16, lose most of a small one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shadowlit.checkpoint.factored import FactoredReader, open_stored_delta
from shadowlit.checkpoint.folder import (
    DELTA_FILE,
    CheckpointWriter,
    Streamed,
    atomic_folder,
    check_finite,
    is_finite,
)
from shadowlit.checkpoint.headers import TensorInfo, dtype_code, some_of
from shadowlit.checkpoint.layout import head_and_embedding
from shadowlit.checkpoint.names import count_layers, in_totals, stored_factors
from shadowlit.checkpoint.reader import keeping, rows_of
from shadowlit.checkpoint.streaming import THREADS, ordered, row_windows
from shadowlit.delta.spectrum import effective_rank, singular_values
from shadowlit.delta.transforms import Transforms, ties
from shadowlit.errors import GraftError
from shadowlit.grafting.arithmetic import widen
from shadowlit.grafting.disk import linear_on_disk
from shadowlit.grafting.factors import Factors, joined
from shadowlit.grafting.manifest import MANIFEST_FILE, describe_source, plain, read_manifest, versions, write_json
from shadowlit.grafting.selection import resolve
from shadowlit.grafting.tuned import open_update
from shadowlit.grafting.update import Update
from shadowlit.pair.buffers import open_model
from shadowlit.pair.folders import model_folder
from shadowlit.pair.side import stated_sides
from shadowlit.pair.weights import require_one_architecture

STEM = DELTA_FILE.removesuffix(".safetensors")

Rows = Callable[[str, int, int], Tensor]
_Out = TypeVar("_Out")


class Delta(Update):
    """An update, by tensor names; nothing is read or computed before its rows are asked for.

    Sums and multiples are deltas again. A tensor that one summand lacks counts as an update of zero.

    Example::

        delta = Delta.make("Qwen/Qwen3-0.6B-Base", "runs/my-tuned-base")
        (0.5 * delta).save(Path("half-a-delta"))
        print(delta.norm(), delta.cosine(Delta.open("another-delta")))

    Args:
        shapes: Shape of every tensor.
        rows: Function that returns rows ``start`` to ``stop`` of a tensor in float32; a scalar has one row.
        manifest: Where the update comes from.
        source: Update that it is made of, by which weights are checked and changed tensors found.
        factored: Matrices that are products of two small ones, by functions that return these; their sizes, angles and
            spectra are computed without the products, and they are stored as factors where that is smaller.
    """

    left_out: Delta | None = None  # what a selection has left out of the update that it was made of

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        rows: Rows,
        manifest: Mapping[str, Any] | None = None,
        source: Update | None = None,
        factored: Mapping[str, Callable[[], Factors]] | None = None,
    ) -> None:
        self.tied = bool((manifest or {}).get("tied", head_and_embedding(shapes)[0] is None))
        if source is not None:
            self.require_weights = source.require_weights  # type: ignore[method-assign]
            self.changes = source.changes  # type: ignore[method-assign]  # a transform may fail outside the selection
            self.require_finite_base = source.require_finite_base  # type: ignore[method-assign]
            self.learned_rows = source.learned_rows  # type: ignore[method-assign]
            self.fingerprint = source.fingerprint  # type: ignore[method-assign]
            self.without, self.tied, self.transformed = source.without, source.tied, True
            self.transforms = source.transforms
        self.shapes: Mapping[str, tuple[int, ...]] = dict(shapes)
        self.manifest: dict[str, Any] = dict(manifest or {})
        self._rows = rows
        self._factored = {name: read for name, read in (factored or {}).items() if name in self.shapes}

    @property
    def factored(self) -> Mapping[str, Callable[[], Factors]]:
        """See :class:`shadowlit.grafting.update.Update`."""
        return self._factored

    @classmethod
    def open(cls, folder: str | Path) -> Delta:
        """Open the delta stored in a folder by :meth:`save`; its files stay open as long as the object lives.

        Raises:
            CheckpointError: There is none, or its files are broken.
            ExportError: Its manifest is missing or broken.
        """
        reader = open_stored_delta(folder)
        shapes = {name: info.shape for name, info in reader.tensors.items()}
        factored = (
            {name: partial(_read_factors, reader, name) for name in reader.factored}
            if isinstance(reader, FactoredReader)
            else {}
        )
        return cls(shapes, _as_tensors(reader.rows), read_manifest(Path(folder)), factored=factored)

    @classmethod
    def make(
        cls, base: str | Path, tuned: str | Path, select: str | list[str] = "all", allow_pickle: bool = False
    ) -> Delta:
        """Return the update ``tuned - base`` of two models; their files stay open as long as the object lives.

        Args:
            base: Folder or hub id of the model that the tuning started from.
            tuned: Folder or hub id of the tuned one: a whole model, or a LoRA or rsLoRA adapter in peft's form.
            select: ``all``, ``linear`` (every linear layer except the output head), or regular expressions.
            allow_pickle: Also read ``pytorch_model.bin`` and ``adapter_model.bin`` in local folders, as tensors alone.

        Raises:
            CheckpointError: A checkpoint is missing or broken.
            GraftError: The two don't have the same tensors, or the selection matches none.
        """
        folder, tuned_folder = model_folder("base", str(base)), model_folder("tuned", str(tuned))
        sides = stated_sides(("base", folder), ("tuned model", tuned_folder))
        require_one_architecture(*sides)
        reader = open_model(folder, allow_pickle)
        learned = reader.learned()
        update = open_update(learned, tuned_folder, allow_pickle, strict=False)
        manifest = {
            "base": describe_source(str(base), folder, reader.fingerprint()),
            "tuned": {"id": str(tuned)},
            "select": select,
            "history": [],
            "versions": versions(),
            "model_type": stated_sides(("base", folder))[0].get("model_type"),
            "layers": count_layers(learned.tensors),
            "tied": update.tied,
        }
        names = [*update.weights, *update.without]
        chosen = resolve(select, names, linear_on_disk(learned.tensors), "of the update")
        update.require_weights(sorted(chosen))
        whole = cls(update.shapes, _as_tensors(update.rows), manifest, factored=update.factored)
        made, rest = whole.only(chosen), update.weights - chosen
        made.require_finite_base = update.require_finite_base  # type: ignore[method-assign]
        made.without, made.left_out = update.without, whole.only(rest) if rest else None
        return made

    @classmethod
    def from_update(cls, update: Update) -> Delta:
        """Return the update of a tuned checkpoint; see :func:`shadowlit.grafting.tuned.open_update`."""
        shapes = {name: shape for name, shape in update.shapes.items() if name in update.weights}
        return cls(shapes, _as_tensors(update.rows), source=update, factored=update.factored)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Delta:
        """Return a delta of tensors in memory."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        rows = rows_of(tensors.__getitem__)
        return cls(shapes, lambda *window: widen(rows(*window)))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows ``start`` to ``stop`` of a tensor, in float32; a scalar has one row."""
        return self._rows(name, start, stop)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, in float32.

        Raises:
            GraftError: There is none of this name.
            CheckpointError: A value is NaN or infinite.
        """
        if name not in self.shapes:
            raise GraftError(f"the delta has no tensor {name!r}; it has {some_of(self.shapes)}. Check the name.")
        window = (name, 0, self.shapes[name][0] if self.shapes[name] else 1)
        whole = self.rows(*window)
        if not is_finite(whole):
            self.require_finite_base(*window)
        check_finite(name, whole)
        return whole

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
        """Return the part of the delta on these tensors."""
        kept = frozenset(names)
        shapes = {n: shape for n, shape in self.shapes.items() if n in kept}
        return Delta(shapes, self._rows, self.manifest, factored=self.factored)

    def _with_head(self, head: str, embedding: str) -> Delta:
        """The delta of a tied model with its output head too, which is its embedding."""
        shapes = {**self.shapes, head: self.shapes[embedding]}
        return Delta(
            shapes,
            lambda name, *window: self._rows(embedding if name == head else name, *window),
            {**self.manifest, "tied": False},
            factored={**self.factored, **({head: self.factored[embedding]} if embedding in self.factored else {})},
        )

    def map(self, function: Callable[[str, Tensor], Tensor] | Sequence[Mapping[str, Any]]) -> Delta:
        """Apply a function, or transforms in order, to every whole tensor when its rows are first needed.

        Args:
            function: ``function(name, tensor)``, which returns a tensor of the same shape; or transforms as in
                ``graft.transforms``, e.g. ``[{"name": "svd", "rank": 8}]``. The last two results are kept.

        Raises:
            GraftError: A transform is wrong.
        """
        chosen = function if callable(function) else Transforms(function, "transforms")
        found = Delta(self.shapes, rows_of(keeping(lambda n: chosen(n, self.tensor(n)))), self.manifest, self)
        if isinstance(chosen, Transforms):
            chosen.require_without_gradients()
            found.transforms = [*self.transforms, *chosen.specs]
        return found

    @property
    def num_elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def norm(self) -> float:
        """Return the Euclidean norm over all tensors."""
        return math.sqrt(sum(self.squares().values()))

    def squares(self) -> dict[str, float]:
        """Return the squared Euclidean norm of every tensor, streamed; of factors without their product."""
        found = dict.fromkeys(self.shapes, 0.0)
        found |= {name: read().square for name, read in self.factored.items()}
        dense = {name: shape for name, shape in self.shapes.items() if name not in self.factored}
        for (name, _, _), square in _streamed(lambda window: _square(self.rows(*window)), dense):
            found[name] += float(square)
        return found

    def singular_values(self, name: str) -> Tensor:
        """Return all singular values of a matrix in descending order, float64; of factors without their product."""
        if name in self.factored:
            return self.factored[name]().singular_values()
        return singular_values(self.tensor(name)).cpu()

    def effective_rank(self, name: str) -> float:
        """``exp(H)`` of the normalised singular values of a matrix (Roy and Vetterli, 2007); all of it is in memory."""
        return effective_rank(self.singular_values(name))

    def cosine(self, other: Delta) -> float:
        """``⟨a, b⟩ / (‖a‖ ‖b‖)`` over the tensors that :func:`overlap` compares."""
        return cosine(self, other)

    def sign_agreement(self, other: Delta) -> float:
        """Return the share of equal signs among the elements that are not zero in either."""
        return overlap(self, other).sign_agreement

    def statistics(self) -> list[TensorStatistics]:
        """Return the size and zeros of every tensor, streamed."""
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in self.shapes}
        peaks = {name: torch.zeros(()) for name in self.shapes}

        def one(window: tuple[str, int, int]) -> tuple[Tensor, Tensor]:
            part = self.rows(*window)
            zeros = part.numel() - torch.count_nonzero(part)
            return torch.stack([_square(part), zeros.double()]), part.abs().max() if part.numel() else torch.zeros(())

        for (name, _, _), (found, peak) in _streamed(one, self.shapes):
            sums[name] += found
            peaks[name] = torch.maximum(peaks[name], peak)
        return [
            TensorStatistics(name, shape, float(sums[name][0]), float(peaks[name]), int(sums[name][1]))
            for name, shape in self.shapes.items()
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
        """Write the delta to a new or empty folder, atomically, with a manifest in place of its own if one is given.

        ``advance`` is called with the number of elements of every part.

        Returns:
            The relative error of storing it in ``dtype``: ``‖stored − delta‖ / ‖delta‖``.

        Raises:
            ExportError: The folder exists and is not empty, or can't be written.
            CheckpointError: A value is NaN or infinite.
        """
        code = dtype_code(dtype)
        assert code is not None

        def parts(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
            every = windows({name: shape})
            for window, (stored, sums) in ordered(pool, lambda w: (w, _stored(self.rows(*w), dtype)), every):
                if not is_finite(sums):
                    self.require_finite_base(*window)
                squares.add_(sums)
                advance(stored.numel())
                yield stored

        given = self.manifest if manifest is None else manifest
        num_bytes = self.num_elements * dtype.itemsize
        with (
            ThreadPoolExecutor(THREADS) as pool,
            _writer(folder, given, max_shard_bytes, num_bytes) as (writer, squares),
        ):
            for name, shape in self.shapes.items():
                if self.is_stored_as_factors(name, dtype):
                    squares.add_(_add_factors(writer, name, self.factored[name]()))
                    advance(math.prod(shape))
                else:
                    writer.add(name, Streamed(code, shape, parts(name, shape)))
        return _lost(squares)

    def is_stored_as_factors(self, name: str, dtype: torch.dtype = torch.bfloat16) -> bool:
        """Return whether a matrix is a product whose factors, in float32, are smaller than itself in ``dtype``."""
        return name in self.factored and _are_smaller(self.factored[name](), dtype)

    def stored(self, name: str) -> Tensor | Factors:
        """Return a tensor as :func:`write_delta` takes it: its factors, if it has any, or the whole of it."""
        return self.factored[name]() if name in self.factored else self.tensor(name)


def write_delta(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor | Factors]],
    dtype: torch.dtype = torch.bfloat16,
    manifest: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write an update that comes as whole tensors (float32, on the CPU), as :meth:`Delta.save` writes one."""
    with _writer(folder, manifest or {}, max_shard_bytes) as (writer, squares):
        for name, found in tensors:
            if isinstance(found, Factors) and _are_smaller(found, dtype):
                squares += _add_factors(writer, name, found)
                continue
            exact = found.matrix if isinstance(found, Factors) else found
            stored, sums = _stored(exact, dtype)
            squares += sums
            writer.add(name, stored)
    return folder


@contextmanager
def _writer(
    folder: Path, manifest: Mapping[str, Any], max_shard_bytes: int, num_bytes: int = 0
) -> Iterator[tuple[CheckpointWriter, Tensor]]:
    """A writer of a delta's folder, and a place for the sums of :func:`_stored` over all tensors."""
    squares = torch.zeros(2, dtype=torch.float64)
    with atomic_folder(folder, num_bytes) as partial:
        with CheckpointWriter(partial, max_shard_bytes, stem=STEM) as writer:
            yield writer, squares
        write_json(partial / MANIFEST_FILE, {**plain(manifest), "kind": STEM, "stored_error": _lost(squares)})


def _are_smaller(factors: Factors, dtype: torch.dtype) -> bool:
    return factors.num_bytes < math.prod(factors.shape) * dtype.itemsize


def _add_factors(writer: CheckpointWriter, name: str, factors: Factors) -> Tensor:
    """Write a matrix as its factors, which lose nothing in float32; its sums as those of :func:`_stored`."""
    for key, factor in zip(stored_factors(name), (factors.up, factors.down), strict=True):
        writer.add(key, factor.float().contiguous())
    return torch.tensor([factors.square, 0.0], dtype=torch.float64)


def _read_factors(reader: FactoredReader, name: str) -> Factors:
    return Factors(*map(torch.from_numpy, reader.factors(name)))


def _stored(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values as they are stored, and the squared norms of the exact ones and of the difference, ``[2]``."""
    stored = exact.to(dtype)
    return stored, torch.stack([_square(exact), _square(stored.to(exact.dtype) - exact)])


def _lost(squares: Tensor) -> float:
    return math.sqrt(float(squares[1] / squares[0])) if squares[0] else 0.0


@dataclass(frozen=True)
class TensorStatistics:
    """Squared Euclidean norm, largest magnitude and number of zeros of one tensor of a delta."""

    name: str
    shape: tuple[int, ...]
    square: float
    peak: float
    num_zeros: int


@dataclass(frozen=True)
class Overlap:
    """How two updates compare.

    Attributes:
        cosine: ``⟨a, b⟩ / (‖a‖ ‖b‖)``; NaN if one is zero.
        sign_agreement: Fraction of equal signs among the elements that are zero in neither; NaN if there are none.
        shared: Fraction of the elements that are zero in neither.
    """

    cosine: float
    sign_agreement: float
    shared: float


def overlap(a: Delta, b: Delta) -> Overlap:
    """Compare two deltas of one architecture, streamed; a tensor that one lacks is zero there.

    Over their matrices, if they have any; see :func:`shadowlit.checkpoint.names.in_totals`.
    """
    shapes = _compared(a, b)

    def one(window: tuple[str, int, int]) -> Tensor:
        rows = [found.rows(*window) if window[0] in found.shapes else None for found in (a, b)]
        left, right = (torch.zeros(()) if part is None else part for part in rows)
        both = torch.count_nonzero((left != 0) & (right != 0)).double()
        same = torch.count_nonzero((left.sign() == right.sign()) & (left != 0)).double()
        return torch.stack([(left * right).sum(dtype=torch.float64), _square(left), _square(right), both, same])

    total = torch.zeros(5, dtype=torch.float64)
    for _, sums in _streamed(one, shapes):
        total += sums
    dot, square_a, square_b, both, same = total.tolist()
    size = max(1, sum(math.prod(shape) for shape in shapes.values()))
    return Overlap(
        cosine=dot / math.sqrt(square_a * square_b) if square_a and square_b else math.nan,
        sign_agreement=same / both if both else math.nan,
        shared=both / size,
    )


def cosine(a: Delta, b: Delta) -> float:
    """Return the cosine of :func:`overlap` alone, for which no product of factors is needed; NaN if one is zero."""
    shapes = _compared(a, b)
    alone = [{n for n in shapes if n not in x.shapes or n in x.factored} for x in (a, b)]
    total = torch.zeros(3, dtype=torch.float64)
    for name in alone[0] & alone[1]:
        left, right = (x.factored[name]() if name in x.shapes else None for x in (a, b))
        squares = [0.0 if one is None else one.square for one in (left, right)]
        total += torch.tensor([left.dot(right) if left and right else 0.0, *squares], dtype=torch.float64)

    def one(window: tuple[str, int, int]) -> Tensor:
        left, right = (x.rows(*window) if window[0] in x.shapes else torch.zeros(()) for x in (a, b))
        return torch.stack([(left * right).sum(dtype=torch.float64), _square(left), _square(right)])

    dense = {name: shape for name, shape in shapes.items() if name not in alone[0] & alone[1]}
    for _, sums in _streamed(one, dense):
        total += sums
    dot, square_a, square_b = total.tolist()
    return dot / math.sqrt(square_a * square_b) if square_a and square_b else math.nan


def _compared(a: Delta, b: Delta) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that two deltas are compared by."""
    every = _union([a, b], [1.0, 1.0])
    chosen = in_totals(every)
    return {name: shape for name, shape in every.items() if name in chosen}


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """``Σ w_k Δ_k``: task arithmetic, arXiv 2212.04089.

    A tensor that a delta lacks counts as zero there.

    Raises:
        GraftError: There are no deltas, or another number of weights, or unequal shapes under one name.
    """
    deltas = _with_one_head(deltas)
    shapes = _union(deltas, weights)

    def rows(name: str, start: int, stop: int) -> Tensor:
        parts = [
            weight * d.rows(name, start, stop) for d, weight in zip(deltas, weights, strict=True) if name in d.shapes
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def factors(name: str) -> Factors:
        own = [(d.factored[name](), weight) for d, weight in zip(deltas, weights, strict=True) if name in d.shapes]
        return joined(*zip(*own, strict=True))

    factored = {n: partial(factors, n) for n in shapes if all(n in d.factored for d in deltas if n in d.shapes)}
    return Delta(shapes, rows, _common_manifest(deltas), factored=factored)


def ties_sum(deltas: Sequence[Delta], density: float, weights: Sequence[float]) -> Delta:
    """Merge deltas of one Base by TIES, tensor by tensor; see :func:`shadowlit.delta.transforms.ties`.

    A delta that lacks a tensor doesn't count there. ``density`` is the fraction of each delta's elements that is kept,
    in (0, 1]. Raises as :func:`weighted_sum`.
    """
    deltas = _with_one_head(deltas)
    shapes = _union(deltas, weights)

    def whole(name: str) -> Tensor:
        present = [(d.tensor(name), w) for d, w in zip(deltas, weights, strict=True) if name in d.shapes]
        return ties([tensor for tensor, _ in present], density, [weight for _, weight in present])

    return Delta(shapes, rows_of(keeping(whole)), _common_manifest(deltas))


def _with_one_head(deltas: Sequence[Delta]) -> list[Delta]:
    """The deltas with an output head of their own in all or in none: that of a tied model is its embedding."""
    ends = [head_and_embedding(d.shapes) for d in deltas]
    moved = [d.tied for d, (head, embedding) in zip(deltas, ends, strict=True) if embedding and not head]
    head = next((head for head, _ in ends if head), None)
    if head is None and len(set(moved)) > 1:
        raise GraftError(
            "some of the deltas change the output head as they change the embedding, since both are one tensor, and "
            "some change the embedding alone, so that the sum would need a head that none of them holds. Make them "
            "again without the embedding (delta make --select linear)."
        )
    return [
        d._with_head(head, embedding) if head and embedding and not own and d.tied else d
        for d, (own, embedding) in zip(deltas, ends, strict=True)
    ]


def _common_manifest(deltas: Sequence[Delta]) -> Mapping[str, Any]:
    """What the manifests of all deltas say of the model that they fit."""
    if len(deltas) == 1:
        return deltas[0].manifest
    found: dict[str, Any] = {}
    for key in ("model_type", "layers"):
        stated = [d.manifest[key] for d in deltas if d.manifest.get(key)]
        if any(value != stated[0] for value in stated):
            raise GraftError(f"deltas differ in {key}: {some_of(stated)}. Combine deltas of one architecture.")
        found |= {key: stated[0]} if stated else {}
    return {**found, "tied": all(d.tied for d in deltas if head_and_embedding(d.shapes)[1])}


def windows(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    """Name, first row and end of every part of tensors of these shapes."""
    for name, shape in shapes.items():
        for start, stop in row_windows(TensorInfo(name, "F32", shape, "")):
            yield name, start, stop


def _streamed(
    function: Callable[[tuple[str, int, int]], _Out], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[tuple[str, int, int], _Out]]:
    """Every part of tensors of these shapes with what ``function`` makes of it, computed ahead by threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from zip(windows(shapes), ordered(pool, function, windows(shapes)), strict=True)


def _union(deltas: Sequence[Delta], weights: Sequence[float]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors."""
    if not deltas or len(deltas) != len(weights):
        raise GraftError(f"{len(deltas)} deltas and {len(weights)} weights were given; expected one weight for each.")
    shapes: dict[str, tuple[int, ...]] = {}
    for found in deltas:
        unequal = [n for n, shape in found.shapes.items() if shapes.get(n, shape) != shape]
        if unequal:
            told = [f"{name} {shapes[name]} and {found.shapes[name]}" for name in unequal]
            raise GraftError(f"deltas differ in the shapes of {some_of(told)}. Combine deltas of one architecture.")
        shapes.update(found.shapes)
    return shapes


def _as_tensors(rows: Callable[[str, int, int], Any]) -> Rows:
    return lambda name, start, stop: torch.as_tensor(rows(name, start, stop))


def _square(tensor: Tensor) -> Tensor:
    return tensor.square().sum(dtype=torch.float64)
