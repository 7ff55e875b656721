import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from mil_anchor.metrics import bag_metrics


def _measured(probabilities, labels, *, n_batches=1):
    metrics = bag_metrics(probabilities.shape[1])
    for part in torch.arange(len(labels)).chunk(n_batches):
        metrics.update(probabilities[part], labels[part])
    return {key: float(value) for key, value in metrics.compute().items()}


@st.composite
def _results(draw):
    n_classes, n_bags = draw(st.integers(2, 5)), draw(st.integers(2, 30))
    label = st.integers(0, n_classes - 1)
    labels = torch.tensor(draw(st.lists(label, min_size=n_bags, max_size=n_bags)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    # Few distinct values, so that probabilities tie.
    return torch.randint(0, 4, (n_bags, n_classes)).float().softmax(dim=1), labels


@settings(derandomize=True, deadline=None, max_examples=60)
@given(_results(), st.integers(1, 4))
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
def test_bag_metrics__classes_present_or_not__agrees_with_scikit_learn(results, n_batches):
    probabilities, labels = results
    predictions = probabilities.argmax(dim=1)
    present = [cls for cls in labels.unique().tolist() if (labels != cls).any()]
    # Of two classes only the second counts: their areas are equal but for ties after rounding.
    counted = present[-1:] if probabilities.shape[1] == 2 else present
    areas = [roc_auc_score(labels == cls, probabilities[:, cls]) for cls in counted]
    measured = _measured(probabilities, labels, n_batches=n_batches)
    assert measured == pytest.approx(
        {
            "f1": f1_score(labels, predictions, average="macro"),
            "auroc": sum(areas) / len(areas) if areas else float("nan"),
            "accuracy": accuracy_score(labels, predictions),
            "balanced_accuracy": balanced_accuracy_score(labels, predictions),
        },
        abs=1e-5,
        nan_ok=True,
    )


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 1], [3, 1, 1]])
def test_bag_metrics__perfect_predictions_and_absent_classes__score_one(labels):
    measured = _measured(torch.eye(4)[labels], torch.tensor(labels))
    assert measured == dict.fromkeys(["f1", "auroc", "accuracy", "balanced_accuracy"], 1.0)


def test_bag_metrics__absent_class_is_predicted__leaves_the_balanced_accuracy_alone():
    measured = _measured(torch.eye(4)[[0, 1, 2]], torch.tensor([0, 1, 1]))
    assert measured["balanced_accuracy"] == 0.75


def test_bag_metrics__one_class_only__auroc_is_nan_without_a_warning():
    measured = _measured(torch.eye(2)[[0, 1, 1]], torch.tensor([1, 1, 1]))
    assert torch.tensor(measured["auroc"]).isnan()
    assert measured["accuracy"] == pytest.approx(2 / 3)


def test_bag_metrics__two_classes_saturated__auroc_is_that_of_class_one():
    probabilities = torch.tensor([[-20.0, 0.0], [-30.0, 0.0], [0.0, -5.0]]).softmax(dim=1)
    labels = torch.tensor([0, 1, 0])
    # In float32, the first two bags tie in class 1 and not in class 0.
    assert probabilities[0, 1] == probabilities[1, 1]
    assert _measured(probabilities, labels)["auroc"] == roc_auc_score(labels, probabilities[:, 1])


def test_bag_metrics__prefix__is_put_before_every_key():
    metrics = bag_metrics(2, prefix="val/")
    metrics.update(torch.eye(2), torch.tensor([0, 1]))
    assert set(metrics.compute()) == {
        "val/f1",
        "val/auroc",
        "val/accuracy",
        "val/balanced_accuracy",
    }


def test_bag_metrics__reset__forgets():
    metrics = bag_metrics(2)
    metrics.update(torch.eye(2), torch.tensor([1, 0]))
    metrics.reset()
    metrics.update(torch.eye(2), torch.tensor([0, 1]))
    assert all(value == 1 for value in metrics.compute().values())


def test_bag_metrics__one_class__is_refused():
    with pytest.raises(ValueError, match="at least 2 classes, but 1 came"):
        bag_metrics(1)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_bag_metrics__not_probabilities__are_refused(value):
    metrics = bag_metrics(2)
    with pytest.raises(ValueError, match="updated with probabilities, but values outside"):
        metrics.update(torch.tensor([[value, 0.5]]), torch.tensor([0]))


_RANK = """
import json, sys, torch
from mil_anchor.metrics import bag_metrics
rank, store, n_bags = int(sys.argv[1]), sys.argv[2], 11
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
torch.manual_seed(0)
probabilities, labels = torch.rand(n_bags, 4).softmax(dim=1), torch.arange(n_bags) % 3
part = slice(0, 4) if rank == 0 else slice(4, n_bags)
metrics = bag_metrics(4)
metrics.update(probabilities[part], labels[part])
print(json.dumps({key: float(value) for key, value in metrics.compute().items()}))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_bag_metrics__two_processes_of_unequal_share__equal_one_process(tmp_path):
    torch.manual_seed(0)
    probabilities, labels = torch.rand(11, 4).softmax(dim=1), torch.arange(11) % 3
    store = f"file://{tmp_path / 'store'}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), store], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    expected = pytest.approx(_measured(probabilities, labels))
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert json.loads(output) == expected
