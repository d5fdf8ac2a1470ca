"""The disk's arithmetic in numpy, bit for bit against torch's own conversions and the equation in torch."""

import numpy as np
import pytest
import torch

from shadowlit.checkpoint.numeric import (
    graft_bfloat16,
    graft_part,
    is_finite,
    narrow,
    require_finite,
    widen,
)
from shadowlit.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


def every_half(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)


@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_every_half_widens_as_in_torch(code):
    values = every_half(DTYPES[code])
    wanted = values.float().numpy()
    got = widen(raw(values), code)
    assert got.dtype == np.float32
    finite = np.isfinite(wanted)
    assert np.array_equal(got[finite].view(np.uint32), wanted[finite].view(np.uint32))
    assert np.array_equal(np.isnan(got), np.isnan(wanted)) and np.array_equal(np.isinf(got), np.isinf(wanted))


def difficult(dtype):
    """Random bit patterns, numbers at and next to the middle of two halves, subnormals, and large ones."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (300_000,), generator=generator, dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    values = values[torch.isfinite(values)].to(dtype)
    halves = every_half(torch.bfloat16).to(torch.float64)
    halves = halves[torch.isfinite(halves)].sort().values
    middle = (halves[1:] + halves[:-1]) / 2
    near = torch.cat([middle, middle * (1 + 2**-30), middle * (1 - 2**-30), middle * (1 + 2**-24)])
    near = near[near.abs() < 3.3e38]
    return torch.cat([values, near.to(dtype), torch.randn(100_000, generator=generator).to(dtype) * 1e-39])


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("code", DTYPES)
def test_rounding_as_in_torch(source, code):
    values = difficult(source)
    wanted = values.to(DTYPES[code])
    got = narrow(values.numpy(), code)
    assert np.array_equal(got.view(np.uint8).reshape(-1), raw(wanted))


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3, 0.0, -2.0])
def test_part_is_the_equation(code, target, scale):
    generator = torch.Generator().manual_seed(1)
    instruct = (torch.randn(5000, generator=generator) * 0.02).to(DTYPES[code])
    update = torch.randn(5000, generator=generator) * 1e-4
    wide = torch.promote_types(instruct.dtype, torch.float32)
    exact = instruct.to(wide) + scale * update
    stored, size, lost = graft_part(raw(instruct), code, update.numpy().copy(), scale, target)
    assert np.array_equal(widen(stored.view(np.uint8), target), exact.to(DTYPES[target]).to(
        torch.promote_types(DTYPES[target], torch.float32)).numpy())  # fmt: skip
    wanted = (exact.to(DTYPES[target]).to(wide) - exact).double().square().sum()
    assert size == pytest.approx(float((scale * update).double().square().sum()), rel=1e-5)
    assert lost == pytest.approx(float(wanted), rel=1e-2, abs=1e-14)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3, 0.0, -2.0])
@pytest.mark.parametrize("size", [2, 4096, 150_000])
def test_a_part_in_bfloat16_is_the_equation(scale, size):
    """Of several windows and of one pair; with ties, subnormals and large numbers, all that are finite in float32."""
    values = difficult(torch.float32)
    values = values[values.abs() < 1e37].to(torch.bfloat16)
    places = torch.randint(len(values), (3, size), generator=torch.Generator().manual_seed(2))
    base, tuned, instruct = values[places]
    near = slice(size // 4, size // 2)  # updates so small that rounding decides
    tuned[near], instruct[near] = base[near] * 1.01, base[near] * 1.7
    exact = instruct.float() + scale * (tuned.float() - base.float())
    stored, size_of, lost = graft_bfloat16(raw(base), raw(tuned), raw(instruct), scale)
    assert np.array_equal(stored, exact.to(torch.bfloat16).view(torch.uint16).numpy())
    small = torch.randn(3, size, generator=torch.Generator().manual_seed(3)).mul(0.02).to(torch.bfloat16)
    base, tuned, instruct = small
    stored, size_of, lost = graft_bfloat16(raw(base), raw(tuned), raw(instruct), scale)
    update = scale * (tuned.float() - base.float())
    exact = instruct.float() + update
    wanted = exact.to(torch.bfloat16).float() - exact
    assert size_of == pytest.approx(float(update.double().square().sum()), rel=1e-5)
    assert lost == pytest.approx(float(wanted.double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_part_in_bfloat16_that_is_not_finite_is_seen(place, bad):
    parts = torch.full((3, 150_000), 3e38 if bad == 3e38 else 1.0, dtype=torch.bfloat16)
    parts[0] *= -1 if bad == 3e38 else 1
    parts[place, 140_001] = bad
    assert not np.isfinite(graft_bfloat16(*map(raw, parts), 1.0)[1:]).all()


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(code, bad):
    values = torch.ones(100, dtype=DTYPES[code])
    assert is_finite(raw(values), code)
    values[37] = bad
    assert not is_finite(raw(values), code)
    with pytest.raises(CheckpointError, match="1 of 100 values"):
        require_finite("w", raw(values), code)
    with np.errstate(invalid="ignore"):
        squares = graft_part(raw(values), code, np.zeros(100, np.float32), 1.0, "BF16")[1:]
    assert not np.isfinite(squares).all()
    update = np.zeros(100, np.float32)
    update[5] = bad
    assert not np.isfinite(graft_part(raw(torch.ones(100)), "F32", update, 1.0, "BF16")[1:]).all()


def test_overflow_of_the_stored_dtype_is_seen():
    stored, *squares = graft_part(raw(torch.full((4,), 6e4)), "F32", np.full(4, 1e4, np.float32), 1.0, "F16")
    assert not np.isfinite(squares).all() and not is_finite(stored, "F16")
    assert is_finite(raw(torch.tensor([1], dtype=torch.int32)), "F32")  # the smallest subnormal


def test_nothing_is_finite():
    assert is_finite(np.empty(0, np.uint8), "BF16")
