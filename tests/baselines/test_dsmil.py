"""DSMIL by explicit loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.dsmil import DSMIL

LAWS = settings(derandomize=True, deadline=None, max_examples=25)


def naive_streams(model, features):
    """Both streams of one bag, class by class; also the scores."""
    classifier, (first, _, second, _) = model.instance_classifier, model.attention.query

    def query(x):
        inner = (first.weight @ x + first.bias).clamp(min=0)
        return torch.tanh(second.weight @ inner + second.bias)

    scores, pooled, critical_logits = [], [], []
    for weight, bias in zip(classifier.weight, classifier.bias, strict=True):
        logits = [weight @ x + bias for x in features]
        critical = max(range(len(features)), key=lambda i: logits[i].item())
        critical_logits.append(logits[critical])
        products = [query(x) @ query(features[critical]) for x in features]
        row = torch.stack([product / math.sqrt(len(second.bias)) for product in products])
        attention = row.exp() / row.exp().sum()
        scores.append(row)
        pooled.append(sum(a * x for a, x in zip(attention, features, strict=True)))
    bag_logits = [
        (kernel * torch.stack(pooled)).sum() + bias
        for kernel, bias in zip(model.head.weight, model.head.bias, strict=True)
    ]
    return torch.stack(bag_logits), torch.stack(critical_logits), torch.stack(scores)


@given(n_instances=st.integers(1, 20), label=st.integers(0, 2), seed=st.integers(0, 999))
@LAWS
def test_dsmil__any_bag__agrees_with_the_loop(n_instances, label, seed):
    torch.manual_seed(seed)
    model, features = DSMIL(5, 3, attention_width=4).double(), torch.randn(n_instances, 5).double()

    training = model(features[None], label=torch.tensor([label]))
    prediction = model.eval()(features[None])

    bag_logits, critical_logits, scores = naive_streams(model, features)
    torch.testing.assert_close(training.logits[0], bag_logits)
    torch.testing.assert_close(prediction.logits[0], (bag_logits + critical_logits) / 2)
    torch.testing.assert_close(training.scores[0], scores)
    instance_loss = critical_logits.exp().sum().log() - critical_logits[label]
    torch.testing.assert_close(training.auxiliary_loss, instance_loss / 2)
    assert training.bag_loss_weight == 0.5
    actual_gradient, expected_gradient = (
        torch.autograd.grad(
            total, list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        for total in (
            training.logits.square().sum() + training.scores.square().sum(),
            bag_logits.square().sum() + scores.square().sum(),
        )
    )
    torch.testing.assert_close(actual_gradient, expected_gradient)


def test_dsmil__best_instance_is_padding__is_never_critical():
    torch.manual_seed(0)
    model, features = DSMIL(5, 3).eval(), torch.randn(1, 8, 5)
    # The direction in which all class scores grow: as padding it would win every class.
    features[0, 3] = 100 * torch.linalg.pinv(model.instance_classifier.weight) @ torch.ones(3)
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 3] = False
    critical = []
    model.attention.register_forward_hook(lambda _, args, __: critical.append(args[1]))

    model(features, mask)
    model(features)

    masked, unmasked = critical
    assert (unmasked == features[0, 3]).all()
    assert not (masked == features[0, 3]).all(dim=-1).any()


def test_dsmil__several_bags_with_labels__halves_the_mean_cross_entropy():
    torch.manual_seed(0)
    model, features = DSMIL(5, 3), torch.randn(4, 6, 5)
    label = torch.tensor([0, 1, 2, 2])

    auxiliary_loss = model(features, label=label).auxiliary_loss

    critical_logits = model.instance_classifier(features).amax(dim=1)
    expected = 0.5 * torch.nn.functional.cross_entropy(critical_logits, label)
    torch.testing.assert_close(auxiliary_loss, expected)


def test_dsmil__scores__stay_within_the_bound_of_a_tanh_query():
    torch.manual_seed(0)
    scores = DSMIL(5, 3)(1000 * torch.randn(2, 50, 5)).scores

    assert scores.abs().max() <= math.sqrt(128) + 1e-4


@pytest.mark.parametrize("attention_width", [1, 128])
def test_dsmil__attention_width__is_the_width_of_the_query(attention_width):
    model = DSMIL(5, 3, attention_width=attention_width)

    assert model.attention.query(torch.randn(1, 2, 5)).shape[-1] == attention_width
