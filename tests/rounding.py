"""How far two trainings may end apart that add the same numbers in another order: from the arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback

# Two sums of n float32 numbers in another order differ by about u √n, u being half of the distance between 1 and the
# next number. AdamW divides each gradient by its own size. Where a gradient is r times as large as usual, a relative
# error ε of the usual size becomes ε / r of a step, and 2 at most: the sign. With r spread evenly near 0 that is a mean
# square of ∫ min(2, ε/r)² dr = 4 ε. The largest error of one element is thus a whole step, by chance, and no bound for
# it holds on every CPU; the norm of all errors is 2 √ε of the norm of all updates.
_TERMS = 2000  # tokens of a batch times their width, at least
SAME_UPDATE = 2 * math.sqrt(2**-24 * math.sqrt(_TERMS))  # 0.0033


# The logits of a tiny model in float32: in each of its two layers about ten products of 32 to 64 terms, each with a
# relative error of u √n. Errors of single products are independent, so that their squares add: u √(2 · 10 · 64) = 36 u.
# Adapters of large scale make activations, and so errors, twice as large.
SAME_LOGITS = 2 * 2**-24 * math.sqrt(2 * 10 * 64)  # 4.3e-6


class Start(Callback):
    """Keeps the weights that an unsharded training starts from."""

    weights: Mapping[str, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module):
        if trainer.world_size == 1:
            self.weights = {name: p.detach().clone() for name, p in pl_module.model.named_parameters()}


def require_same_logits(found: torch.Tensor, expected: torch.Tensor, change: torch.Tensor) -> None:
    """Logits in float32 are those expected in float64, and what is tested is a ``change`` that no rounding can hide."""
    apart, size = ((found - expected).norm().item(), expected.norm().item())
    assert change.norm() > 1000 * SAME_LOGITS * size
    assert apart <= SAME_LOGITS * size, f"apart by {apart:.3g}, which is {apart / size * 2**24:.1f} u of {size:.3g}"


def require_same_update(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]
) -> None:
    """The weights of two trainings from ``start`` are equal up to the order of sums.

    One wrong tensor of 32 elements among 30,000 would be a share of √(32 / 30,000) = 0.03.
    """
    assert found.keys() == expected.keys() == start.keys()
    apart = math.sqrt(sum((found[name] - value).double().square().sum().item() for name, value in expected.items()))
    moved = math.sqrt(sum((value - start[name]).double().square().sum().item() for name, value in expected.items()))
    assert moved > 0
    assert apart <= SAME_UPDATE * moved, f"apart by {apart:.3g}, which is {apart / moved:.2%} of the update {moved:.3g}"
