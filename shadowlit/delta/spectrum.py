"""How many directions a matrix uses: effective rank and stable rank, from its singular values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shadowlit.errors import ShadowlitError

_BLOCK = 4096  # rows or columns that are in float64 at a time


def gram(matrix: Tensor) -> Tensor:
    """Return the Gram matrix ``AᵀA`` of a matrix [m, n], computed some rows at a time: [n, n], float64, on its device.

    Its eigenvalues are the squared singular values.
    """
    products = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block in matrix.detach().split(_BLOCK):
        wide = block.double()
        products.addmm_(wide.T, wide)
    return products


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a finite matrix [m, n], in descending order: [min(m, n)], float64, on its device.

    From the eigenvalues of the Gram matrix of the smaller side, in float64: several times faster than an SVD, and
    without a second copy of the matrix. Squaring costs half of float64's digits: singular values below
    ``sqrt(max(m, n) * eps)`` of the largest (about 1e-6 for a matrix with thousands of rows, the resolution of float32
    data) are returned as zero.

    Raises:
        ShadowlitError: It isn't a matrix, or holds NaN or infinities.
    """
    if matrix.ndim != 2:
        raise ShadowlitError(f"a tensor of shape {tuple(matrix.shape)} has no singular values. Give a matrix [m, n].")
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    rows, side = tall.shape
    products = gram(tall)
    if not torch.isfinite(products).all():
        raise ShadowlitError(f"a matrix of shape {tuple(matrix.shape)} holds NaN or infinities. Check its source.")
    squares = torch.linalg.eigvalsh(products).flip(0)
    if side:
        squares = torch.where(squares > squares[0] * rows * torch.finfo(torch.float64).eps, squares, 0.0)
    return squares.sqrt()


def effective_rank(matrix: Tensor) -> float:
    """``exp(H(p))`` with ``p_i = s_i / Σ s`` the normalised singular values and ``H`` Shannon's entropy.

    Of a matrix [m, n], or of its singular values [k]. Between 1 (one direction) and ``min(m, n)`` (all directions
    alike); NaN for a matrix of zeros. Raises as :func:`singular_values`. Roy and Vetterli, "The effective rank: a
    measure of effective dimensionality", EUSIPCO 2007.
    """
    values = _values(matrix)
    total = float(values.sum())
    if not total:
        return math.nan
    return math.exp(float(torch.special.entr(values / total).sum()))


def stable_rank(matrix: Tensor) -> float:
    """``‖A‖_F² / ‖A‖₂²``, Frobenius over spectral norm: at most the rank, and hardly moved by small singular values.

    Of a matrix [m, n], or of its singular values [k]; NaN for a matrix of zeros. Raises as :func:`singular_values`.
    Rudelson and Vershynin, arXiv math/0503442 (there "numerical rank").
    """
    squares = _values(matrix).square()
    largest = float(squares.max()) if squares.numel() else 0.0
    return float(squares.sum()) / largest if largest else math.nan


def _values(matrix: Tensor) -> Tensor:
    return matrix.double() if matrix.ndim == 1 else singular_values(matrix)
