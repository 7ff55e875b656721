"""TransMIL against a naive Nystrom attention written from the formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.transmil import PPEG, NystromAttention, QueryKey, TransMIL, pseudo_inverse

LAWS = settings(derandomize=True, deadline=None, max_examples=8)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def naive_softmax(matrix):
    exponentials = matrix.exp()
    return exponentials / exponentials.sum(dim=1, keepdim=True)


def naive_means(rows, n_groups):
    length = len(rows) // n_groups
    return torch.stack([sum(rows[g * length : (g + 1) * length]) / length for g in range(n_groups)])


def naive_pseudo_inverses(matrices):
    column_sums = [m[:, i].abs().sum() for m in matrices for i in range(len(m))]
    row_sums = [m[i].abs().sum() for m in matrices for i in range(len(m))]
    scale = max(column_sums) * max(row_sums)
    inverses = []
    for matrix in matrices:
        z, identity = matrix.T / scale, torch.eye(len(matrix), dtype=matrix.dtype)
        for _ in range(6):
            az = matrix @ z
            z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
        inverses.append(z)
    return inverses


def naive_mixing(attention, tokens, n_heads):
    """What the values of one bag are multiplied by, head by head, zeros in front included."""
    n_tokens, width = tokens.shape
    n_landmarks, d = width // 2, width // n_heads
    n_rows = math.ceil(n_tokens / n_landmarks) * n_landmarks
    tokens = torch.cat([tokens.new_zeros(n_rows - n_tokens, width), tokens])
    query, key = (
        tokens @ projection.weight.T
        for projection in (attention.query_key.to_q, attention.query_key.to_k)
    )
    heads = [slice(h * d, (h + 1) * d) for h in range(n_heads)]
    queries, keys = [query[:, h] for h in heads], [key[:, h] for h in heads]
    landmark_queries = [naive_means(q, n_landmarks) for q in queries]
    landmark_keys = [naive_means(k, n_landmarks) for k in keys]
    inverses = naive_pseudo_inverses(
        [
            naive_softmax(q @ k.T / math.sqrt(d))
            for q, k in zip(landmark_queries, landmark_keys, strict=True)
        ]
    )
    mixing = []
    for h in range(n_heads):
        to_landmarks = naive_softmax(queries[h] @ landmark_keys[h].T / math.sqrt(d))
        from_landmarks = naive_softmax(landmark_queries[h] @ keys[h].T / math.sqrt(d))
        mixing.append(to_landmarks @ inverses[h] @ from_landmarks)
    return mixing


def naive_nystrom(attention, tokens, n_heads):
    """Nystrom attention of one bag, (token, width), head by head with explicit N x N matrices."""
    (n_tokens, width), mixing = tokens.shape, naive_mixing(attention, tokens, n_heads)
    n_rows, d = len(mixing[0]), width // n_heads
    value = (
        torch.cat([tokens.new_zeros(n_rows - n_tokens, width), tokens]) @ attention.to_v.weight.T
    )
    mixed = []
    for h, full in enumerate(mixing):
        kernel = attention.residual.weight[h, 0, :, 0]
        convolution = torch.zeros(n_rows, n_rows, dtype=tokens.dtype)
        for i in range(n_rows):
            for j in range(n_rows):
                if abs(i - j) <= 16:
                    convolution[i, j] = kernel[j - i + 16]
        mixed.append((full + convolution) @ value[:, h * d : (h + 1) * d])
    linear = attention.output[0]
    return (torch.cat(mixed, dim=1) @ linear.weight.T + linear.bias)[n_rows - n_tokens :]


def naive_ppeg(position, tokens, side):
    square = tokens[1:].reshape(side, side, -1)
    encoded = square.clone()
    for convolution in position.convolutions:
        half = convolution.kernel_size[0] // 2
        for y in range(side):
            for x in range(side):
                total = convolution.bias.clone()
                for dy in range(-half, half + 1):
                    for dx in range(-half, half + 1):
                        if 0 <= y + dy < side and 0 <= x + dx < side:
                            weight = convolution.weight[:, 0, dy + half, dx + half]
                            total = total + weight * square[y + dy, x + dx]
                encoded[y, x] = encoded[y, x] + total
    return torch.cat([tokens[:1], encoded.reshape(side * side, -1)])


def naive_norm(norm, x):
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * norm.weight + norm.bias


def naive_transmil(model, features, n_heads):
    """Logits and scores of one bag, (instance, width)."""
    n_instances, side = len(features), math.ceil(math.sqrt(len(features)))
    linear = model.projection[0]
    instances = (features @ linear.weight.T + linear.bias).clamp(min=0)
    repeats = instances[: side * side - n_instances]
    tokens = torch.cat([model.class_token[0], instances, repeats])
    first, last = model.layers
    tokens = tokens + naive_nystrom(first.attention, naive_norm(first.norm, tokens), n_heads)
    tokens = naive_ppeg(model.position, tokens, side)
    normed = naive_norm(last.norm, tokens)
    query = normed[0] @ last.attention.query_key.to_q.weight.T
    keys = normed[1 : 1 + n_instances] @ last.attention.query_key.to_k.weight.T
    d = len(query) // n_heads
    scores = [
        keys[:, h * d : (h + 1) * d] @ query[h * d : (h + 1) * d] / math.sqrt(d)
        for h in range(n_heads)
    ]
    tokens = tokens + naive_nystrom(last.attention, normed, n_heads)
    logits = model.head.weight @ naive_norm(model.norm, tokens)[0] + model.head.bias
    return logits, torch.stack(scores)


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
    attention = NystromAttention(16, 4, 0.0).double().eval()
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
    attention = NystromAttention(16, 4, 0.0)
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


@given(n_instances=st.integers(1, 40), seed=st.integers(0, 999))
@LAWS
def test_transmil__any_bag__agrees_with_the_naive_model(n_instances, seed):
    torch.manual_seed(seed)
    model = TransMIL(6, 3, hidden=8, n_heads=2, dropout=0.0).double()
    torch.nn.init.normal_(model.norm.weight)
    features = randn(n_instances, 6, seed=seed)

    output = model(features[None])

    logits, scores = naive_transmil(model, features, 2)
    torch.testing.assert_close(output.logits[0], logits)
    torch.testing.assert_close(output.scores[0], scores)
    weights = list(model.layers.parameters())
    actual, expected = (
        torch.autograd.grad(total, weights, materialize_grads=True, allow_unused=True)
        for total in (
            output.logits.square().sum() + output.scores.sum(),
            logits.square().sum() + scores.sum(),
        )
    )
    torch.testing.assert_close(actual, expected)


def test_pseudo_inverse__well_conditioned_matrix__inverts_it():
    # Near the identity, and its rows sum to one, as those of a softmax do.
    matrix = (8 * torch.eye(5).double() + 0.3 * randn(2, 3, 5, 5)).softmax(dim=-1)

    inverse = pseudo_inverse(matrix, 6)

    torch.testing.assert_close(matrix @ inverse, torch.eye(5).double().expand(2, 3, 5, 5))


def test_pseudo_inverse__batch_of_bags__scales_each_by_its_own_norms():
    matrices = (randn(2, 3, 5, 5) * torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)).softmax(dim=-1)

    together = pseudo_inverse(matrices, 6)

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
