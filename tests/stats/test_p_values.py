import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2, norm

from mil_anchor.stats import combine_p_values, holm

_p_values = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(1e-9, 1), min_size=2, max_size=6))
def test_combine__independent__is_the_tail_of_the_sum_of_logarithms(p_values):
    expected = chi2.sf(-2 * sum(math.log(own) for own in p_values), 2 * len(p_values))
    assert combine_p_values(p_values, independent=True) == pytest.approx(expected)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(_p_values)
def test_combine__not_independent__is_twice_the_mean(p_values):
    combined = combine_p_values(p_values, independent=False)
    if len(p_values) == 1:
        assert combined == p_values[0]
    else:
        assert combined == pytest.approx(min(1, 2 * sum(p_values) / len(p_values)))


@pytest.mark.parametrize("independent", [True, False])
def test_combine__single_nan_zero_and_one__answers_as_documented(independent):
    assert combine_p_values([0.03], independent=independent) == 0.03
    assert math.isnan(combine_p_values([0.03, math.nan], independent=independent))
    assert math.isnan(combine_p_values([math.nan], independent=independent))
    # A fold on which the models agree takes nothing from the others' evidence but its own.
    assert combine_p_values([0.001, 0.002, 1.0], independent=True) < 0.001
    assert combine_p_values([0, 1], independent=True) == 0
    assert combine_p_values([0.0, 1.0], independent=False) == 1


@pytest.mark.parametrize(
    ("independent", "shared"), [(True, 0.0), (False, 0.0), (False, 0.9), (False, 1.0)]
)
def test_combine__no_difference__is_rejected_at_most_as_often_as_the_level_says(
    independent, shared
):
    generator = np.random.default_rng(0)
    own, common = generator.normal(size=(500, 5)), generator.normal(size=(500, 1))
    p_values = 2 * norm.sf(abs(math.sqrt(shared) * common + math.sqrt(1 - shared) * own))
    combined = [combine_p_values(row.tolist(), independent=independent) for row in p_values]
    rejected = sum(own <= 0.05 for own in combined)
    low, high = binom.ppf([0.0005, 0.9995], 500, 0.05)
    assert rejected <= high
    assert rejected >= low or not independent


def _holm_by_steps(p_values):
    """Holm's procedure: the smallest level at which each is rejected."""
    adjusted = []
    for own in p_values:
        levels = sorted(
            {min(1.0, factor * p) for p in p_values for factor in range(1, len(p_values) + 1)}
        )
        for level in levels:
            ordered, n_rejected = sorted(p_values), 0
            while (
                n_rejected < len(ordered)
                and (len(ordered) - n_rejected) * ordered[n_rejected] <= level
            ):
                n_rejected += 1
            if level == 1 or own in ordered[:n_rejected]:
                adjusted.append(level)
                break
    return adjusted


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 64).map(lambda own: own / 64), min_size=1, max_size=5))
def test_holm__p_values__are_the_levels_at_which_his_procedure_rejects(p_values):
    assert holm(p_values) == _holm_by_steps(p_values)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(_p_values, st.randoms(use_true_random=False))
def test_holm__p_values__rise_keep_their_order_and_follow_it(p_values, random):
    adjusted = holm(p_values)
    assert all(1 >= new >= old for new, old in zip(adjusted, p_values, strict=True))
    by_old = sorted(range(len(p_values)), key=lambda index: p_values[index])
    in_order = [adjusted[index] for index in by_old]
    assert in_order == sorted(in_order)
    pairs = list(zip(p_values, adjusted, strict=True))
    random.shuffle(pairs)
    assert holm([old for old, _ in pairs]) == [new for _, new in pairs]


def test_holm__nan__stays_and_counts_for_nothing():
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[::2] == [0.04, 0.04]
    assert math.isnan(adjusted[1])
    assert holm([]) == []
    assert math.isnan(holm([math.nan])[0])


def test_p_values__outside_of_the_interval_or_none__are_refused():
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], but got \[1.2\]"):
        holm([0.1, 1.2])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], but got \[-0.1\]"):
        combine_p_values([0.1, -0.1], independent=True)
    with pytest.raises(ValueError, match="needs a p-value, but none came"):
        combine_p_values([], independent=True)
