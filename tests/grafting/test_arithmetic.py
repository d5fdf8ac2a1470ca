import pytest
import torch

from shadowlit.grafting.arithmetic import add_delta, delta, graft


def normal(seed: int, std: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(64, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std).to(dtype)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, -1.5])
def test_graft_is_the_equation(scale):
    instruct, tuned, base = normal(0, 0.02), normal(1, 0.02), normal(2, 0.02)
    expected = instruct.double() + scale * (tuned.double() - base.double())
    assert torch.equal(graft(instruct.double(), tuned.double(), base.double(), scale), expected)
    # Three roundings, of the difference, the product and the sum, each by half of a unit in the last place at most.
    update = scale * (tuned.double() - base.double())
    bound = 2**-24 * (expected.abs() + 2 * update.abs()) * (1 + 2**-20)
    assert ((graft(instruct, tuned, base, scale).double() - expected).abs() <= bound).all()


def test_half_precision_inputs_are_computed_in_float32():
    # 1 and 1.0078125 are neighbours in bfloat16; their sum with 0.001 is not representable there.
    instruct = torch.tensor([1.0], dtype=torch.bfloat16)
    tuned, base = torch.tensor([0.001], dtype=torch.float32), torch.zeros(1, dtype=torch.bfloat16)
    grafted = graft(instruct, tuned, base)
    assert grafted.dtype == torch.float32
    assert grafted.item() == pytest.approx(1.001, abs=1e-7)


def test_an_untouched_base_gives_the_instruct_bit_for_bit():
    instruct, base = normal(0, 0.02, torch.bfloat16), normal(1, 0.02, torch.bfloat16)
    assert torch.equal(graft(instruct, base, base, 1.0).to(torch.bfloat16), instruct)


def test_delta_and_add_delta_make_the_graft():
    instruct, tuned, base = normal(0, 0.02), normal(1, 0.02), normal(2, 0.02)
    assert torch.equal(add_delta(instruct, delta(tuned, base), 0.7), graft(instruct, tuned, base, 0.7))


@pytest.mark.parametrize(("std", "error"), [(1e-3, 0.035), (3e-4, 0.11), (1e-4, 0.33), (3e-5, 0.71)])
def test_small_updates_are_lost_in_bfloat16_as_measured(std, error):
    """Relative error of an update of ``std`` on weights of std 0.02, stored in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    instruct = (torch.randn(400_000, generator=generator) * 0.02).bfloat16()
    update = torch.randn(400_000, generator=generator) * std
    grafted = add_delta(instruct, update)
    lost = grafted.bfloat16().float() - grafted
    assert (lost.norm() / update.norm()).item() == pytest.approx(error, rel=0.1)
