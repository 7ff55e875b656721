import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from mil_anchor.metrics import bag_metrics
from mil_anchor.stats import auroc, macro_f1
from mil_anchor.stats.measures import ordered_pairs
from tests.stats.drawing import comparisons


@settings(derandomize=True, deadline=None, max_examples=40)
@given(comparisons(min_of_class=0).filter(lambda drawn: len(drawn[0]) > 0))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
def test_measures__classes_present_or_not__agree_with_the_metrics_of_a_run(drawn):
    labels, probabilities, _ = drawn
    metrics = bag_metrics(probabilities.shape[1])
    metrics.update(torch.tensor(probabilities), torch.tensor(labels))
    expected = metrics.compute()
    predictions = probabilities.argmax(axis=1)
    assert auroc(labels, probabilities) == pytest.approx(float(expected["auroc"]), nan_ok=True)
    assert macro_f1(labels, predictions) == pytest.approx(float(expected["f1"]))
    assert macro_f1(labels, predictions) == f1_score(labels, predictions, average="macro")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(comparisons())
def test_auroc__all_classes__agrees_with_scikit_learn(drawn):
    labels, probabilities, _ = drawn
    n_classes = probabilities.shape[1]
    areas = [roc_auc_score(labels == cls, probabilities[:, cls]) for cls in range(n_classes)]
    expected = areas[1] if n_classes == 2 else np.mean(areas)
    assert auroc(labels, probabilities) == pytest.approx(expected, abs=1e-12)


def test_auroc__probabilities_of_class_1_alone__is_that_of_two_columns():
    labels, probabilities = np.array([0, 1, 1, 0]), np.array([0.2, 0.3, 0.9, 0.4], dtype=np.float32)
    both = np.stack([1 - probabilities, probabilities], axis=1)
    assert auroc(labels, probabilities) == auroc(labels, both) == 0.75


@settings(derandomize=True, deadline=None, max_examples=30)
@given(comparisons())
def test_ordered_pairs__ties__count_half_as_in_the_definition(drawn):
    labels, probabilities, _ = drawn
    scores, positive = probabilities[:, 1], labels == 1
    expected = [
        sum((own > s) + 0.5 * (own == s) for s in scores[~positive])
        if is_positive
        else sum((own < s) + 0.5 * (own == s) for s in scores[positive])
        for own, is_positive in zip(scores, positive, strict=True)
    ]
    np.testing.assert_array_equal(ordered_pairs(scores, positive), expected)


@pytest.mark.parametrize(
    ("labels", "probabilities", "why"),
    [
        ([0, 1], [0.5, 1.2], "must lie in"),
        ([0, 1], [0.5, float("nan")], "diverged"),
        ([0, 2], [0.5, 0.5], r"labels up to 2 the shape \(2,\)"),
        ([0, 1], [[1.0], [1.0]], r"shape \(2, 1\)"),
        ([0, 1, 1], [0.5, 0.5], "each of the 3 labels, but they have 2"),
    ],
)
def test_auroc__no_probabilities__are_refused(labels, probabilities, why):
    with pytest.raises(ValueError, match=why):
        auroc(np.array(labels), np.array(probabilities))


def test_macro_f1__another_number_of_predictions__is_refused():
    with pytest.raises(ValueError, match=r"Predictions must have one row for each of the 2"):
        macro_f1(np.array([0, 1]), np.array([0]))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 20))
def test_auroc__one_class__is_nan(n_bags):
    assert np.isnan(auroc(np.zeros(n_bags, dtype=int), np.linspace(0, 1, n_bags)))
