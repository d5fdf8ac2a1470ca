import math

import pytest
import torch

from shadowlit.analysis.evolution import evolution_table, evolutions, of_deltas
from shadowlit.delta.delta import Delta
from shadowlit.errors import DataError

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def at(x, y):
    return Delta.of({UP: torch.tensor([[float(x)]]), DOWN: torch.tensor([[float(y)]])})


def test_a_path_by_hand():
    """From (0, 0) to (1, 0), on to (1, 1), back to (0, 1): a right angle, then another one against the update."""
    found = of_deltas([2, 4, 6], [at(1, 0), at(1, 1), at(0, 1)])
    half = 1 / math.sqrt(2)
    assert found.steps == (2, 4, 6)
    assert found.norms == pytest.approx((1, math.sqrt(2), 1))
    assert found.to_last == pytest.approx((0, half, 1))
    assert found.moved == pytest.approx((1, 1, 1))
    assert math.isnan(found.to_previous[0]) and found.to_previous[1:] == pytest.approx((0, -half))
    assert found.kinds["up_proj"] == pytest.approx((1, 1, 0)) and found.kinds["down_proj"] == pytest.approx((0, 1, 1))
    assert evolution_table({"r": found}).rows[2][:3] == ("r", 6, pytest.approx(1))


def test_straight_on():
    found = of_deltas([1, 2], [at(1, 2), at(3, 6)])
    assert found.to_previous[1] == pytest.approx(1) and found.to_last == pytest.approx((1, 1))
    assert found.moved == pytest.approx((math.sqrt(5), 2 * math.sqrt(5)))


def test_a_first_checkpoint_alone():
    found = of_deltas([8], [at(3, 4)])
    assert (found.steps, found.norms, found.to_last) == ((8,), (5.0,), (1.0,))
    assert found.kinds == {"down_proj": (4.0,), "up_proj": (3.0,)}


def test_standing_still():
    """A checkpoint twice: no direction of what didn't move."""
    found = of_deltas([1, 2], [at(1, 0), at(1, 0)])
    assert found.moved[1] == 0 and math.isnan(found.to_previous[1])


def test_errors(tmp_path):
    with pytest.raises(DataError, match="most is 27; expected 2 to 26"):
        evolutions({"run": tmp_path}, 27)
    with pytest.raises(DataError, match=r"holds no complete \*.ckpt"):
        evolutions({"run": tmp_path})
