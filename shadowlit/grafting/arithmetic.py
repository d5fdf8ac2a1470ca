"""The equation ``grafted = instruct + scale * (tuned - base)`` and what is measured on it.

Shadow-FT, arXiv 2505.12716, equation 5. Every function is pure, takes tensors of one shape and any floating dtypes, and
computes and returns float32 (float64 if an input is float64): a delta is small compared with the weights, and bfloat16
arithmetic would lose most of it. The caller rounds once, to the stored dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowlit.grafting.swap import windows


def widen(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or unchanged when it is float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which long sums are taken on a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def delta(tuned: Tensor, base: Tensor) -> Tensor:
    """Return the update ``tuned - base`` that was learned from the Base."""
    return widen(tuned) - widen(base)


def add_delta(instruct: Tensor, update: Tensor, scale: float = 1.0) -> Tensor:
    """Add an update to the Instruct: ``instruct + scale * update``, not yet rounded."""
    update = widen(update)
    # Product and sum are rounded each for itself, as on disk: torch.add's alpha would fuse them on some machines.
    return widen(instruct) + (update if scale == 1 else scale * update)


def graft(instruct: Tensor, tuned: Tensor, base: Tensor, scale: float = 1.0) -> Tensor:
    """Graft the Base's update onto the Instruct: ``instruct + scale * (tuned - base)``, not yet rounded.

    The scale λ is 1 in the paper; 0 gives the Instruct.
    """
    return add_delta(instruct, delta(tuned, base), scale)


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``⟨left, right⟩`` of two tensors of one shape as a scalar: products in float32, or float64 if one of the
    two is, and sums of them in float64.
    """
    total = torch.zeros((), dtype=accumulation_dtype(left.device), device=left.device)
    left, right = left.reshape(-1), right.reshape(-1)
    for part in windows(left):
        one, other = widen(left[part]), widen(right[part].to(left.device, non_blocking=True))
        dtype = torch.promote_types(one.dtype, other.dtype)
        total += torch.dot(one.to(dtype), other.to(dtype))
    return total
