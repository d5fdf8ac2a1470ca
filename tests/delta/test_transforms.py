"""Compression of updates, against formulas written out elementwise and against torch's own decompositions."""

import math

import pytest
import torch

from shadowlit.delta.transforms import dare, magnitude, relative_error, ties, truncated_svd
from shadowlit.errors import GraftError


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.999, 1.0])
def test_magnitude_keeps_the_largest(density):
    update = random(37, 41)
    kept = magnitude(update, density)
    count = max(1, round(density * update.numel()))
    assert int((kept != 0).sum()) == count
    threshold = sorted(update.abs().flatten().tolist(), reverse=True)[count - 1]
    assert torch.equal(kept, update * (update.abs() >= threshold))


def test_magnitude_of_equal_values_keeps_exactly_the_share():
    assert int((magnitude(torch.ones(10), 0.3) != 0).sum()) == 3


def test_dare_is_the_update_in_expectation_and_repeats_by_seed():
    update = random(64, 64)
    draws = [dare(update, 0.25, torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert all(torch.equal(d[d != 0], (update * 4)[d != 0]) for d in draws[:3])
    assert abs(float((draws[0] != 0).float().mean()) - 0.25) < 0.03
    assert relative_error(update, torch.stack(draws).mean(0)) < 3 * math.sqrt(3 / 400)
    assert torch.equal(draws[5], dare(update, 0.25, torch.Generator().manual_seed(5)))


def test_ties_by_hand():
    a = torch.tensor([1.0, -2.0, 0.1, 3.0, 0.0])
    b = torch.tensor([3.0, 1.0, 0.2, -3.5, 0.0])
    # Trimmed to 3 of 5 each: a = 1, -2, 0, 3, 0; b = 3, 1, 0, -3.5, 0. Elected: +, -, 0, -.
    assert ties([a, b], 0.6).tolist() == [2.0, -2.0, 0.0, -3.5, 0.0]
    # Weighted 3 to 1 the fourth sign turns.
    assert ties([a, b], 0.6, [3.0, 1.0]).tolist() == [1.5, -2.0, 0.0, 3.0, 0.0]


def test_ties_against_a_loop():
    updates = [random(9, 7, seed=s) for s in range(3)]
    weights = [0.5, 1.0, 2.0]
    merged = ties(updates, 0.4, weights)
    trimmed = [magnitude(u, 0.4).flatten().tolist() for u in updates]
    for i, value in enumerate(merged.flatten().tolist()):
        column = [t[i] for t in trimmed]
        sign = math.copysign(1, s) if (s := sum(w * v for w, v in zip(weights, column, strict=True))) else 0
        agreeing = [(w, v) for w, v in zip(weights, column, strict=True) if v * sign > 0]
        wanted = sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
        assert value == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (30, 30)])
def test_svd_by_rank_is_the_best(shape):
    update = random(*shape)
    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
    for rank in (1, 5, 29, 1000):
        cut = truncated_svd(update, rank)
        r = min(rank, *shape)
        best = u[:, :r] @ torch.diag(s[:r]) @ v[:r]
        assert cut.rank == r
        assert torch.allclose(cut.matrix.double(), best, atol=1e-5)
        assert cut.explained == pytest.approx(float((s[:r] ** 2).sum() / (s**2).sum()))
        assert torch.allclose(cut.up.norm(dim=0), cut.down.norm(dim=1), rtol=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 1.0])
def test_svd_by_explained_variance_takes_the_fewest(share):
    update = random(25, 50)
    energy = torch.linalg.svdvals(update.double()).square()
    cumulated = (energy.cumsum(0) / energy.sum()).tolist()
    wanted = next(i for i, c in enumerate(cumulated, 1) if c >= share - 1e-12)
    assert truncated_svd(update, explained_variance=share).rank == wanted


def test_svd_of_low_rank_zero_and_tiny_matrices():
    exact = random(50, 3) @ random(3, 70, seed=1)
    assert relative_error(exact, truncated_svd(exact, 3).matrix) < 1e-6
    assert truncated_svd(exact, explained_variance=1 - 1e-9).rank == 3
    zero = truncated_svd(torch.zeros(4, 5), 2)
    assert zero.explained == 1.0 and not zero.matrix.any()
    tiny = truncated_svd(exact * 1e-12, 3)
    assert relative_error(exact * 1e-12, tiny.matrix) < 1e-6


def test_half_precision_is_computed_in_float32():
    update = random(8, 8).bfloat16()
    assert magnitude(update, 0.5).dtype == torch.float32
    assert truncated_svd(update, 8).up.dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda u: magnitude(u, 0.0),
        lambda u: dare(u, 1.5, torch.Generator()),
        lambda u: ties([], 0.5),
        lambda u: ties([u, u[:2]], 0.5),
        lambda u: ties([u], 0.5, [-1.0]),
        lambda u: truncated_svd(u),
        lambda u: truncated_svd(u, 2, 0.5),
        lambda u: truncated_svd(u, 0),
        lambda u: truncated_svd(u, explained_variance=1.1),
        lambda u: truncated_svd(u[0], 2),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(GraftError, match="expected"):
        call(random(4, 4))
