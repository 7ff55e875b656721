"""CLAM: its instance loss by explicit loop, and its branches."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.clam import CLAMMB, CLAMSB

LAWS = settings(derandomize=True, deadline=None, max_examples=25)


def build(model, *, seed=0, **options):
    torch.manual_seed(seed)
    return model(5, 3, hidden=8, attention_width=4, dropout=0.0, **options).double()


def bag_of(n_instances, *, seed=0):
    return torch.randn(1, n_instances, 5, generator=torch.Generator().manual_seed(seed)).double()


def naive_instance_loss(model, features, label, k_sample, *, subtyping):
    """The paper's clustering loss of one bag, instance by instance."""
    scores, n_instances = model(features).scores[0], features.shape[1]
    total = torch.zeros((), dtype=features.dtype)
    for cls in range(3):
        row = scores[cls if len(scores) > 1 else 0].tolist()
        ranked = sorted(range(n_instances), key=lambda i: row[i])
        k = min(k_sample, n_instances // 2)
        examples = [(i, 0) for i in ranked[:k]] + [(i, 1) for i in ranked[n_instances - k :]]
        if n_instances == 1:
            examples = [(0, 1)]
        if cls != label:
            if not subtyping:
                continue
            examples = [(i, 0) for i, target in examples if target == 1]
        losses = []
        for i, target in examples:
            instance = model.projection(features[0, i])
            logits = model.instance_classifiers[cls](instance)
            losses.append(logits.exp().sum().log() - logits[target])
        total = total + sum(losses) / len(losses)
    return total / 3 if subtyping else total


@pytest.mark.parametrize("model", [CLAMSB, CLAMMB])
@pytest.mark.parametrize("subtyping", [True, False])
@given(
    n_instances=st.integers(1, 30),
    k_sample=st.integers(1, 10),
    label=st.integers(0, 2),
    seed=st.integers(0, 999),
)
@LAWS
def test_instance_loss__any_bag__agrees_with_the_loop(
    model, subtyping, n_instances, k_sample, label, seed
):
    clam = build(model, seed=seed, k_sample=k_sample, subtyping=subtyping)
    features = bag_of(n_instances, seed=seed)

    auxiliary_loss = clam(features, label=torch.tensor([label])).auxiliary_loss
    expected = 0.3 * naive_instance_loss(clam, features, label, k_sample, subtyping=subtyping)

    torch.testing.assert_close(auxiliary_loss, expected)
    actual_gradient, expected_gradient = (
        torch.autograd.grad(loss, clam.projection[0].weight) for loss in (auxiliary_loss, expected)
    )
    torch.testing.assert_close(actual_gradient, expected_gradient)


def test_instance_loss__equal_scores__takes_no_instance_from_both_ends():
    clam = build(CLAMSB, k_sample=2)
    torch.nn.init.zeros_(clam.attention.score.weight)
    features, chosen = bag_of(4), []
    clam.instance_classifiers[1].register_forward_hook(lambda _, args, __: chosen.append(args[0]))

    clam(features, label=torch.tensor([1]))

    assert len(torch.unique(chosen[0], dim=0)) == 4


def test_instance_loss__two_bags__is_their_mean():
    clam = build(CLAMSB)
    features, labels = torch.cat([bag_of(20), bag_of(20, seed=1)]), torch.tensor([0, 2])

    together = clam(features, label=labels).auxiliary_loss
    alone = [clam(features[[i]], label=labels[[i]]).auxiliary_loss for i in range(2)]

    torch.testing.assert_close(together, sum(alone) / 2)


def test_instance_loss__label_that_cross_entropy_ignores__adds_nothing():
    clam = build(CLAMSB)
    features = torch.cat([bag_of(20), bag_of(20, seed=1)])

    together = clam(features, label=torch.tensor([-100, 2])).auxiliary_loss

    labelled = clam(features[[1]], label=torch.tensor([2])).auxiliary_loss
    torch.testing.assert_close(together, labelled / 2)
    assert clam(features[[0]], label=torch.tensor([-100])).auxiliary_loss == 0


@pytest.mark.parametrize("model", [CLAMSB, CLAMMB])
def test_instance_loss__gradient__leaves_attention_and_head_alone(model):
    clam = build(model, subtyping=True)

    clam(bag_of(20), label=torch.tensor([1])).auxiliary_loss.backward()

    assert all(parameter.grad is None for parameter in clam.attention.parameters())
    assert all(parameter.grad is None for parameter in clam.head.parameters())


def test_clam_mb__any_bag__judges_each_class_by_its_own_row():
    clam, features = build(CLAMMB), bag_of(9)

    output = clam(features)

    instances = clam.projection(features[0])
    for cls in range(3):
        pooled = output.scores[0, cls].softmax(dim=0) @ instances
        logit = clam.head.weight[cls] @ pooled + clam.head.bias[cls]
        torch.testing.assert_close(output.logits[0, cls], logit)


def test_clam_sb__any_bag__judges_all_classes_by_its_only_row():
    clam, features = build(CLAMSB), bag_of(9)

    output = clam(features)

    assert output.scores.shape == (1, 1, 9)
    instances = clam.projection(features[0])
    hidden = clam.attention.value[0](instances).tanh() * clam.attention.gate[0](instances).sigmoid()
    scores = clam.attention.score(hidden)[:, 0]
    torch.testing.assert_close(output.scores[0, 0], scores)
    pooled = sum(a * h for a, h in zip(scores.softmax(dim=0), instances, strict=True))
    torch.testing.assert_close(output.logits[0], F.linear(pooled, *clam.head.parameters()))


@pytest.mark.parametrize("model", [CLAMSB, CLAMMB])
def test_clam__defaults__are_those_of_the_paper(model):
    clam = model(1024, 2)

    assert clam.projection[0].weight.shape == (512, 1024)
    assert clam.attention.value[0].weight.shape == (256, 512)
    dropouts = [module.p for module in clam.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts == [0.25, 0.25, 0.25]
    assert clam.k_sample == 8
    assert clam(torch.randn(1, 3, 1024)).bag_loss_weight == 0.7
