import math

import pytest
import torch

from shadowlit.analysis.subspaces import (
    leading_vectors,
    overlaps,
    rank_maps,
    rank_table,
    spectra_of,
    subspace_overlap,
)
from shadowlit.delta.delta import Delta
from shadowlit.errors import GraftError

NAME = "model.layers.{}.mlp.up_proj.weight"


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one(matrix):
    return Delta.of({NAME.format(0): matrix})


def phi(a, b, rank, side="output"):
    return float(subspace_overlap({"a": one(a), "b": one(b)}, rank, side).matrix.values[0, 1])


def test_overlap_of_axes():
    """Directions e1, e2 against e1, e3: one of two is shared; against e3, e4 none; against themselves both."""
    axes = torch.eye(5)
    first = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0]))
    assert phi(first, 7 * first, 2) == pytest.approx(1.0)
    assert phi(first, -first, 2) == pytest.approx(1.0)  # a sign isn't a direction
    assert phi(first, torch.diag(axes[0] + 2 * axes[2]), 2) == pytest.approx(0.5)
    assert phi(first, torch.diag(axes[2] + 2 * axes[3]), 2) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_sides(shape):
    """Two matrices that write along one direction and read along orthogonal ones."""
    out, inner = shape
    u = noise(out, seed=1)
    v, w = torch.zeros(inner), torch.zeros(inner)
    v[0], w[1] = 1.0, 1.0
    a, b = torch.outer(u, v), torch.outer(u, w)
    assert phi(a, b, 1, "output") == pytest.approx(1.0)
    assert phi(a, b, 1, "input") == pytest.approx(0.0, abs=1e-10)


def test_the_smaller_subspace_counts():
    """A matrix of rank 1 whose direction lies among the other's three: all of it is shared."""
    u, _ = torch.linalg.qr(noise(8, 8, seed=2))
    a = u[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ noise(3, 6, seed=3)
    b = torch.outer(u[:, 1], noise(6, seed=4))
    assert phi(a, b, 3) == pytest.approx(1.0)


def test_chance_is_what_random_subspaces_have():
    """r / n of an n-dimensional space; the mean over many matrices comes near it."""
    deltas = [Delta.of({NAME.format(i): noise(20, 30, seed=100 * k + i) for i in range(40)}) for k in range(2)]
    found = subspace_overlap(dict(zip("ab", deltas, strict=True)), 4, layers=range(40))
    assert found.chance == pytest.approx(4 / 20)
    assert float(found.matrix.values[0, 1]) == pytest.approx(0.2, abs=0.02)
    assert found.matrix.values.diagonal().tolist() == pytest.approx([1.0, 1.0])


def test_mean_over_matrices_and_zero_updates():
    a = {NAME.format(0): torch.diag(torch.tensor([1.0, 0.0])), NAME.format(1): torch.diag(torch.tensor([1.0, 0.0]))}
    b = {NAME.format(0): torch.diag(torch.tensor([1.0, 0.0])), NAME.format(1): torch.diag(torch.tensor([0.0, 1.0]))}
    zero = {name: torch.zeros(2, 2) for name in a}
    found = subspace_overlap({"a": Delta.of(a), "b": Delta.of(b), "zero": Delta.of(zero)}, 1).matrix.values
    assert float(found[0, 1]) == pytest.approx(0.5)
    assert math.isnan(float(found[0, 2]))


def test_errors():
    with pytest.raises(GraftError, match="rank=0 of 2 updates"):
        phi(torch.eye(2), torch.eye(2), 0)
    with pytest.raises(GraftError, match="a, b share no matrix"):
        phi(torch.eye(2), torch.eye(3), 1)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (5, 5)])
@pytest.mark.parametrize("side", ["output", "input"])
def test_leading_vectors_are_those_of_the_svd(shape, side):
    matrix = noise(*shape, seed=5)
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = u[:, :3] if side == "output" else vh[:3].T
    found = leading_vectors(matrix, 3, side)
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close((found.T @ expected).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    low_rank = noise(shape[0], 2, seed=6) @ noise(2, shape[1], seed=7)
    assert leading_vectors(low_rank, 4, side).shape == (shape[0] if side == "output" else shape[1], 2)
    assert leading_vectors(torch.zeros(shape), 4, side).shape[1] == 0


def test_spectra_by_hand():
    """Singular values 3, 4 → 4, 3: 16 of 25 in the first; effective rank exp(H(4/7, 3/7)); stable rank 25 / 16."""
    (found,) = spectra_of({"u": one(torch.diag(torch.tensor([3.0, 4.0])))})["u"]
    assert found.values.tolist() == pytest.approx([4.0, 3.0]) and (found.layer, found.kind) == (0, "up_proj")
    entropy = -(4 / 7 * math.log(4 / 7) + 3 / 7 * math.log(3 / 7))
    assert found.effective_rank == pytest.approx(math.exp(entropy))
    assert found.stable_rank == pytest.approx(25 / 16)
    assert (found.rank_of_share(0.64), found.rank_of_share(0.65), found.rank_of_share(1.0)) == (1, 2, 2)
    ((_, effective, stable, ninety, full),) = rank_table({"u": [found]}).rows
    assert effective == pytest.approx(math.exp(entropy)) and (stable, ninety, full) == (pytest.approx(25 / 16), 2.0, 2)
    (shown,) = rank_maps({"u": [found]})
    assert shown.cells == {("up_proj", 0): pytest.approx(math.exp(entropy))}
    (zero,) = spectra_of({"u": one(torch.zeros(2, 2))})["u"]
    assert math.isnan(zero.effective_rank) and zero.rank_of_share(0.9) == 0


def test_several_at_once():
    deltas = {"a": one(torch.eye(3)), "b": one(torch.eye(3))}
    assert [len(each) for each in spectra_of(deltas).values()] == [1, 1]
    assert [found.side for found in overlaps(deltas, 2)] == ["output", "input"]
