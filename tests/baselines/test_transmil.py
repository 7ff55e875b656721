"""TransMIL against a naive model written from the formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.transmil import PPEG, TransMIL
from tests.baselines.textbook_transmil import naive_ppeg, naive_transmil, randn

LAWS = settings(derandomize=True, deadline=None, max_examples=8)


@given(n_instances=st.integers(1, 40), seed=st.integers(0, 999))
@LAWS
def test_transmil__any_bag__agrees_with_the_naive_model(n_instances, seed):
    torch.manual_seed(seed)
    model = TransMIL(6, 3, hidden=8, n_heads=2, dropout=0.0).double()
    torch.nn.init.normal_(model.norm.weight)
    features = randn(n_instances, 6, seed=seed)

    output = model(features[None])

    logits, scores = naive_transmil(model, features, 2)
    torch.testing.assert_close(output.logits[0], logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.scores[0], scores, rtol=0, atol=1e-12)
    weights = list(model.parameters())
    actual, expected = (
        torch.autograd.grad(total, weights, materialize_grads=True, allow_unused=True)
        for total in (
            output.logits.square().sum() + output.scores.sum(),
            logits.square().sum() + scores.sum(),
        )
    )
    for gradient, plain in zip(actual, expected, strict=True):
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-10 * max(1, plain.abs().max()))


def test_query_key__forward_pass__gets_one_bag_without_padding_or_repeats_and_only_in_the_last():
    torch.manual_seed(0)
    model, features = TransMIL(6, 2, hidden=16), torch.randn(2, 11, 6)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 4:] = False
    calls = []
    for layer in model.layers:
        layer.attention.query_key.register_forward_hook(
            lambda module, args, _: calls.append((module, args[0].shape))
        )

    model(features, mask)

    block = model.layers[1].attention.query_key
    assert calls == [(block, (1, 12, 16)), (block, (1, 5, 16))]


def test_ppeg__identity_kernels__leaves_the_class_token_alone_and_adds_the_instances_four_times():
    position, tokens = PPEG(4).double(), randn(1, 10, 4)
    for convolution in position.convolutions:
        torch.nn.init.zeros_(convolution.bias)
        torch.nn.init.zeros_(convolution.weight)
        with torch.no_grad():
            convolution.weight[:, 0, convolution.padding[0], convolution.padding[1]] = 1

    encoded = position(tokens, 3)

    torch.testing.assert_close(encoded[:, 0], tokens[:, 0])
    torch.testing.assert_close(encoded[:, 1:], 4 * tokens[:, 1:])


@pytest.mark.parametrize("n_instances", [1, 2, 3, 20_000])
def test_transmil__smallest_and_largest_bags__give_finite_results(n_instances):
    torch.manual_seed(0)
    model = TransMIL(16, 2, hidden=64).eval()

    with torch.no_grad():
        output = model(torch.randn(1, n_instances, 16))

    assert output.logits.isfinite().all()
    assert output.scores.shape == (1, 8, n_instances)
    assert output.scores.isfinite().all()


def test_transmil__defaults__are_those_of_the_paper():
    model = TransMIL(1024, 2)
    attention = model.layers[1].attention

    assert model.class_token.shape == (1, 1, 512)
    assert (attention.n_heads, attention.n_landmarks) == (8, 256)
    assert attention.residual.kernel_size == (33, 1)
    assert attention.output[1].p == 0.1
    assert [convolution.kernel_size[0] for convolution in model.position.convolutions] == [7, 5, 3]


@pytest.mark.parametrize(("hidden", "n_heads"), [(20, 8), (1, 1)])
def test_transmil__heads_that_do_not_divide_the_width__are_refused(hidden, n_heads):
    message = f"multiple of n_heads={n_heads}, but got {hidden}"
    with pytest.raises(ValueError, match=message):
        TransMIL(6, 2, hidden=hidden, n_heads=n_heads)


@pytest.mark.parametrize("side", [1, 2, 5, 11])
def test_ppeg__any_square__agrees_with_three_convolutions(side):
    torch.manual_seed(side)
    position = PPEG(4).double()
    tokens = randn(1, 1 + side * side, 4).requires_grad_()

    actual, expected = position(tokens, side)[0], naive_ppeg(position, tokens[0], side)

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights, sources = randn(*actual.shape, seed=1), [tokens, *position.parameters()]
    for gradient, plain in zip(
        torch.autograd.grad((actual * weights).sum(), sources),
        torch.autograd.grad((expected * weights).sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-10)


def test_transmil__last_layer__keeps_the_names_of_its_weights():
    names = list(TransMIL(6, 2, hidden=8, n_heads=2).state_dict())

    assert [name for name in names if name.startswith("layers.1")] == [
        "layers.1.norm.weight",
        "layers.1.norm.bias",
        "layers.1.attention.query_key.to_q.weight",
        "layers.1.attention.query_key.to_k.weight",
        "layers.1.attention.to_v.weight",
        "layers.1.attention.residual.weight",
        "layers.1.attention.output.0.weight",
        "layers.1.attention.output.0.bias",
    ]


def test_transmil__gradients_of_two_bags_accumulated__are_the_sum_of_both():
    torch.manual_seed(0)
    model = TransMIL(6, 2, hidden=16, n_heads=4, dropout=0.0).double()
    loss = model(torch.randn(1, 9, 6).double()).logits.square().sum()
    parameters = list(model.parameters())
    once = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)

    loss.backward(retain_graph=True)
    loss.backward()

    for parameter, gradient in zip(parameters, once, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, 2 * gradient)
