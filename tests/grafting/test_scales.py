"""Scales of groups of tensors: minima of functions with known derivatives, and the groups."""

import math

import pytest
import torch

from shadowlit.errors import GraftError
from shadowlit.grafting.arithmetic import inner_product
from shadowlit.grafting.scales import FitScales, Keep, Measured, fit, group_of

NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"]


def quadratic(best, curvature=1.0):
    """``½ c Σ (λ_g − best_g)²`` and its derivatives."""

    def measure(scales):
        slopes = {group: curvature * (value - best[group]) for group, value in scales.items()}
        return Measured(sum(x * x for x in slopes.values()) / (2 * curvature), 0.0, slopes)

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


@pytest.mark.parametrize("curvature", [0.1, 1.0, 100.0])
def test_the_minimum_is_found(curvature):
    best = {"layer_00": 0.7, "layer_01": 1.0, "other": 3.2}
    fitted = fit(quadratic(best, curvature), NAMES, FitScales("x", pull=0))
    assert fitted.scales == pytest.approx(best, abs=1e-3) and fitted.start == 1 and not fitted.ended
    assert fitted.scales["layer_01"] == 1  # its derivative is zero, and it does not move
    assert list(fitted.by_tensor.values()) == list(fitted.scales.values())
    assert all(value == float(torch.tensor(value, dtype=torch.float32)) for value in fitted.scales.values())


def test_a_steep_wall_is_left_behind():
    """``(λ − 0.2)² + 4 exp(20 (λ − 1))`` from 1, where the slope is 80, to the flat minimum."""

    def measure(scales):
        (value,) = scales.values()
        wall = 4 * math.exp(20 * (value - 1))
        return Measured((value - 0.2) ** 2 + wall, 0.0, {"all": 2 * (value - 0.2) + 20 * wall})

    fitted = fit(measure, NAMES, FitScales("x", groups="all", pull=0))
    values = [scale / 1e5 for scale in range(1, 200_000)]
    expected = min(values, key=lambda value: (value - 0.2) ** 2 + 4 * math.exp(20 * (value - 1)))
    assert fitted.scales["all"] == pytest.approx(expected, abs=5e-3)


def test_the_first_step_has_one_length():
    """A quarter down the slopes, however steep they are."""
    best = {"layer_00": 1.0, "layer_01": 4.0, "other": -3.0}
    fitted = fit(quadratic(best, 1e4), NAMES, FitScales("x", steps=2, pull=0))
    assert fitted.history[1]["loss"] == pytest.approx(1e4 * ((3 - 0.15) ** 2 + (4 - 0.2) ** 2) / 2, rel=1e-5)
    assert fitted.scales == pytest.approx({"layer_00": 1.0, "layer_01": 1.15, "other": 0.8}) and fitted.step == 1


def test_the_pull_is_towards_the_start():
    """Of ½ (λ − 0)² + pull (λ − 1)² for one group the minimum is 2 pull / (1 + 2 pull): 1/2 for a pull of ½."""
    fitted = fit(quadratic({"q_proj": 0.0}), NAMES[:2], FitScales("x", groups="kind", pull=0.5))
    assert fitted.scales["q_proj"] == pytest.approx(0.5, abs=1e-3)
    assert fitted.history[-1]["objective"] == pytest.approx(0.125 + 0.5 * 0.25, abs=1e-5)


def test_one_scale_for_everything_is_reported_as_one():
    """Of ½ (λ − 0.7)², which is 0.045 at 1 and 0 at the minimum."""
    fitted = fit(quadratic({"all": 0.7}), NAMES, FitScales("x", groups="all", pull=0))
    assert fitted.scales == pytest.approx({"all": 0.7}, abs=1e-3)
    assert fitted.by_tensor == dict.fromkeys(NAMES, fitted.scales["all"])
    assert fitted.line.startswith("scales: one for all tensors, 0.700: calibration loss 0.04500 → ")


def test_a_fit_that_its_passes_have_ended_is_reported():
    best = {"layer_00": 0.7, "layer_01": 9.0, "other": 1.0}
    fitted = fit(quadratic(best), NAMES, FitScales("x", steps=3, pull=0))
    assert len(fitted.history) == 3 and fitted.line.endswith("; all steps were taken before the end: raise steps")
    assert "raise" not in fit(quadratic(best), NAMES, FitScales("x", pull=0)).line


def test_the_best_visited_scales_are_the_result():
    """A loss that any change makes worse leaves the start, although steps were taken."""

    def worse(scales):
        return Measured(sum(abs(x - 1) for x in scales.values()), 0.0, dict.fromkeys(scales, 1.0))

    fitted = fit(worse, NAMES, FitScales("x"), start=1.0)
    assert fitted.step == 0 and set(fitted.scales.values()) == {1.0} and 1 < len(fitted.history) < 60
    assert fitted.line.endswith("; the line search found nothing lower")


def test_a_step_that_is_too_far_does_not_lose_the_steps_before():
    """``(λ − 3)²`` up to 1.5, where it stops being a number: the scales before that are the result."""

    def measure(scales):
        value = scales["all"]
        return Measured((value - 3) ** 2 if value < 1.5 else math.nan, 0.0, {"all": 2 * (value - 3)})

    fitted = fit(measure, NAMES, FitScales("x", groups="all", pull=0))
    assert fitted.scales["all"] == 1.25 and fitted.about["ended"] in fitted.line
    assert fitted.line.endswith("; pass 3 had a loss or a derivative that was not finite: raise pull")


def test_the_divergence_counts_with_its_weight():
    options = FitScales("x", steps=1, keep=Keep("y", 3))
    found = fit(lambda scales: Measured(1.0, 2.0, dict.fromkeys(scales, 0.0)), NAMES, options)
    assert found.history[0]["objective"] == 7


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(loss):
    with pytest.raises(GraftError, match=r"at a scale of 1, or a derivative.* Check the rows"):
        fit(lambda scales: Measured(loss, 0.0, {}), NAMES, FitScales("x", steps=2))


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"pull": -1}, {"pull": math.nan}, {"keep": Keep("y", 0)}, {"keep": Keep("y", math.inf)},
    {"batch_size": 0}, {"keep": Keep("x")}, {"keep": Keep("./y/../x")}, {"groups": "layers"},
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
