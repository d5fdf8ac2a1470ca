import math
import time

import numpy as np
import pytest
import scipy.stats

from shadowlit.errors import DataError
from shadowlit.studies.statistics import average, few_seeds, mean_interval, paired_bootstrap, spearman


def one(differences, **options):
    return paired_bootstrap({"new": np.array(differences, dtype=float)}, [["new"]], **options)[0]


def test_mean_and_standard_error_by_hand():
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, s = √7, s/√3 = √(7/3)
    found = average([1.0, 2.0, 6.0])
    assert found.mean == 3.0 and found.standard_error == pytest.approx(math.sqrt(7 / 3), rel=1e-12)
    assert (found.count, found.expected) == (3, 3)


def test_what_was_not_measured_is_counted_and_not_averaged():
    found = average([1.0, math.nan, 3.0, math.inf])
    assert (found.mean, found.standard_error, found.count, found.expected) == (2.0, 1.0, 2, 4)
    assert math.isnan(average([5.0]).standard_error)
    nothing = average([math.nan], expected=3)
    assert math.isnan(nothing.mean) and (nothing.count, nothing.expected) == (0, 3)


@pytest.mark.parametrize(("num_seeds", "student"), [(2, 12.7062), (3, 4.3027), (12, 2.2010), (31, 2.0423)])
def test_an_interval_over_seeds_is_students(num_seeds, student):
    """1, 2, … n: mean (n + 1) / 2, s² = n (n + 1) / 12; quantiles from a printed table, also beyond ten seeds."""
    mean, low, high = mean_interval([float(value) for value in range(1, num_seeds + 1)])
    half = student * math.sqrt((num_seeds + 1) / 12)
    assert (mean, low, high) == pytest.approx(((num_seeds + 1) / 2, mean - half, mean + half), rel=1e-4)


def test_one_seed_has_no_interval():
    mean, low, high = mean_interval([2.0, math.nan])
    assert mean == 2.0 and math.isnan(low) and math.isnan(high)


def test_rows_of_one_seed_are_drawn_as_scipy_draws_them():
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=120)
    reference = scipy.stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(2)
    ).confidence_interval
    found = one([differences])
    assert found.difference == pytest.approx(differences.mean(), abs=1e-12)
    assert found.low == pytest.approx(reference.low, abs=0.01)
    assert found.high == pytest.approx(reference.high, abs=0.01)
    assert (found.num_seeds, found.num_rows) == (1, 120)


def test_resampled_seeds_are_drawn_as_scipy_draws_them():
    means = np.array([0.02, 0.1, 0.05, 0.3, 0.11, 0.07, 0.21, 0.14])
    reference = scipy.stats.bootstrap(
        (means,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(2)
    ).confidence_interval
    found = one(np.repeat(means[:, None], 50, axis=1), seeds="resampled")  # rows are alike: only seeds vary
    assert found.low == pytest.approx(reference.low, abs=0.005)
    assert found.high == pytest.approx(reference.high, abs=0.005)


def test_where_only_seeds_vary_the_interval_is_students():
    means = np.array([0.02, 0.10, 0.09])
    reference = scipy.stats.t.interval(0.95, 2, loc=means.mean(), scale=means.std(ddof=1) / math.sqrt(3))
    found = one(np.repeat(means[:, None], 50, axis=1), draws=200_000)
    assert (found.low, found.high) == pytest.approx(reference, abs=0.003)


def test_seeds_that_answer_the_same_rows_are_no_further_rows():
    # all seeds agree on every row: the uncertainty is that of 100 rows, not of 300
    row = np.array([1.0] * 30 + [0.0] * 70)
    width = 2 * 1.96 * math.sqrt(0.3 * 0.7 / 100)
    found = one([row, row, row])
    assert found.high - found.low == pytest.approx(width, rel=0.06)


def test_rows_of_two_evaluators_vary_independently_and_weigh_alike():
    # variance of the unweighted mean of two means: (p q / 100 + p q / 400) / 4
    a, b = np.array([[1.0] * 50 + [0.0] * 50]), np.array([[1.0] * 200 + [0.0] * 200])
    (found,) = paired_bootstrap({"a": a, "b": b}, [["a", "b"]])
    assert found.difference == 0.5 and found.num_rows == 500
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt((0.25 / 100 + 0.25 / 400) / 4), rel=0.05)


