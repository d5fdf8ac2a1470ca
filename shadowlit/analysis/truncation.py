"""What is lost when an update is truncated by rank or sparsity: as a share of its norm, and in validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shadowlit.analysis.deltas import trimmed
from shadowlit.analysis.subspaces import Spectrum
from shadowlit.checkpoint.names import kind_of
from shadowlit.delta.configured import pair_of, read_config
from shadowlit.delta.delta import Delta
from shadowlit.errors import DataError, GraftError

ALL = "all"
_PART = 2**20  # elements that are in float64 at a time


@dataclass(frozen=True)
class Cost:
    """The error of truncating an update, by how much of it is kept.

    Attributes:
        kept: Ranks, or shares of the elements in (0, 1]; ascending.
        errors: ``‖cut − Δ‖ / ‖Δ‖`` for each of them, by kind of tensor and over ``all``.
    """

    by: str
    kept: tuple[float, ...]
    errors: Mapping[str, tuple[float, ...]]


def rank_cost(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> Cost:
    """Return the relative error of the best approximation of every matrix by one of each lower rank.

    ``√(Σ_{i>r} s_i² / Σ s_i²)``, sums over all matrices together (Eckart and Young, 1936).
    Example: ``rank_cost(spectra_of(deltas)["lora"], [1, 2])``.

    Raises:
        GraftError: No ranks, or one isn't positive.
    """
    if not ranks or min(ranks) < 1:
        raise GraftError(f"ranks are {list(ranks)}; expected positive numbers.")
    ordered = sorted(set(ranks))
    squares = {
        spectrum.name: (spectrum.kind, torch.stack([spectrum.values[rank:].square().sum() for rank in [0, *ordered]]))
        for spectrum in spectra
    }
    return Cost("rank", tuple(map(float, ordered)), _errors(squares))


def density_cost(delta: Delta, densities: Sequence[float]) -> Cost:
    """Return the relative error when only these shares of the elements of every tensor are kept, the largest.

    Han et al., arXiv 1506.02626; the trimming step of TIES, arXiv 2306.01708. One tensor is in memory at a time.
    Example: ``density_cost(deltas["lora"], [0.1, 0.5])``.

    Raises:
        GraftError: No densities, or one outside (0, 1].
    """
    if not densities or min(densities) <= 0 or max(densities) > 1:
        raise GraftError(f"densities are {list(densities)}; expected shares of the elements in (0, 1].")
    ordered = sorted(set(densities))
    squares = {name: (kind_of(name), _trimmed_squares(delta.tensor(name), ordered)) for name in delta.shapes}
    return Cost("density", tuple(ordered), _errors(squares))


def _trimmed_squares(tensor: Tensor, densities: Sequence[float]) -> Tensor:
    """The squared norm of a tensor, and that of what each density, ascending, leaves out: [1 + number of densities]."""
    # numpy sorts in place and without indices, which would take eight more bytes per element.
    sizes = np.abs(tensor.numpy().reshape(-1))
    sizes.sort()
    count = len(sizes)
    dropped = [count - min(count, max(1, round(density * count))) for density in densities]
    borders = [0, *reversed(dropped), count]
    parts = [_square(sizes[start:stop]) for start, stop in pairwise(borders)]
    below = list(accumulate(parts))  # of everything up to each border
    return torch.tensor([below[-1], *reversed(below[:-1])], dtype=torch.float64)


def _square(values: npt.NDArray[np.float32]) -> float:
    return sum(float(np.square(values[i : i + _PART], dtype=np.float64).sum()) for i in range(0, len(values), _PART))


def _errors(squares: Mapping[str, tuple[str, Tensor]]) -> dict[str, tuple[float, ...]]:
    """From total and lost squares of every tensor to errors by kind."""
    sums: dict[str, Tensor] = {}
    for kind, found in squares.values():
        for key in (kind, ALL):
            sums[key] = sums.get(key, torch.zeros_like(found)) + found
    return {
        kind: tuple(math.sqrt(float(lost / found[0])) if found[0] else 0.0 for lost in found[1:])
        for kind, found in sums.items()
    }


# -- in terms of the loss -------------------------------------------------------------------------------------


def cut_to_rank(delta: Delta, rank: int) -> Delta:
    """Return the update with every matrix cut to a rank; other tensors stay as they are."""
    return delta.map([{"name": "svd", "rank": rank}])


@dataclass(frozen=True)
class Losses:
    """Validation losses of the Instruct with an update, whole and cut, in nats per supervised token."""

    untouched: float
    whole: float
    by_rank: Mapping[float, float]
    by_density: Mapping[float, float]


def losses(
    delta: Delta,
    run: str | Path | None,
    ranks: Sequence[int] = (),
    densities: Sequence[float] = (),
    scale: float = 1.0,
    batches: int | None = None,
    device: str = "cpu",
    trust_config: bool = False,
) -> Losses | None:
    """Graft an update whole and cut onto the Instruct, and score each on the validation data of a run.

    The Instruct is loaded once, in float32; 4 bytes of memory per parameter. Each graft is computed from its files.
    Example: ``losses(deltas["lora"], "runs/lora", ranks=[8])``.

    Args:
        delta: The update.
        run: Folder whose ``config.yaml`` names the pair and the data; None for no losses.
        ranks: Ranks to cut to.
        densities: Shares of elements to keep.
        scale: Scale λ of the graft.
        batches: Number of batches of each validation set; None for all.
        device: Device that computes.
        trust_config: Whether to run code that ``config.yaml`` names: a ``data.format`` by import path, and that of the
            models if it sets ``pair.trust_remote_code``.

    Raises:
        DataError: The folder holds no configuration, or no validation data.
    """
    if run is None:
        return None
    from shadowlit.analysis.scoring import Scorer  # late: transformers takes seconds

    home = Path(run)
    config = read_config(home)
    if not config:
        raise DataError(f"{home} holds no config.yaml, which names the validation data. Give the folder of a run.")
    scorer = Scorer(pair_of(config, home, trust_config), config, home, batches, device, trust_config)
    return Losses(
        untouched=scorer.loss(None),
        whole=scorer.loss(delta * scale),
        by_rank={float(rank): scorer.loss(cut_to_rank(delta, rank) * scale) for rank in sorted(set(ranks))},
        by_density={share: scorer.loss(trimmed(delta, share) * scale) for share in sorted(set(densities))},
    )
