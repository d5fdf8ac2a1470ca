"""A matrix as the product of two small ones: norms, angles and spectra without multiplying it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A matrix ``up @ down``, as LoRA learns one; its scaling is in ``up``."""

    up: Tensor  # [out, r]
    down: Tensor  # [r, in]

    @property
    def rank(self) -> int:
        """The number of columns of ``up``."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the product."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors in float32, as they are stored."""
        return 4 * (self.up.numel() + self.down.numel())

    @property
    def matrix(self) -> Tensor:
        """``up @ down``, [out, in]."""
        return self.up @ self.down

    @property
    def square(self) -> float:
        """``‖up @ down‖_F²``."""
        return max(0.0, self.dot(self))

    def dot(self, other: Factors) -> float:
        """Return ``⟨up @ down, other.up @ other.down⟩``.

        It is ``tr(downᵀ upᵀ other.up other.down)``, the sum over the product of two matrices [r, other.r], in float64.
        """
        left, right = self.up.double().T @ other.up.double(), self.down.double() @ other.down.double().T
        return float((left * right).sum())

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``Q_up`` [out, k], a small matrix and ``Q_down`` [in, l] with ``up @ down = Q_up core Q_downᵀ``.

        Both ``Q`` are orthonormal (QR), so that the singular values are those of the small matrix; float64.
        """
        (q_up, r_up), (q_down, r_down) = (torch.linalg.qr(side.double()) for side in (self.up, self.down.T))
        return q_up, r_up @ r_down.T, q_down

    def singular_values(self) -> Tensor:
        """Return all ``min(out, in)`` singular values in descending order, float64; those beyond the rank are 0."""
        found = torch.linalg.svdvals(self.core()[1])
        return torch.nn.functional.pad(found, (0, min(self.shape) - len(found)))


def joined(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return ``Σ w_k up_k @ down_k`` as factors whose rank is the sum of theirs.

    Those with equal ``down`` share it, so that a matrix minus itself is exactly zero.
    """
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    for one, weight in zip(factors, weights, strict=True):
        known = next((i for i, down in enumerate(downs) if torch.equal(down, one.down)), None)
        if known is None:
            ups.append(weight * one.up)
            downs.append(one.down)
        else:
            ups[known] = ups[known] + weight * one.up
    return Factors(torch.cat(ups, 1), torch.cat(downs))
