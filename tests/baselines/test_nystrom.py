"""The Nystrom attention against explicit matrices written from the formulas."""

import math

import pytest
import torch

from baselines.nystrom import (
    ClassTokenAttention,
    NystromAttention,
    QueryKey,
    pseudo_inverse_times,
)
from tests.baselines.textbook_transmil import (
    naive_mixing,
    naive_nystrom,
    naive_pseudo_inverses,
    randn,
)


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("n_heads", [1, 4])
def test_nystrom_attention__any_length__agrees_with_the_explicit_matrices(n_tokens, n_heads):
    torch.manual_seed(n_tokens)
    attention = NystromAttention(16, n_heads, 0.0).double()
    tokens = 3 * randn(1, n_tokens, 16)

    torch.testing.assert_close(attention(tokens)[0], naive_nystrom(attention, tokens[0], n_heads))


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 40])
def test_mixing_row__any_length__is_the_class_tokens_row_of_the_explicit_matrix(n_tokens):
    torch.manual_seed(n_tokens)
    attention = ClassTokenAttention(16, 4, 0.0).double().eval()
    tokens = 3 * randn(1, n_tokens, 16)
    rows = []
    attention.mixing_row.register_forward_hook(lambda module, args, row: rows.append(row))

    attention(tokens)

    expected = [
        matrix[-n_tokens, 1 - n_tokens :] for matrix in naive_mixing(attention, tokens[0], 4)
    ]
    torch.testing.assert_close(rows, [torch.stack(expected)[None]])


def test_mixing_row__training_mode__is_not_computed_and_changes_nothing():
    torch.manual_seed(0)
    attention = ClassTokenAttention(16, 4, 0.0)
    tokens, rows = torch.randn(2, 9, 16), []
    attention.mixing_row.register_forward_hook(lambda module, args, row: rows.append(row))

    trained = attention(tokens)
    assert rows == []
    assert torch.equal(trained, attention.eval()(tokens))
    assert [row.shape for row in rows] == [(2, 4, 8)]
    assert not any("mixing" in name for name in attention.state_dict())


def test_nystrom_attention__as_many_landmarks_as_tokens__is_exact_attention():
    torch.manual_seed(0)
    attention = NystromAttention(16, 2, 0.0).double()
    # Each token is most like itself in both heads: landmarks whose softmax can be inverted.
    tokens = 3 * torch.eye(8).double().repeat(1, 2) + 0.1 * randn(8, 16)
    torch.nn.init.eye_(attention.query_key.to_q.weight)
    torch.nn.init.eye_(attention.query_key.to_k.weight)
    torch.nn.init.zeros_(attention.residual.weight)

    query = key = tokens.view(8, 2, 8).transpose(0, 1)
    value = attention.to_v(tokens).view(8, 2, 8).transpose(0, 1)
    exact = (query @ key.mT / math.sqrt(8)).softmax(dim=-1) @ value
    expected = attention.output(exact.transpose(0, 1).reshape(1, 8, 16))

    torch.testing.assert_close(attention(tokens[None]), expected)


def test_pseudo_inverse_times__well_conditioned_matrix__inverts_it():
    # Near the identity, and its rows sum to one, as those of a softmax do.
    matrix = (8 * torch.eye(5).double() + 0.3 * randn(2, 3, 5, 5)).softmax(dim=-1)
    identity = torch.eye(5).double().expand(2, 3, 5, 5)

    inverse = pseudo_inverse_times(matrix, identity, 6)

    torch.testing.assert_close(matrix @ inverse, identity)


def test_pseudo_inverse_times__batch_of_bags__scales_each_by_its_own_norms():
    matrices = (randn(2, 3, 5, 5) * torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)).softmax(dim=-1)
    identity = torch.eye(5).double().expand(2, 3, 5, 5)

    together = pseudo_inverse_times(matrices, identity, 6)

    for i in range(2):
        expected = torch.stack(naive_pseudo_inverses(list(matrices[i])))
        torch.testing.assert_close(together[i], expected)


def test_query_key__any_tokens__agrees_with_projected_queries_and_keys():
    torch.manual_seed(0)
    query_key, tokens = QueryKey(12, 3).double(), randn(1, 6, 12)

    queries, keys = (
        project(tokens).view(1, 6, 3, 4).transpose(1, 2)
        for project in (query_key.to_q, query_key.to_k)
    )
    expected = (queries @ keys.mT / 2)[:, :, 0, 1:]
    torch.testing.assert_close(query_key(tokens), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n_columns", [1, 3, 9])
def test_pseudo_inverse_times__any_matrix__agrees_with_the_inverse_that_is_formed(
    n_columns, transposed
):
    # Rows of different sums: the gradient of the largest sum is not defined where two are equal.
    row_sums = torch.linspace(0.5, 1.0, 27).double().view(3, 9, 1)
    matrices = ((3 * randn(2, 3, 9, 9)).softmax(dim=-1) * row_sums).requires_grad_()
    columns = randn(2, 3, 9, n_columns, seed=1).requires_grad_()

    actual = pseudo_inverse_times(matrices, columns, 6, transposed=transposed)

    inverses = torch.stack([torch.stack(naive_pseudo_inverses(list(m))) for m in matrices])
    expected = (inverses.mT if transposed else inverses) @ columns
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = randn(*actual.shape, seed=2)
    for gradient, plain in zip(
        torch.autograd.grad((actual * weights).sum(), [matrices, columns]),
        torch.autograd.grad((expected * weights).sum(), [matrices, columns]),
        strict=True,
    ):
        torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-10 * plain.abs().max().item())


@pytest.mark.parametrize("n_tokens", [1, 2, 16, 17, 18, 70])
def test_class_token_attention__any_length__is_the_first_row_of_the_whole(n_tokens):
    torch.manual_seed(n_tokens)
    attention = ClassTokenAttention(16, 4, 0.0).double()
    whole = NystromAttention(16, 4, 0.0).double()
    whole.load_state_dict(attention.state_dict())
    tokens = (3 * randn(2, n_tokens, 16)).requires_grad_()

    actual, expected = attention(tokens), whole(tokens)[:, :1]

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = randn(*actual.shape, seed=2)
    for gradient, plain in zip(
        torch.autograd.grad((actual * weights).sum(), [tokens, *attention.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [tokens, *whole.parameters()]),
        strict=True,
    ):
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [NystromAttention, ClassTokenAttention])
def test_nystrom_attention__autocast__agrees_to_the_precision_of_bfloat16(kind):
    torch.manual_seed(0)
    attention, tokens = kind(16, 2, 0.0), torch.randn(1, 40, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(attention(tokens).square().sum(), tokens)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention(tokens)
    (actual,) = torch.autograd.grad(mixed.float().square().sum(), tokens)

    tolerance = 0.05 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_class_token_attention__differentiated_twice__says_that_it_cannot():
    attention, tokens = ClassTokenAttention(16, 2, 0.0), torch.randn(1, 9, 16, requires_grad=True)

    with pytest.raises(RuntimeError, match=r"differentiated once only, but create_graph=True"):
        torch.autograd.grad(attention(tokens).sum(), tokens, create_graph=True)
