import math

import pytest
import torch

from shadowlit.analysis.subspaces import spectra_of
from shadowlit.analysis.truncation import ALL, cut_to_rank, density_cost, losses, rank_cost
from shadowlit.delta.delta import Delta
from shadowlit.delta.transforms import magnitude, truncated_svd
from shadowlit.errors import DataError, GraftError

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def relative_error(update, approximation):
    return float((approximation - update).norm() / update.norm())


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rank_cost_is_the_tail_of_the_singular_values():
    """Of singular values 3, 2, 1 and 2, 0, 0 rank 1 loses √(5/14) and nothing; of both together √(5/18)."""
    up, down = torch.diag(torch.tensor([1.0, 3.0, 2.0])), torch.diag(torch.tensor([0.0, 0.0, 2.0]))
    found = rank_cost(spectra_of({"u": Delta.of({UP: up, DOWN: down})})["u"], [2, 1, 5])
    assert (found.by, found.kept) == ("rank", (1.0, 2.0, 5.0))
    assert found.errors["up_proj"] == pytest.approx((math.sqrt(5 / 14), math.sqrt(1 / 14), 0.0))
    assert found.errors["down_proj"] == pytest.approx((0.0, 0.0, 0.0))
    assert found.errors[ALL] == pytest.approx((math.sqrt(5 / 18), math.sqrt(1 / 18), 0.0))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_rank_cost_is_what_the_truncated_svd_loses(rank):
    update = Delta.of({UP: noise(9, 6, seed=1)})
    expected = relative_error(update.tensor(UP), truncated_svd(update.tensor(UP), rank).matrix)
    assert rank_cost(spectra_of({"u": update})["u"], [rank]).errors[ALL][0] == pytest.approx(expected, abs=1e-6)
    cut = cut_to_rank(update + Delta.of({"norm.weight": torch.ones(3)}), rank)
    assert relative_error(update.tensor(UP), cut.tensor(UP)) == pytest.approx(expected, abs=1e-6)
    assert cut.tensor("norm.weight").tolist() == [1, 1, 1]


def test_density_cost_by_hand():
    """Of 3, −4, 0, 1 the half with 3 and −4 is kept: 1 of 26 is lost; a quarter keeps −4: 10 of 26."""
    found = density_cost(Delta.of({UP: torch.tensor([[3.0, -4.0], [0.0, 1.0]])}), [0.5, 0.25, 1.0])
    assert found.kept == (0.25, 0.5, 1.0)
    assert found.errors[ALL] == pytest.approx((math.sqrt(10 / 26), math.sqrt(1 / 26), 0.0))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.33, 0.9, 1.0])
def test_density_cost_is_what_trimming_loses(density):
    update = Delta.of({UP: noise(31, 17, seed=2)})
    expected = relative_error(update.tensor(UP), magnitude(update.tensor(UP), density=density))
    assert density_cost(update, [density]).errors["up_proj"][0] == pytest.approx(expected, rel=1e-6)


def test_an_update_of_zero_loses_nothing():
    zero = Delta.of({UP: torch.zeros(3, 2)})
    assert density_cost(zero, [0.5]).errors[ALL] == (0.0,)
    assert rank_cost(spectra_of({"u": zero})["u"], [1]).errors[ALL] == (0.0,)


def test_errors(tmp_path):
    update = Delta.of({UP: torch.ones(2, 2)})
    with pytest.raises(GraftError, match=r"ranks are \[0, 2\]; expected positive"):
        rank_cost(spectra_of({"u": update})["u"], [0, 2])
    with pytest.raises(GraftError, match=r"densities are \[1.5\]; expected shares"):
        density_cost(update, [1.5])
    with pytest.raises(DataError, match=r"holds no config\.yaml, which names the validation data"):
        losses(update, tmp_path)
    assert losses(update, None) is None
