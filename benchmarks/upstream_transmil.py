"""TransMIL in the operations of its authors' implementation, as a peer to measure against.

Written from the formulas: explicit attention matrices of all tokens and the landmarks, three
position convolutions, both layers over all tokens, one projection for queries, keys and values.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_N_HEADS = 8
_N_ITERATIONS = 6
_DROPOUT = 0.1


class UpstreamTransMIL(nn.Module):
    """A class token that two Nystrom layers mix with the instances (Shao et al., 2021)."""

    def __init__(self, in_features: int, n_classes: int, *, hidden: int = 512) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(1, 1, hidden))
        self.first, self.second = UpstreamLayer(hidden), UpstreamLayer(hidden)
        self.position = UpstreamPPEG(hidden)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of a bag, (1, instance, width)."""
        n_instances = features.shape[1]
        side = math.ceil(math.sqrt(n_instances))
        instances = self.projection(features)
        # The square of instances is filled up with the first ones.
        repeats = instances[:, : side**2 - n_instances]
        tokens = torch.cat([self.class_token, instances, repeats], dim=1)
        tokens = self.second(self.position(self.first(tokens), side))
        logits: Tensor = self.head(self.norm(tokens)[:, 0])
        return logits


class UpstreamLayer(nn.Module):
    """Layer norm, attention, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = UpstreamAttention(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mixes the tokens."""
        return tokens + self.attention(self.norm(tokens))


class UpstreamAttention(nn.Module):
    """Nystrom attention by explicit matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n_landmarks = width // 2
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.residual = nn.Conv2d(
            _N_HEADS, _N_HEADS, (33, 1), padding=(16, 0), groups=_N_HEADS, bias=False
        )
        self.output = nn.Sequential(nn.Linear(width, width), nn.Dropout(_DROPOUT))

    def forward(self, tokens: Tensor) -> Tensor:
        """Attends from all tokens to all tokens, by way of the landmarks."""
        n_tokens = tokens.shape[1]
        padded = F.pad(tokens, (0, 0, -n_tokens % self.n_landmarks, 0))
        queries, keys, values = (
            part.unflatten(-1, (_N_HEADS, -1)).transpose(1, 2)
            for part in self.to_qkv(padded).chunk(3, dim=-1)
        )
        queries = queries / math.sqrt(queries.shape[-1])
        landmark_queries = queries.unflatten(2, (self.n_landmarks, -1)).mean(dim=3)
        landmark_keys = keys.unflatten(2, (self.n_landmarks, -1)).mean(dim=3)
        to_landmarks = (queries @ landmark_keys.mT).softmax(dim=-1)
        between = (landmark_queries @ landmark_keys.mT).softmax(dim=-1)
        from_landmarks = (landmark_queries @ keys.mT).softmax(dim=-1)
        mixed = (to_landmarks @ _pseudo_inverse(between)) @ (from_landmarks @ values)
        mixed = mixed + self.residual(values)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output[:, -n_tokens:]


class UpstreamPPEG(nn.Module):
    """Three depth-wise convolutions over the square of instances."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
            for kernel in (7, 5, 3)
        )

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """Encodes all tokens but the first, the class token."""
        square = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        encoded = square
        for convolution in self.convolutions:
            encoded = encoded + convolution(square)
        return torch.cat([tokens[:, :1], encoded.flatten(2).transpose(1, 2)], dim=1)


def _pseudo_inverse(matrix: Tensor) -> Tensor:
    """Approximates the Moore-Penrose inverse by matrix products."""
    magnitude = matrix.abs()
    inverse = matrix.mT / (magnitude.sum(dim=-1).max() * magnitude.sum(dim=-2).max())
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(_N_ITERATIONS):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return inverse
