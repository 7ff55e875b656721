import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, nct

from mil_anchor.stats import paired_test

_differences = st.lists(st.integers(-6, 6).map(lambda own: own / 100), min_size=1, max_size=9)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(_differences)
def test_paired__sign_flips__are_counted_as_by_brute_force(differences):
    signs = itertools.product([1, -1], repeat=len(differences))
    means = [np.dot(own, differences) for own in signs]
    expected = np.mean([abs(own) >= abs(sum(differences)) - 1e-9 for own in means])
    assert paired_test(differences).sign_flip_p == expected


@settings(derandomize=True, deadline=None, max_examples=30)
@given(_differences)
def test_paired__wilcoxon__is_the_exact_test_of_mid_ranks(differences):
    # Zeros are dropped; every way to give signs to the ranks is equally likely.
    kept = [own for own in differences if own]
    ranks = scipy.stats.rankdata(np.abs(kept)) if kept else []
    sums = [np.dot(own, ranks) for own in itertools.product([1, -1], repeat=len(kept))]
    observed = np.dot(np.sign(kept), ranks) if kept else 0
    expected = np.mean([abs(own) >= abs(observed) - 1e-9 for own in sums])
    assert paired_test(differences).wilcoxon_p == pytest.approx(expected)


def test_paired__scipy__has_the_same_interval_and_p_values():
    differences = np.random.default_rng(0).normal(0.5, 1, size=12)
    test = paired_test(differences.tolist(), level=0.9)
    student = scipy.stats.ttest_1samp(differences, 0)
    assert test.mean == pytest.approx(differences.mean())
    assert test.interval == pytest.approx(tuple(student.confidence_interval(0.9)))
    assert test.wilcoxon_p == pytest.approx(scipy.stats.wilcoxon(differences).pvalue)
    flipped = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**12
    )
    assert test.sign_flip_p == pytest.approx(flipped.pvalue)


@pytest.mark.parametrize("n", [20, 21, 60])
def test_paired__many_differences__sign_flips_are_near_the_normal_limit(n):
    differences = np.random.default_rng(1).normal(0.3, 1, size=n)
    z = differences.sum() / math.sqrt((differences**2).sum())
    test = paired_test(differences.tolist())
    assert test.sign_flip_p == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), abs=0.01)
    assert paired_test(differences.tolist()) == test
    # No more than the ways that leave all signs alike, and never zero.
    assert 0 < paired_test([1.0] * n).sign_flip_p <= 2 / 2**16


@pytest.mark.parametrize("n", [3, 5, 25])
@pytest.mark.parametrize("population", [0.0, 0.8, -3.0])
def test_paired__effect__is_unbiased_and_its_interval_that_of_the_noncentral_t(n, population):
    # By the definition of the factor: the mean of t under an effect gives that effect back.
    unit = paired_test([1.0, 3.0] + [2.0] * (n - 2))
    sample = unit.mean / np.std([1.0, 3.0] + [2.0] * (n - 2), ddof=1)
    factor = unit.effect / sample
    mean_t = nct.mean(n - 1, population * math.sqrt(n))
    assert factor * mean_t / math.sqrt(n) == pytest.approx(population, abs=1e-9)

    own = np.random.default_rng(n).normal(population, 1, size=n)
    low, high = paired_test(own.tolist(), level=0.9).effect_interval
    t = scipy.stats.ttest_1samp(own, 0).statistic
    assert nct.cdf(t, n - 1, low * math.sqrt(n)) == pytest.approx(0.95, abs=1e-4)
    assert nct.cdf(t, n - 1, high * math.sqrt(n)) == pytest.approx(0.05, abs=1e-4)


def test_paired__effect_of_no_scale__is_continuous_where_the_limit_takes_over():
    def interval(sign, spread):
        return paired_test([sign * (1 + spread * own) for own in (-1, 0, 0, 1)]).effect_interval

    # t is 2 / sd of the mean: just below and just above 1000.
    below, above = (interval(1, math.sqrt(6) / t) for t in (999.9, 1000.1))
    assert above == pytest.approx(below, rel=1e-3)
    low, high = interval(1, 1e-8)
    assert 1e7 < low < high < 1e9
    assert interval(-1, 1e-8) == pytest.approx((-high, -low))


