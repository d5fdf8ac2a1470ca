"""Smaller updates: pure functions from tensor to tensor, with their formulas and papers.

All compute in float32 (float64 when the input is float64) and return what they were given in that dtype. What each
one loses is told by :func:`relative_error`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowlit.delta.spectrum import gram
from shadowlit.errors import GraftError
from shadowlit.grafting.arithmetic import widen


def magnitude(update: Tensor, density: float) -> Tensor:
    """Keep the elements of largest magnitude, set the others to zero.

    Han et al., arXiv 1506.02626; the trimming step of TIES, arXiv 2306.01708.

    Args:
        update: any shape.
        density: share of elements to keep, in (0, 1].

    Returns:
        Same shape; exactly ``round(density * n)`` elements, at least one, are kept as they were.

    Raises:
        GraftError: the density is outside (0, 1].
    """
    _require_density(density)
    values = widen(update)
    keep = max(1, round(density * values.numel()))
    if keep >= values.numel():
        return values.clone()
    flat = values.flatten()
    kept = flat.abs().topk(keep, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(values)


def dare(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop elements at random and rescale the rest: ``m * update / density`` with ``m ~ Bernoulli(density)``.

    DARE, arXiv 2311.03099, with drop rate ``1 - density``. The expectation is the update itself.

    Args:
        update: any shape.
        density: probability that an element is kept, in (0, 1].
        generator: the source of the mask, on the update's device.

    Raises:
        GraftError: the density is outside (0, 1].
    """
    _require_density(density)
    values = widen(update)
    mask = torch.rand(values.shape, generator=generator, device=values.device) < density
    return values * mask / density


def ties(updates: Sequence[Tensor], density: float, weights: Sequence[float] | None = None) -> Tensor:
    """Merge updates of one Base: trim each, elect a sign per element, take the mean of those that agree.

    TIES-Merging, arXiv 2306.01708: with trimmed ``t_k``, ``γ = sign(Σ w_k t_k)`` and the mean
    ``Σ w_k t_k [sign(t_k) = γ] / Σ w_k [sign(t_k) = γ]`` over the non-zero agreeing ones.

    Args:
        updates: tensors of one shape.
        density: share of elements of each that survives trimming, in (0, 1].
        weights: positive weight of each update; equal ones by default.

    Returns:
        Same shape. Scale it as any other update (the paper's λ).

    Raises:
        GraftError: no updates, unequal shapes, a weight that isn't positive, or a density outside (0, 1].
    """
    weights = [1.0] * len(updates) if weights is None else list(weights)
    if not updates or len({u.shape for u in updates}) > 1 or len(weights) != len(updates) or min(weights) <= 0:
        raise GraftError(
            f"ties was given {len(updates)} updates of shapes {[tuple(u.shape) for u in updates]} and weights "
            f"{weights}; expected at least one, all of one shape, and a positive weight for each."
        )
    trimmed = [magnitude(update, density) for update in updates]
    elected = sum((w * t for w, t in zip(weights, trimmed, strict=True)), torch.zeros_like(trimmed[0])).sign()
    total, share = torch.zeros_like(elected), torch.zeros_like(elected)
    for weight, tensor in zip(weights, trimmed, strict=True):
        agrees = (tensor.sign() == elected) & (tensor != 0)
        total += weight * tensor * agrees
        share += weight * agrees
    return torch.where(share > 0, total / share.clamp_min(torch.finfo(share.dtype).tiny), 0.0)


@dataclass(frozen=True)
class LowRank:
    """The best approximation of a matrix by one of lower rank, as a product.

    Attributes:
        up: [out, r].
        down: [r, in]; ``up @ down`` is the approximation.
        explained: the share of the squared norm that it holds, ``Σ_{i≤r} s_i² / Σ s_i²`` (1 for a zero matrix).
    """

    up: Tensor
    down: Tensor
    explained: float

    @property
    def rank(self) -> int:
        """The number of columns of ``up``."""
        return self.down.shape[0]

    @property
    def matrix(self) -> Tensor:
        """``up @ down``, [out, in]."""
        return self.up @ self.down


@torch.no_grad()
def truncated_svd(update: Tensor, rank: int | None = None, explained_variance: float | None = None) -> LowRank:
    """Cut the singular value decomposition of an update, by rank or by explained variance.

    Eckart and Young (1936); by explained variance as in LoRE-Adapt, arXiv 2405.15007. The projector on the leading
    singular vectors comes from the eigenvectors of the Gram matrix of the smaller side in float64, so that the
    cost is one product and one symmetric decomposition of that side, and no division by a singular value is needed.

    Args:
        update: [out, in].
        rank: the number of singular values to keep; more than there are keeps all.
        explained_variance: keep the fewest that hold this share of the squared norm, in (0, 1].

    Returns:
        Both factors of equal norm per component, in float32 (float64 for a float64 update).

    Raises:
        GraftError: not a matrix, or not exactly one of ``rank`` and ``explained_variance``.
    """
    if update.ndim != 2 or (rank is None) == (explained_variance is None) or (rank is not None and rank < 1):
        raise GraftError(
            f"truncated_svd was given a tensor of shape {tuple(update.shape)}, rank={rank} and "
            f"explained_variance={explained_variance}; expected a matrix, and a positive rank or a share in (0, 1]."
        )
    if explained_variance is not None and not 0 < explained_variance <= 1:
        raise GraftError(f"explained_variance is {explained_variance}; expected a share in (0, 1].")
    values = widen(update)
    wide = values.shape[0] < values.shape[1]
    tall = (values.T if wide else values).double()
    energy, vectors = torch.linalg.eigh(gram(tall))
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    total = float(energy.sum())
    if rank is None:
        assert explained_variance is not None
        reached = energy.cumsum(0) >= explained_variance * total * (1 - 1e-12)
        rank = int(reached.int().argmax()) + 1
    rank = min(rank, len(energy))
    leading = vectors[:, :rank]
    # Components of equal norm in both factors: half-precision adapters lose least that way.
    balance = energy[:rank].sqrt().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    up, down = (tall @ leading) / balance, balance[:, None] * leading.T
    if wide:
        up, down = down.T, up.T
    explained = float(energy[:rank].sum()) / total if total else 1.0
    return LowRank(up.to(values.dtype).contiguous(), down.to(values.dtype).contiguous(), explained)


def relative_error(update: Tensor, approximation: Tensor) -> float:
    """``‖approximation − update‖ / ‖update‖``: 0 for nothing lost; 0 also for an update of zeros kept as such."""
    size = float(torch.linalg.vector_norm(widen(update), dtype=torch.float64))
    error = float(torch.linalg.vector_norm(widen(approximation) - widen(update), dtype=torch.float64))
    return error / size if size else (0.0 if not error else math.inf)


def _require_density(density: float) -> None:
    if not 0 < density <= 1:
        raise GraftError(f"density is {density}; expected a share of elements in (0, 1], e.g. 0.1.")