def test_the_same_seed_gives_the_same_interval_and_another_level_a_wider_one():
    differences = np.random.default_rng(0).normal(size=(3, 60))
    assert one(differences) == one(differences)
    assert one(differences) != one(differences, seed=1)
    assert one(differences, level=0.99).low < one(differences).low < one(differences, level=0.5).low


@pytest.mark.parametrize(("shift", "sign"), [(0.5, 1), (-0.5, -1), (0.0, 0)])
def test_the_sign_is_that_of_the_whole_interval(shift, sign):
    found = one([[shift - 0.1, shift, shift + 0.1] * 20])
    assert found.sign == sign and (-found).sign == -sign
    assert (-found).low == -found.high


@pytest.mark.parametrize("differences", [[[0.0, math.nan]], np.zeros((0, 4)), np.zeros((2, 0)), [0.0, 1.0]])
def test_what_is_missing_is_refused(differences):
    with pytest.raises(DataError, match="expected finite"):
        one(differences)


def test_unequal_seeds_are_refused():
    with pytest.raises(DataError, match="differ in their seeds"):
        paired_bootstrap({"a": np.zeros((2, 4)), "b": np.zeros((3, 4))}, [["a", "b"]])


def test_ten_thousand_draws_of_many_rows_are_fast():
    differences = {name: np.random.default_rng(0).integers(-1, 2, (3, 500)).astype(float) for name in "abcd"}
    start = time.perf_counter()
    paired_bootstrap(differences, [["a", "b", "c", "d"]])
    assert time.perf_counter() - start < 1


def coverage(seeds: str) -> float:
    """Share of experiments whose interval holds the truth (0): 3 seeds that differ more than the rows do."""
    generator, held = np.random.default_rng(0), 0
    for experiment in range(300):
        differences = generator.normal(0, 0.15, (3, 1)) + generator.normal(0, 0.1, 150)
        differences = differences + generator.normal(0, 0.3, (3, 150))
        held += one(differences, draws=400, seed=experiment, seeds=seeds).sign == 0
    return held / 300


def test_intervals_of_three_seeds_hold_the_truth_as_often_as_they_say():
    assert coverage("student") > 0.9
    assert coverage("resampled") < 0.85  # why seeds are not resampled


def test_rank_correlation_is_scipys():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 6, 30).astype(float)  # with ties
    y = x + generator.normal(0, 3, 30)
    found = spearman(list(x), list(y))
    assert found.rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert (found.count, found.low, found.high, found.caution) == (30, x.min(), x.max(), "")


def test_weighted_rows_give_the_interval_of_a_ratio():
    """Of sums over resampled rows, of which the one is a loss and the other its tokens; all seeds are alike."""
    generator = np.random.default_rng(1)
    weights, values = generator.integers(1, 20, 200).astype(float), generator.normal(0.3, 1.0, 200)
    found = np.stack([values, values, values])
    (interval,) = paired_bootstrap({"loss": found}, [["loss"]], weights={"loss": weights})
    assert interval.difference == pytest.approx((values @ weights) / weights.sum(), rel=1e-12)
    drawn = generator.multinomial(200, np.full(200, 1 / 200), size=10_000)
    ratios = (drawn @ (values * weights)) / (drawn @ weights)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=0.01)


def test_rank_correlation_by_hand_and_its_cautions():
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6·4 / (4·15) = 0.6; the NaN is left out
    found = spearman([1.0, 2.0, 3.0, 4.0, 5.0], [20.0, 10.0, 40.0, 30.0, math.nan])
    assert found.rho == pytest.approx(0.6) and found.count == 4 and found.caution == "only 4 runs"
    assert spearman([0.02] * 12, range(12)).caution == "the same in all runs"
    assert math.isnan(spearman([0.02] * 12, range(12)).rho)
    assert spearman([1 + i / 1000 for i in range(12)], range(12)).caution == "tiny range"
    assert spearman([math.nan], [1.0]).caution == "not measured"
    assert math.isnan(spearman([1.0, 2.0], [1.0, 2.0]).rho)


@pytest.mark.parametrize("num_seeds", [2, 3, 10])
def test_the_factor_of_few_seeds_is_students(num_seeds):
    told = few_seeds(num_seeds)
    assert f"{scipy.stats.t.ppf(0.975, num_seeds - 1):.1f} times" in told


def test_one_seed_and_many_are_told():
    assert "nothing is known of other trainings" in few_seeds(1)
    assert "times" not in few_seeds(20)
