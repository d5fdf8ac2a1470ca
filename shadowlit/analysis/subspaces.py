"""The directions that updates use: spectra, ranks, and how much of them two updates share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shadowlit.analysis.deltas import Matrix, matrices
from shadowlit.analysis.sums import mean_of_defined
from shadowlit.analysis.tables import Table
from shadowlit.checkpoint.names import kind_of, layer_of
from shadowlit.delta.delta import Delta
from shadowlit.delta.spectrum import effective_rank, gram, stable_rank
from shadowlit.errors import GraftError
from shadowlit.plotting import HeatMap

Side = Literal["output", "input"]
_NO_DIRECTION = 1e-6  # of the largest singular value: what float32 matrices have as noise


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix of an update, [min(out, in)], descending, float64."""

    name: str
    layer: int
    kind: str
    values: Tensor

    @property
    def effective_rank(self) -> float:
        """``exp(H(s / Σ s))``; see :func:`shadowlit.delta.spectrum.effective_rank`."""
        return effective_rank(self.values)

    @property
    def stable_rank(self) -> float:
        """``‖Δ‖_F² / ‖Δ‖₂²``."""
        return stable_rank(self.values)

    def rank_of_share(self, share: float) -> int:
        """Return the fewest singular values that hold this share of the squared norm, in (0, 1]; 0 of a zero matrix."""
        energy = self.values.square()
        if not energy.sum():
            return 0
        reached = energy.cumsum(0) >= share * energy.sum() * (1 - 1e-12)
        return int(reached.int().argmax()) + 1


def spectra_of(deltas: Mapping[str, Delta], layers: Sequence[int] | None = None) -> dict[str, list[Spectrum]]:
    """Return the singular values of several updates' matrices in some layers; one matrix is in memory at a time.

    Example: ``spectra_of(deltas, layers=[0])``.

    Raises:
        GraftError: See :func:`shadowlit.analysis.deltas.matrices`.
    """

    def spectrum(delta: Delta, name: str) -> Spectrum:
        return Spectrum(name, layer_of(name) or 0, kind_of(name), delta.singular_values(name))

    return {title: [spectrum(delta, n) for n in matrices(delta, layers)] for title, delta in deltas.items()}


def rank_maps(found: Mapping[str, Sequence[Spectrum]]) -> list[HeatMap]:
    """Return the mean effective rank by layer and kind, a map per update.
    Example: ``rank_maps(spectra_of(deltas))``.
    """
    maps = []
    for title, each in found.items():
        ranks: dict[tuple[str, int], list[float]] = {}
        for one in each:
            ranks.setdefault((one.kind, one.layer), []).append(one.effective_rank)
        maps.append(HeatMap(title, {at: mean_of_defined(values) for at, values in ranks.items()}, "effective rank"))
    return maps


def rank_table(found: Mapping[str, Sequence[Spectrum]]) -> Table:
    """Return a row per update: means over its matrices. Example: ``rank_table(spectra_of(deltas))``."""
    rows = []
    for name, each in found.items():
        ranks = [(one.effective_rank, one.stable_rank, one.rank_of_share(0.9), len(one.values)) for one in each]
        rows.append((name, *map(mean_of_defined, zip(*ranks, strict=True))))
    return Table(("update", "effective rank", "stable rank", "rank that holds 90 % of ‖Δ‖²", "full rank"), rows)


@dataclass(frozen=True)
class Overlap:
    """How much the leading directions of every two updates overlap.

    Attributes:
        matrix: φ of every two, the mean over the matrices, 0 to 1.
        chance: φ of random subspaces of these dimensions.
    """

    matrix: Matrix
    chance: float
    side: Side


def subspace_overlap(
    deltas: Mapping[str, Delta], rank: int, side: Side = "output", layers: Sequence[int] | None = None
) -> Overlap:
    """Compare the subspaces that the leading singular vectors of updates span.

    ``φ = ‖U_aᵀ U_b‖_F² / min(r_a, r_b)`` for each matrix, from orthonormal leading singular vectors ``U`` [n, r]:
    1 if the smaller subspace lies in the other, 0 if they are orthogonal; ``max(r_a, r_b) / n`` by chance. As in
    LoRA (arXiv 2106.09685, section 7.2). A sign or a size that differs doesn't show here, as it does in a cosine.

    Args:
        deltas: Two or more updates by name.
        rank: Number of leading directions of each; a matrix of lower rank contributes all that it has.
        side: ``output`` for the left singular vectors (written by the updates), ``input`` for the right ones (read).
        layers: See :func:`shadowlit.analysis.deltas.matrices`.

    Raises:
        GraftError: The rank isn't positive, or they share no matrix in these layers.
    """
    if rank < 1 or len(deltas) < 2:
        raise GraftError(f"rank={rank} of {len(deltas)} updates; expected at least 1, and two updates.")
    names = list(deltas)
    first = deltas[names[0]]
    shared = [n for n in matrices(first, layers) if all(d.shapes.get(n) == first.shapes[n] for d in deltas.values())]
    if not shared:
        raise GraftError(f"{', '.join(names)} share no matrix in these layers. Give updates of one architecture.")
    sums = torch.zeros(len(names), len(names), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    chance: list[float] = []
    for name in shared:
        bases = [leading_vectors(delta.tensor(name), rank, side) for delta in deltas.values()]
        for i, left in enumerate(bases):
            for j, right in enumerate(bases):
                if left.shape[1] and right.shape[1]:  # an update of zero has no directions
                    sums[i, j] += float((left.T @ right).square().sum()) / min(left.shape[1], right.shape[1])
                    counts[i, j] += 1
                    if i < j:
                        chance.append(max(left.shape[1], right.shape[1]) / len(left))
    values = torch.where(counts > 0, sums / counts.clamp_min(1), math.nan)
    told = Matrix(tuple(names), values, f"overlap φ of {rank} directions")
    return Overlap(told, mean_of_defined(chance), side)


def overlaps(deltas: Mapping[str, Delta], rank: int, layers: Sequence[int] | None = None) -> list[Overlap]:
    """Compute :func:`subspace_overlap` of what the updates write, and read. Example: ``overlaps(deltas, rank=2)``."""
    return [subspace_overlap(deltas, rank, "output", layers), subspace_overlap(deltas, rank, "input", layers)]


@torch.no_grad()
def leading_vectors(matrix: Tensor, rank: int, side: Side = "output") -> Tensor:
    """Return the orthonormal leading singular vectors of a matrix [out, in], in float64: left ones [out, r] or right
    ones [in, r].

    There are fewer than ``rank`` if the matrix has fewer singular values above 1e-6 of the largest. They come from the
    eigenvectors of the Gram matrix of the smaller side, mapped to the other side where that is the one wanted.
    """
    values = matrix if side == "input" else matrix.T  # right singular vectors of this one are wanted
    wide = values.shape[0] < values.shape[1]
    energy, vectors = torch.linalg.eigh(gram(values.T if wide else values))
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    there = int((energy > energy[:1] * _NO_DIRECTION**2).sum()) if energy.numel() else 0
    leading = vectors[:, : min(rank, there)]
    if not wide:
        return leading
    # Dividing by small singular values costs orthogonality; QR restores it.
    return torch.linalg.qr(values.T.double() @ leading).Q
