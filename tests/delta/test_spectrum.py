import math

import pytest
import torch

from shadowlit.delta.spectrum import effective_rank, singular_values, stable_rank
from shadowlit.errors import ShadowlitError


def with_spectrum(spectrum, rows, columns, seed=0):
    """A float32 matrix with these singular values: orthonormal factors around them, made in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(spectrum, dtype=torch.float64)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64, generator=generator)).Q
        for size in (rows, columns)
    )
    return ((left * values) @ right.T).float()


def entropy_rank(spectrum):
    total = math.fsum(spectrum)
    return math.exp(-math.fsum(s / total * math.log(s / total) for s in spectrum if s))


SPECTRA = {
    "flat": [2.0] * 40,
    "one direction": [3.0],
    "power law": [1 / (i + 1) for i in range(60)],
    "six decades": [10 ** (-6 * i / 59) for i in range(60)],
    "spike over noise": [1e3] + [1e-2] * 59,
}


@pytest.mark.parametrize("shape", [(200, 60), (60, 200), (60, 60)])
@pytest.mark.parametrize("name", SPECTRA)
def test_ranks_of_known_spectra(name, shape):
    spectrum = SPECTRA[name]
    matrix = with_spectrum(spectrum, *shape)
    assert effective_rank(matrix) == pytest.approx(entropy_rank(spectrum), rel=1e-3)
    expected = math.fsum(s * s for s in spectrum) / max(spectrum) ** 2
    assert stable_rank(matrix) == pytest.approx(expected, rel=1e-5)


def test_values_are_those_of_an_svd_in_float64():
    matrix = torch.randn(300, 90, generator=torch.Generator().manual_seed(1)).bfloat16()
    values = singular_values(matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix.double()), rtol=1e-10, atol=0)
    assert effective_rank(values) == effective_rank(matrix)
    assert stable_rank(values) == stable_rank(matrix)


def test_blocks_as_in_one(monkeypatch):
    matrix = torch.randn(70, 30, generator=torch.Generator().manual_seed(2))
    whole = singular_values(matrix)
    monkeypatch.setattr("shadowlit.delta.spectrum._BLOCK", 7)
    torch.testing.assert_close(singular_values(matrix.T), whole, rtol=1e-12, atol=0)


def test_scale_does_not_matter():
    matrix = with_spectrum(SPECTRA["power law"], 100, 80)
    assert effective_rank(matrix * 1e-20) == pytest.approx(effective_rank(matrix), rel=1e-6)


def test_low_rank_of_many_rows_is_not_lifted_by_rounding():
    """A product of two exact factors has rank 4; the other 508 values are rounding, and must not count."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randint(-8, 9, (512, 4), generator=generator).float() for _ in range(2))
    matrix = left @ right.T  # integers: exact
    values = singular_values(matrix)
    assert int((values > 0).sum()) == 4
    assert effective_rank(matrix) == pytest.approx(entropy_rank(values[:4].tolist()), rel=1e-12)


def test_nothing_to_tell():
    assert math.isnan(effective_rank(torch.zeros(4, 3)))
    assert math.isnan(stable_rank(torch.zeros(0, 3)))
    with pytest.raises(ShadowlitError, match=r"shape \(2, 3, 4\) has no singular values"):
        effective_rank(torch.zeros(2, 3, 4))
    with pytest.raises(ShadowlitError, match="NaN or infinities"):
        stable_rank(torch.tensor([[1.0, math.nan]]))
