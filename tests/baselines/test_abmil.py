"""ABMIL against the equations of its paper."""

import pytest
import torch

from baselines.abmil import ABMIL


def naive_rows(model, instances, *, gated):
    """Equations 8 and 9: one weight after the other."""
    scorer = model.attention
    rows = []
    for w, bias in zip(scorer.score.weight, scorer.score.bias, strict=True):
        exponentials = []
        for h in instances:
            inner = torch.tanh(scorer.value[0].weight @ h + scorer.value[0].bias)
            if gated:
                inner = inner * torch.sigmoid(scorer.gate[0].weight @ h + scorer.gate[0].bias)
            exponentials.append(torch.exp(w @ inner + bias))
        rows.append([e / sum(exponentials) for e in exponentials])
    return rows


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_abmil__any_bag__agrees_with_the_equations(gated, n_rows):
    torch.manual_seed(0)
    model = ABMIL(5, 2, hidden=7, attention_width=4, n_rows=n_rows, gated=gated).double()
    features = torch.randn(2, 6, 5).double()

    output = model(features)

    for bag in range(2):
        instances = [
            (model.projection[0].weight @ x + model.projection[0].bias).clamp(min=0)
            for x in features[bag]
        ]
        rows = naive_rows(model, instances, gated=gated)
        slides = [sum(a * h for a, h in zip(row, instances, strict=True)) for row in rows]
        logits = model.head.weight @ (sum(slides) / n_rows) + model.head.bias
        torch.testing.assert_close(output.logits[bag], logits)
        attention = torch.stack([torch.stack(row) for row in rows])
        torch.testing.assert_close(output.scores[bag].softmax(dim=-1), attention)
        actual_gradient, expected_gradient = (
            torch.autograd.grad(total.square().sum(), list(model.parameters()), retain_graph=True)
            for total in (output.logits[bag], logits)
        )
        torch.testing.assert_close(actual_gradient, expected_gradient)


def test_abmil__default_sizes__are_those_of_the_docstring():
    model = ABMIL(1024, 2)

    assert model.projection[0].weight.shape == (512, 1024)
    assert model.attention.gate[0].weight.shape == (128, 512)
    assert model.attention.score.weight.shape == (1, 128)
