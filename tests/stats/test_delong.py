import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score

from mil_anchor.stats import auroc, bootstrap_interval, delong_test
from tests.stats.drawing import comparisons, equal_models


def _psi(positive, negative):
    """DeLong's kernel for every pair of a positive and a negative bag."""
    return np.array([[(x > y) + 0.5 * (x == y) for y in negative] for x in positive], dtype=float)


def _by_definition(labels, *models):
    """Areas and the covariance matrix S10 / m + S01 / n of some models' scores of class 1."""
    kernels = [_psi(own[labels == 1], own[labels == 0]) for own in models]
    positive = np.cov([kernel.mean(axis=1) for kernel in kernels]) / (labels == 1).sum()
    negative = np.cov([kernel.mean(axis=0) for kernel in kernels]) / (labels == 0).sum()
    return [kernel.mean() for kernel in kernels], positive + negative


@settings(derandomize=True, deadline=None, max_examples=60)
@given(comparisons())
def test_delong__two_classes__is_the_definition_over_all_pairs(drawn):
    labels, one, other = drawn
    labels = (labels == 1).astype(int)
    one, other = one[:, 1], other[:, 1]

    test = delong_test(labels, one, other)

    areas, covariance = _by_definition(labels, one, other)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert (test.auroc_a, test.auroc_b) == pytest.approx(areas)
    assert test.auroc_a == pytest.approx(roc_auc_score(labels, one))
    assert test.difference == pytest.approx(areas[0] - areas[1])
    assert test.standard_error == pytest.approx(math.sqrt(max(variance, 0)), abs=1e-8)
    if test.standard_error > 0:
        z = test.difference / test.standard_error
        assert test.p_value == pytest.approx(2 * norm.sf(abs(z)))
        half = norm.ppf(0.975) * test.standard_error
        expected = (test.difference - half, test.difference + half)
        assert test.interval == pytest.approx(expected)


def _macro_by_definition(labels, one, other, group):
    """Difference and standard error by sums of influences over pairs, bag by bag."""
    classes = sorted(set(labels.tolist()))
    influence = dict.fromkeys(group, 0.0)
    difference = 0.0
    for cls in classes:
        inside = [i for i in range(len(labels)) if labels[i] == cls]
        outside = [i for i in range(len(labels)) if labels[i] != cls]
        gained = _psi(one[inside, cls], one[outside, cls])
        gained -= _psi(other[inside, cls], other[outside, cls])
        difference += gained.mean() / len(classes)
        for axis, own in ((1, inside), (0, outside)):
            n_groups = len({group[i] for i in own})
            factor = math.sqrt(n_groups / (n_groups - 1)) / len(own) / len(classes)
            for i, share in zip(own, gained.mean(axis=axis), strict=True):
                influence[group[i]] += factor * (share - gained.mean())
    return difference, math.sqrt(sum(value**2 for value in influence.values()))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(comparisons().filter(lambda drawn: drawn[1].shape[1] > 2), st.booleans())
