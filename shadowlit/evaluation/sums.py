"""Sums over an evaluation's samples: exact over unequal shards, reduced once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class SampleSums(Metric):
    """Sums over all ranks of the samples' numbers by name, and the number of samples, ``num_samples``."""

    full_state_update = False
    sums: Tensor

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = (*names, "num_samples")
        # One vector: one collective, whatever is summed.
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, samples: Sequence[Mapping[str, float]]) -> None:
        """Add a batch, possibly of no samples; a name that a sample lacks counts 0."""
        rows = [[{**sample, "num_samples": 1}.get(name, 0) for name in self.names] for sample in samples]
        self.sums += torch.tensor(rows, dtype=torch.float64).reshape(-1, len(self.names)).sum(0).to(self.sums)

    def compute(self) -> dict[str, float]:
        """Return the sums by name, on all ranks alike."""
        return dict(zip(self.names, self.sums.tolist(), strict=True))


def mean(total: float, count: float) -> float:
    """``total / count``, NaN of nothing."""
    return total / count if count else math.nan


def standard_error(total: float, squares: float, count: float) -> float:
    """Return the standard error of a mean from the sums of the values and of their squares, NaN of fewer than two
    values.

    ``sqrt(Σ(x − x̄)² / (n − 1) / n)``, as lm-evaluation-harness reports it.
    """
    if count < 2:
        return math.nan
    return math.sqrt(max(0.0, squares - total**2 / count) / (count - 1) / count)
