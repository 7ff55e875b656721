import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import f1_score

from mil_anchor.stats import permutation_test


@st.composite
def _predictions(draw, max_bags=9):
    n_classes, n_bags = draw(st.integers(2, 3)), draw(st.integers(1, max_bags))
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    return tuple(generator.integers(0, n_classes, size=(3, n_bags)))


def _f1(labels, predictions):
    return f1_score(labels, predictions, average="macro")


def _brute_force(labels, one, other, group):
    """The p-value over all ways to swap all groups."""
    names = sorted(set(group))
    differences = []
    for swapped in itertools.product([False, True], repeat=len(names)):
        swap = np.array([swapped[names.index(own)] for own in group])
        a, b = np.where(swap, other, one), np.where(swap, one, other)
        differences.append(_f1(labels, a) - _f1(labels, b))
    observed = differences[0]
    return observed, np.mean([abs(own) >= abs(observed) - 1e-9 for own in differences])


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_predictions(max_bags=7), st.booleans())
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
def test_permutation__few_bags__counts_all_swaps(drawn, in_patients):
    labels, one, other = drawn
    group = [index // 2 if in_patients else index for index in range(len(labels))]
    test = permutation_test(labels, one, other, groups=group)
    assert test == pytest.approx(_brute_force(labels, one, other, group))


def test_permutation__scipy__has_the_same_p_value():
    generator = np.random.default_rng(3)
    labels = np.arange(30) % 3
    one, other = (np.where(generator.random(30) < q, labels, (labels + 1) % 3) for q in (0.9, 0.6))
    # Indices of bags stand for their pairs: below 30 model a's prediction, above it b's.
    both = np.concatenate([one, other])

    def statistic(a, b):
        index_a, index_b = a.astype(int), b.astype(int)
        return _f1(labels[index_a % 30], both[index_a]) - _f1(labels[index_b % 30], both[index_b])

    expected = scipy.stats.permutation_test(
        (np.arange(30.0), np.arange(30.0, 60.0)),
        statistic,
        permutation_type="samples",
        vectorized=False,
        n_resamples=399,
        rng=np.random.default_rng(0),
    )
    test = permutation_test(labels, one, other, n_permutations=9_999)
    assert test.difference == pytest.approx(expected.statistic)
    assert test.p_value == pytest.approx(expected.pvalue, abs=0.03)
    assert 0.001 < test.p_value < 0.1


@settings(derandomize=True, deadline=None, max_examples=30)
@given(_predictions(), st.integers(0, 100))
def test_permutation__models_swapped_or_bags_reordered__says_the_same(drawn, seed):
    labels, one, other = drawn
    test = permutation_test(labels, one, other)
    swapped = permutation_test(labels, other, one)
    assert swapped == pytest.approx((-test.difference, test.p_value))
    order = np.random.default_rng(seed).permutation(len(labels))
    assert permutation_test(labels[order], one[order], other[order]) == pytest.approx(test)


def test_permutation__more_swaps_than_allowed__draws_them_and_never_says_zero():
    labels = np.arange(40) % 2
    drawn = permutation_test(labels, labels, 1 - labels, n_permutations=99)
    assert drawn == (1.0, 0.01)
    assert permutation_test(labels, labels, 1 - labels, n_permutations=99, seed=1) == drawn
    one = np.where(np.arange(40) < 12, 1 - labels, labels)
    other = np.where(np.arange(40) % 4 == 0, 1 - labels, labels)
    first, again, another = (
        permutation_test(labels, one, other, n_permutations=99, seed=seed).p_value
        for seed in (0, 0, 1)
    )
    assert first == again != another


def test_permutation__swaps_of_equal_scores_in_another_order__tie():
    labels = np.array([2, 2, 2, 1, 2, 2, 2, 0])  # a case found by search
    one, other = np.array([[1, 1, 0, 1, 1, 2, 1, 0], [2, 2, 0, 1, 1, 2, 0, 1]])
    assert permutation_test(labels, one, other).p_value == 1


def test_permutation__same_predictions__differ_by_nothing():
    labels = np.array([0, 1, 1])
    assert permutation_test(labels, labels[::-1], labels[::-1]) == (0.0, 1.0)


def _p_of_equal_models(seed):
    generator = np.random.default_rng(seed)
    labels = np.arange(60) % 3
    models = [
        np.where(generator.random(60) < 0.6, labels, generator.integers(0, 3, 60)) for _ in range(2)
    ]
    return permutation_test(labels, *models, n_permutations=199).p_value


def test_permutation__equal_models__are_rejected_as_often_as_the_level_says():
    low, high = binom.ppf([0.0005, 0.9995], 400, 0.05)
    assert low <= sum(_p_of_equal_models(seed) <= 0.05 for seed in range(400)) <= high


@pytest.mark.slow
def test_permutation__equal_models_many_times__are_rejected_as_often_as_the_level_says():
    low, high = binom.ppf([0.0005, 0.9995], 8000, 0.05)
    # Ties between swaps make it a little conservative.
    assert low - 80 <= sum(_p_of_equal_models(seed) <= 0.05 for seed in range(8000)) <= high


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"predictions_b": np.array([0])}, "predictions_b must have one row for each of the 2"),
        ({"bag_ids": ["a", "a"]}, r"\['a'\] come several times"),
        ({"n_permutations": 0}, "n_permutations must be at least 1, but got 0"),
        ({"groups": ["a"]}, "groups must have one entry"),
    ],
)
def test_permutation__what_cannot_be_tested__is_refused(arguments, why):
    labels = np.array([0, 1])
    given = {"predictions_a": labels, "predictions_b": labels} | arguments
    with pytest.raises(ValueError, match=why):
        permutation_test(labels, **given)