def test_delong__several_classes__averages_their_influences(drawn, in_patients):
    labels, one, other = drawn
    # Patients of one and two bags; every class has two bags at least, so two patients or more.
    group = [index // 2 if in_patients else index for index in range(len(labels))]
    has_two = all(
        len({g for g, own in zip(group, labels, strict=True) if (own == cls) == inside}) > 1
        for cls in set(labels.tolist())
        for inside in (True, False)
    )
    if not has_two:
        with pytest.raises(ValueError, match="needs two patients"):
            delong_test(labels, one, other, groups=group)
        return

    test = delong_test(labels, one, other, groups=group)

    difference, error = _macro_by_definition(labels, one, other, group)
    assert test.difference == pytest.approx(difference, abs=1e-12)
    assert test.standard_error == pytest.approx(error, abs=1e-12)
    assert test.auroc_a == pytest.approx(auroc(labels, one))
    assert test.auroc_b == pytest.approx(auroc(labels, other))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(comparisons(), st.integers(0, 100))
def test_delong__models_swapped_bags_reordered_scores_transformed__says_the_same(drawn, seed):
    labels, one, other = drawn
    test = np.array([*delong_test(labels, one, other)[2:4]])
    p_value = delong_test(labels, one, other).p_value

    swapped = delong_test(labels, other, one)
    np.testing.assert_allclose([-swapped.difference, swapped.standard_error], test, atol=1e-12)
    np.testing.assert_allclose(swapped.p_value, p_value, rtol=1e-9)
    order = np.random.default_rng(seed).permutation(len(labels))
    same = delong_test(labels[order], one[order], other[order])
    np.testing.assert_allclose([same.difference, same.standard_error], test, atol=1e-12)
    same = delong_test(labels, one**2, other / 2)
    np.testing.assert_allclose([same.difference, same.standard_error], test, atol=1e-12)
    alone = delong_test(labels, one, other, groups=[f"p{index}" for index in range(len(labels))])
    np.testing.assert_allclose([alone.difference, alone.standard_error], test, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(comparisons())
def test_delong__same_predictions__differ_by_nothing(drawn):
    labels, one, _ = drawn
    assert delong_test(labels, one, one / 2)[2:] == (0.0, 0.0, (0.0, 0.0), 1.0)


def test_delong__nothing_varies__answers_as_documented():
    labels = np.array([0, 0, 0, 1, 1, 1])
    right, tied = labels / 2 + 0.1, np.full(6, 0.3)

    assert delong_test(labels, right, right / 2)[2:] == (0.0, 0.0, (0.0, 0.0), 1.0)
    test = delong_test(labels, right, tied)
    assert (test.auroc_a, test.auroc_b, test.difference, test.standard_error) == (1, 0.5, 0.5, 0)
    assert all(math.isnan(value) for value in (*test.interval, test.p_value))


def test_delong__patients_whose_influences_cancel__vary_by_nothing_in_spite_of_rounding():
    generator = np.random.default_rng(64)  # a case found by search
    generator.integers(2, 4)
    one, other = generator.integers(0, 3, size=(2, 6, 3)) / 2
    test = delong_test(np.array([0, 1, 2] * 2), one, other, groups=[0, 0, 0, 1, 1, 1])
    assert test.difference == pytest.approx(0.479, abs=1e-3)
    assert test.standard_error == 0
    assert math.isnan(test.p_value)


def test_delong__level__widens_the_interval():
    labels, one, other, _ = equal_models(np.random.default_rng(1), n_of_class=20, n_classes=2)
    low, high = delong_test(labels, one, other, level=0.95).interval
    lower, higher = delong_test(labels, one, other, level=0.99).interval
    ratio = (higher - lower) / (high - low)
    assert ratio == pytest.approx(norm.ppf(0.995) / norm.ppf(0.975))


@pytest.mark.parametrize("n_classes", [2, 4])
def test_delong__many_bags__has_the_error_of_the_bootstrap_over_patients(n_classes):
    labels, one, other, patients = equal_models(
        np.random.default_rng(0),
        n_of_class=240 // n_classes,
        n_classes=n_classes,
        of_patient=3,
        patient_effect=2.0,
    )
    test = delong_test(labels, one, other, groups=patients)
    level = float(norm.cdf(1) - norm.cdf(-1))
    found = bootstrap_interval(
        auroc, labels, one, other, groups=patients, level=level, n_resamples=400
    )
    assert found.estimate == pytest.approx(test.difference)
    assert (found.interval[1] - found.interval[0]) / 2 == pytest.approx(
        test.standard_error, rel=0.12
    )


def _rejections(n_times, *, groups, **drawn):
    rejected = 0
    for seed in range(n_times):
        labels, one, other, patients = equal_models(np.random.default_rng(seed), **drawn)
        own = patients if groups else None
        rejected += delong_test(labels, one, other, groups=own).p_value <= 0.05
    return rejected


_NULLS = [
    {"n_of_class": 30, "n_classes": 2},
    {"n_of_class": 20, "n_classes": 4},
    {"n_of_class": 60, "n_classes": 3, "of_patient": 3, "patient_effect": 2.0},
]


@pytest.mark.parametrize("drawn", _NULLS, ids=["binary", "macro", "patients"])
def test_delong__equal_models__are_rejected_as_often_as_the_level_says(drawn):
    low, high = binom.ppf([0.0005, 0.9995], 200, 0.05)
    assert low <= _rejections(200, groups=True, **drawn) <= high


@pytest.mark.slow
@pytest.mark.parametrize("drawn", _NULLS, ids=["binary", "macro", "patients"])
def test_delong__equal_models_many_times__are_rejected_as_often_as_the_level_says(drawn):
    # An asymptotic test: its size may be off by a tenth of a percent or so here.
    low, high = binom.ppf([0.001], 4000, 0.045)[0], binom.ppf([0.999], 4000, 0.06)[0]
    assert low <= _rejections(4000, groups=True, **drawn) <= high


def test_delong__patients_ignored__rejects_too_often():
    assert _rejections(200, groups=False, **_NULLS[2]) > binom.ppf(0.9995, 200, 0.05)


_LABELS, _SCORES = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("labels", "arguments", "why"),
    [
        ([1, 1, 1, 1], {}, "needs bags of two classes, but all 4 have the label 1"),
        ([0, 0, 0, 1], {}, r"of every class that occurs, but class 1 has 1\. Use permutation"),
        ([0, 1, 1, 1], {}, r"not of every class that occurs, but class 1 has 1"),
        ([0, 0, 1, 1], {"groups": [0, 1, 2, 2]}, "but class 1 has 1"),
        ([0, 0, 1, 1], {"groups": [0, 1]}, "groups must have one entry for each of the 4"),
        ([0, 0, 1, 1], {"bag_ids": ["a"]}, "bag_ids must have one entry for each of the 4"),
        ([0, 0, 1, 1], {"bag_ids": list("abca")}, r"but \['a'\] come several times.*seed by seed"),
        ([0, 0, 1, 1], {"level": 95.0}, "level must lie between 0 and 1"),
        ([0, -1, 1, 1], {}, r"classes from 0, but the labels are \[0, -1, 1, 1\]"),
    ],
)
def test_delong__what_cannot_be_tested__is_refused(labels, arguments, why):
    with pytest.raises(ValueError, match=why):
        delong_test(np.array(labels), _SCORES, _SCORES[::-1], **arguments)


def test_delong__models_of_other_classes__are_refused():
    three = np.full((4, 3), 0.3)
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(4, 3\)"):
        delong_test(_LABELS, _SCORES, three)
