import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from mil_anchor.calibration import calibration


@st.composite
def _predictions(draw):
    n_classes, n_bags = draw(st.integers(2, 4)), draw(st.integers(1, 60))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 10.0]))
    return (
        generator.integers(0, n_classes, size=n_bags),
        generator.dirichlet(np.full(n_classes, 1 / sharpness), size=n_bags),
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(_predictions(), st.sampled_from([1, 2, 15]))
def test_calibration__error__agrees_with_torchmetrics(drawn, n_bins):
    labels, probabilities = drawn
    # A confidence of 1 has a bin of its own there.
    is_unsure = probabilities.max(axis=1) < 1 - 1e-9
    assume(is_unsure.any())
    labels, probabilities = labels[is_unsure], probabilities[is_unsure]
    expected = multiclass_calibration_error(
        torch.tensor(probabilities),
        torch.tensor(labels),
        num_classes=probabilities.shape[1],
        n_bins=n_bins,
        norm="l1",
    )
    found = calibration(labels, probabilities, n_bins=n_bins)
    assert found.error == pytest.approx(float(expected), abs=1e-6)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_predictions())
def test_calibration__bins__hold_the_bags_of_their_interval(drawn):
    labels, probabilities = drawn

    found = calibration(labels, probabilities)

    assert len(found.bins) == 15
    assert (found.bins[0].low, found.bins[-1].high) == (0, 1)
    total = 0.0
    for own in found.bins:
        inside = [
            (max(row), row.argmax() == label)
            for row, label in zip(probabilities, labels, strict=True)
            if own.low <= max(row) < own.high or max(row) == own.high == 1
        ]
        assert own.n_bags == len(inside)
        if inside:
            confidence, accuracy = np.mean(inside, axis=0)
            assert (own.confidence, own.accuracy) == pytest.approx((confidence, accuracy))
            total += len(inside) / len(labels) * abs(accuracy - confidence)
        else:
            assert math.isnan(own.confidence)
            assert math.isnan(own.accuracy)
    assert sum(own.n_bags for own in found.bins) == len(labels)
    assert found.error == pytest.approx(total)


def test_calibration__confidence_of_one__is_in_the_last_bin():
    labels = np.array([0, 0])
    probabilities = np.array([[1.0, 0.0], [0.05, 0.95]])

    found = calibration(labels, probabilities)

    assert found.bins[-1][2:] == (2, 0.975, 0.5)
    assert found.error == pytest.approx(0.475)


def test_calibration__confidence_on_an_edge__is_in_the_bin_above():
    labels = np.array([0, 0, 0, 0])
    probabilities = np.array([[0.75, 0.25], [0.625, 0.375], [0.5, 0.5], [0.125, 0.875]])

    found = calibration(labels, probabilities, n_bins=4)

    assert [own.n_bags for own in found.bins] == [0, 0, 2, 2]
    expected = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), num_classes=2, n_bins=4, norm="l1"
    )
    assert found.error == pytest.approx(float(expected), abs=1e-6)


def test_calibration__two_bags_sure_of_themselves__differ_from_torchmetrics_as_documented():
    labels = np.array([1, 0])
    probabilities = np.array([[1.0, 0.0], [0.95, 0.05]])
    theirs = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), num_classes=2, n_bins=15
    )
    assert float(theirs) == pytest.approx((1 + 0.05) / 2)
    assert calibration(labels, probabilities).error == pytest.approx(0.975 - 0.5)


def test_calibration__probability_of_class_1_alone__is_that_of_two_columns():
    labels, probabilities = np.array([0, 1, 1]), np.array([0.25, 0.75, 0.125])
    both = np.stack([1 - probabilities, probabilities], axis=1)
    own, other = calibration(labels, probabilities), calibration(labels, both)
    assert own.error == other.error
    np.testing.assert_equal(own.bins, other.bins)


@pytest.mark.parametrize(
    ("labels", "probabilities", "n_bins", "why"),
    [
        ([], [], 15, r"got 0 bag\(s\) and n_bins=15"),
        ([0], [0.5], 0, r"got 1 bag\(s\) and n_bins=0"),
        ([0], [-0.5], 15, "must lie in"),
    ],
)
def test_calibration__nothing_to_count__is_refused(labels, probabilities, n_bins, why):
    with pytest.raises(ValueError, match=why):
        calibration(
            np.array(labels, dtype=int), np.array(probabilities, dtype=float), n_bins=n_bins
        )