def test_paired__one_difference__has_an_infinite_interval():
    test = paired_test([0.02])
    assert test[:4] == (0.02, (-math.inf, math.inf), 1.0, 1.0)
    assert all(math.isnan(own) for own in (test.effect, *test.effect_interval))


@pytest.mark.parametrize("n", [2, 5, 30])
def test_paired__no_difference_at_all__has_p_value_1_and_no_effect_size(n):
    test = paired_test([0] * n)
    assert test[:4] == (0.0, (0.0, 0.0), 1.0, 1.0)
    assert all(math.isnan(own) for own in (test.effect, *test.effect_interval))


def test_paired__equal_differences_up_to_rounding__vary_by_nothing():
    test = paired_test([0.3 - 0.2, 0.4 - 0.3, 0.5 - 0.4])
    assert test.interval == pytest.approx((0.1, 0.1))
    assert (test.wilcoxon_p, test.sign_flip_p) == (0.25, 0.25)
    assert math.isnan(test.effect)


def test_paired__ties_up_to_rounding__are_ties():
    noisy = [0.3 - 0.2, 0.4 - 0.3, 0.9 - 1.0, 0.5 - 0.3]
    assert len({abs(own) for own in noisy}) == 3
    assert paired_test(noisy).wilcoxon_p == paired_test([0.1, 0.1, -0.1, 0.2]).wilcoxon_p == 0.5


def test_paired__ties_up_to_a_stated_rounding__are_ties():
    float32 = [0.07142857, -0.07142863, 0.14285708, 3e-8]
    test = paired_test(float32, rounding=1e-6)
    exact = paired_test([0.1, -0.1, 0.2, 0.0])
    assert test[2:4] == exact[2:4] == (0.75, 0.75)
    assert paired_test(float32).sign_flip_p < 0.75
    assert test.mean == pytest.approx(np.mean(float32), abs=1e-6)
    assert math.isnan(paired_test([0.1, 0.1 + 5e-8, 0.1], rounding=1e-6).effect)


def test_paired__two_differences__have_an_interval_but_no_effect_size():
    test = paired_test([0.1, 0.3])
    assert test.interval == pytest.approx((0.2 - 1.2706, 0.2 + 1.2706), abs=1e-4)
    assert math.isnan(test.effect)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(_differences, st.randoms(use_true_random=False))
def test_paired__signs_flipped_scaled_or_reordered__says_the_same(differences, random):
    test = paired_test(differences)
    flipped = paired_test([-own for own in differences])
    assert (flipped.mean, *flipped[2:4]) == pytest.approx((-test.mean, *test[2:4]))
    assert flipped.effect == pytest.approx(-test.effect, nan_ok=True)
    low, high = flipped.effect_interval
    assert (-high, -low) == pytest.approx(test.effect_interval, nan_ok=True, abs=1e-5)
    scaled = paired_test([1000 * own for own in differences])
    assert scaled[2:4] == test[2:4]
    assert scaled.effect == pytest.approx(test.effect, nan_ok=True)
    reordered = list(differences)
    random.shuffle(reordered)
    assert paired_test(reordered).sign_flip_p == test.sign_flip_p


def test_paired__no_effect__is_rejected_as_often_as_the_level_says():
    # Of eight differences, the twelve of 256 ways below .05 are rejected.
    low, high = binom.ppf([0.0005, 0.9995], 600, 12 / 256)
    generator = np.random.default_rng(0)
    tests = [paired_test(generator.normal(size=8).tolist()) for _ in range(600)]
    assert low <= sum(own.sign_flip_p <= 0.05 for own in tests) <= high
    assert binom.ppf(0.0005, 600, 0.95) <= sum(
        own.interval[0] <= 0 <= own.interval[1] for own in tests
    )
    assert binom.ppf(0.0005, 600, 0.95) <= sum(
        own.effect_interval[0] <= 0 <= own.effect_interval[1] for own in tests
    )


@pytest.mark.parametrize("differences", [[], [0.1, math.nan], [math.inf]])
def test_paired__nothing_or_not_finite__is_refused(differences):
    with pytest.raises(ValueError, match="needs finite differences, but got"):
        paired_test(differences)


def test_paired__level_in_percent__is_refused():
    with pytest.raises(ValueError, match=r"level must lie between 0 and 1, .* got 95"):
        paired_test([0.1, 0.2], level=95.0)
