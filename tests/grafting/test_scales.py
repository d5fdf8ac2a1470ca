"""Scales of groups of tensors: Adam on derivatives that are known, and the groups."""

import math

import pytest
import torch

from shadowlit.errors import GraftError
from shadowlit.grafting.arithmetic import inner_product
from shadowlit.grafting.scales import FitScales, Keep, Measured, fit, group_of

NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"]


def quadratic(best):
    """``½ Σ (λ_g − best_g)²`` and its derivatives."""

    def measure(scales, with_slopes):
        slopes = {group: value - best[group] for group, value in scales.items()}
        return Measured(sum(x * x for x in slopes.values()) / 2, 0.0, slopes if with_slopes else {})

    return measure


@pytest.mark.parametrize(("groups", "expected"), [
    ("layer", ["layer_00", "layer_01", "other"]),
    ("kind", ["q_proj", "q_proj", "lm_head"]),
    ("tensor", [name.removesuffix(".weight") for name in NAMES]),
    ("all", ["all"] * 3),
])  # fmt: skip
def test_groups(groups, expected):
    assert [group_of(name, groups) for name in NAMES] == expected
    assert group_of(NAMES[0].replace("weight", "bias"), groups) == expected[0]


def test_the_minimum_is_found():
    best = {"layer_00": 0.7, "layer_01": 1.0, "other": 1.2}
    fitted = fit(quadratic(best), NAMES, FitScales("x", steps=100, lr=0.05, pull=0))
    assert fitted.scales == pytest.approx(best, abs=1e-3) and fitted.start == 1
    assert fitted.scales["layer_01"] == 1  # its derivative is zero, and it does not move
    assert list(fitted.by_tensor.values()) == list(fitted.scales.values())
    assert all(value == float(torch.tensor(value, dtype=torch.float32)) for value in fitted.scales.values())


def test_the_first_step_is_adams():
    """After one step every scale has moved by the step size against its derivative's sign, however small it is."""
    best = {"layer_00": 0.0, "layer_01": 1.0 + 1e-6, "other": 1.5}
    fitted = fit(quadratic(best), NAMES, FitScales("x", steps=1, lr=0.05, pull=0))
    assert fitted.scales == pytest.approx({"layer_00": 0.95, "layer_01": 1.05, "other": 1.05}, abs=1e-6)
    assert fitted.history[0]["loss"] == pytest.approx((1 + 0.25) / 2) and fitted.step == 1


def test_the_pull_is_towards_the_start():
    """Of ½ (λ − 0)² + pull (λ − 1)² for one group the minimum is 2 pull / (1 + 2 pull): 1/2 for a pull of ½."""
    fitted = fit(quadratic({"q_proj": 0.0}), NAMES[:2], FitScales("x", groups="kind", steps=200, lr=0.05, pull=0.5))
    assert fitted.scales["q_proj"] == pytest.approx(0.5, abs=1e-3)
    assert fitted.history[-1]["objective"] == pytest.approx(0.125 + 0.5 * 0.25, abs=1e-5)


def test_one_scale_for_everything_is_reported_as_one():
    """Of ½ (λ − 0.7)², which is 0.045 at 1 and 0 at the minimum."""
    fitted = fit(quadratic({"all": 0.7}), NAMES, FitScales("x", groups="all", steps=100, lr=0.05, pull=0))
    assert fitted.scales == pytest.approx({"all": 0.7}, abs=1e-3)
    assert fitted.by_tensor == dict.fromkeys(NAMES, fitted.scales["all"])
    assert fitted.line.startswith("scales: one for all tensors, 0.700: calibration loss 0.04500 → ")


def test_scales_that_the_steps_could_not_move_further_are_reported():
    """Of minima at 0.7, which 20 steps of 0.05 · (1 − step / 20) reach, and 3, which they don't: Σ = 0.525."""
    best = {"layer_00": 0.7, "layer_01": 3.0, "other": 1.0}
    fitted = fit(quadratic(best), NAMES, FitScales("x", pull=0))
    assert fitted.reach == pytest.approx(sum(0.05 * (1 - step / 20) for step in range(20)))
    assert fitted.scales["layer_01"] == pytest.approx(1.525, abs=0.01)
    assert fitted.line.endswith("; 1 of 3 as far from 1 as 20 steps can move them: raise steps or lr")
    assert "as far" not in fit(quadratic(best), NAMES, FitScales("x", steps=100, pull=0)).line


def test_the_best_visited_scales_are_the_result():
    """A loss that any change makes worse leaves the start, although the steps were taken."""

    def worse(scales, _):
        return Measured(sum(abs(x - 1) for x in scales.values()), 0.0, dict.fromkeys(scales, 1.0))

    fitted = fit(worse, NAMES, FitScales("x", steps=3), start=1.0)
    assert fitted.step == 0 and set(fitted.scales.values()) == {1.0} and len(fitted.history) == 4


def test_the_divergence_counts_with_its_weight():
    options = FitScales("x", steps=1, keep=Keep("y", 3))
    found = fit(lambda scales, _: Measured(1.0, 2.0, dict.fromkeys(scales, 0.0)), NAMES, options)
    assert found.history[0]["objective"] == 7


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(loss):
    with pytest.raises(GraftError, match=r"after 0 of 2 steps.* Lower graft\.fit_scales\.lr"):
        fit(lambda scales, _: Measured(loss, 0.0, {}), NAMES, FitScales("x", steps=2))


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"lr": 0}, {"pull": -1}, {"keep": Keep("y", 0)}, {"keep": Keep("y", math.inf)}, {"batch_size": 0},
    {"keep": Keep("x")}, {"keep": Keep("./y/../x")}, {"groups": "layers"},
])  # fmt: skip
def test_options_out_of_range_are_errors(wrong):
    with pytest.raises(GraftError, match="fit_scales"):
        FitScales("x", **wrong)


@pytest.mark.parametrize(("dtypes", "error"), [((torch.float64,) * 2, 1e-9), ((torch.bfloat16, torch.float32), 0.1)])
def test_inner_products(dtypes, error):
    """Of 153,900 elements, whose norm is 392 each."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(513, 300, generator=generator).to(dtype) for dtype in dtypes)
    expected = (left.double() * right.double()).sum().item()
    assert inner_product(left, right).item() == pytest.approx(expected, abs=error)
