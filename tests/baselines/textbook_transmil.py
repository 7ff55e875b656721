"""TransMIL written out from its formulas: explicit matrices, all tokens in both layers."""

import math

import torch


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
