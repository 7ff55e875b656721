"""TransMIL: self-attention between instances by the Nystrom method (Shao et al., 2021)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from baselines.checks import check_bags, check_dropout, check_positive
from baselines.depthwise import depthwise_convolution
from baselines.nystrom import ClassTokenAttention, NystromAttention
from baselines.output import MILOutput


class TransLayer(nn.Module):
    """Residual attention over normalised tokens, ``x + attention(norm(x))``.

    Args:
        width: Width of the tokens.
        attention: Puts out all tokens, or the first ones that whoever comes next needs.
    """

    def __init__(self, width: int, attention: NystromAttention) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = attention

    def forward(
        self, tokens: Float[Tensor, "bag token width"]
    ) -> tuple[Float[Tensor, "bag mixed width"], Float[Tensor, "bag token width"]]:
        """Returns the new tokens, and the normalised ones that the attention has read."""
        normed = self.norm(tokens)
        mixed = self.attention(normed)
        return tokens[:, : mixed.shape[1]] + mixed, normed


class PPEG(nn.Module):
    """Pyramid position encoding: depth-wise convolutions over the square of instances.

    ``x + sum_k conv_k(x)`` is one convolution, its kernel the sum of all, each in the middle.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
            for kernel in (7, 5, 3)
        )

    def forward(
        self, tokens: Float[Tensor, "bag token width"], side: int
    ) -> Float[Tensor, "bag token width"]:
        """Encodes all tokens but the first, the class token."""
        square = rearrange(tokens[:, 1:], "b (y x) w -> b w y x", y=side)
        encoded = depthwise_convolution(square, *self._merged())
        return torch.cat([tokens[:, :1], rearrange(encoded, "b w y x -> b (y x) w")], dim=1)

    def _merged(self) -> tuple[Tensor, Tensor]:
        convolutions: Any = self.convolutions
        half = convolutions[0].padding[0]
        kernels = [F.pad(c.weight, 4 * (half - c.padding[0],)) for c in convolutions]
        identity = torch.zeros_like(kernels[0])
        identity[:, :, half, half] = 1
        # The gradients of stacked biases would share their memory: accumulated, they would triple.
        first, *others = (c.bias for c in convolutions)
        return sum(kernels, start=identity), sum(others, start=first)


class TransMIL(nn.Module):
    """Classifies a class token that two Nystrom attention layers mix with the instances.

    Projection and ReLU; the first instances are repeated until their number is a square; class
    token in front; attention, PPEG, attention; layer norm and a linear layer on the class token.

    ``scores`` are the exact products of the class token's query with the instances' keys in the
    last layer, one row per head. The model never takes their softmax: its Nystrom attention has no
    row that is a distribution. They are the nearest thing to one, and a surrogate.

    The attention block is the submodule ``layers.1.attention.query_key``: normalised tokens
    (1, 1 + instance, hidden) of one bag, class token first and no padding or repeats, to raw scores
    (1, row, instance). It is called once per bag. What the model really mixes with shows, in
    evaluation mode, in the output of ``layers.1.attention.mixing_row``: (1, row, instance +
    repeats).

    Args:
        in_features: Width of the instance features.
        n_classes: Number of classes.
        hidden: Width of the tokens; half of it is the number of landmarks.
        n_heads: Number of heads.
        dropout: Dropout after each attention layer.

    Raises:
        ValueError: A count is not positive, ``n_heads`` does not divide ``hidden``, ``hidden`` is
            below 2, or ``dropout`` lies outside [0, 1).

    Example:
        >>> import torch
        >>> output = TransMIL(6, 2, hidden=16)(torch.randn(1, 5, 6))
        >>> output.logits.shape, output.scores.shape
        (torch.Size([1, 2]), torch.Size([1, 8, 5]))

    Source: Shao, Bian, Chen, Wang, Zhang, Ji, Zhang, *TransMIL: Transformer based Correlated
    Multiple Instance Learning for Whole Slide Image Classification*, NeurIPS 2021. Differences from
    the authors' code:

    - the class token follows the model's device; upstream moves it to the first GPU;
    - the pseudo-inverse is scaled per bag (see `pseudo_inverse_times`), and padded batches run bag
      by bag, so that no bag depends on another or on padding; upstream takes bags of equal size;
    - query, key and value are three layers and not one, so that a block owns just what scores;
    - products run from right to left, the last layer mixes its class token alone, and the three
      position convolutions are one: the same result for fewer operations;
    - widths and heads are arguments; upstream fixes 1024, 512 and 8;
    - returns logits and scores; upstream adds probabilities and the predicted class.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        hidden: int = 512,
        n_heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, n_classes=n_classes, hidden=hidden, n_heads=n_heads)
        check_dropout(dropout)
        if hidden < 2 or hidden % n_heads:
            raise ValueError(
                f"hidden must be at least 2 and a multiple of n_heads={n_heads}, but got {hidden}. "
                "Change one of the two."
            )
        self.in_features = in_features
        self.n_heads = n_heads
        self.projection = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU())
        self.class_token = nn.Parameter(torch.empty(1, 1, hidden))
        self.reset_parameters()
        self.layers = nn.ModuleList(
            TransLayer(hidden, attention(hidden, n_heads, dropout))
            for attention in (NystromAttention, ClassTokenAttention)
        )
        self.position = PPEG(hidden)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, n_classes)

    def reset_parameters(self) -> None:
        """Draws a new class token; the other parts have such a method of their own."""
        nn.init.normal_(self.class_token)

    def forward(
        self,
        features: Float[Tensor, "bag instance width"],
        mask: Bool[Tensor, "bag instance"] | None = None,
        label: Int[Tensor, " bag"] | None = None,  # noqa: ARG002 (all baselines are called alike)
    ) -> MILOutput:
        """Classifies a batch of bags; True in the mask marks a real instance.

        Raises:
            ValueError: A bag has no real instance, or the features have another width.
        """
        mask = check_bags("TransMIL", self.in_features, features, mask)
        logits, scores = [], []
        for bag, real in zip(features, mask, strict=True):
            bag_logits, bag_scores = self._classify(bag[real][None])
            logits.append(bag_logits)
            padded_scores = bag_scores.new_full((1, self.n_heads, len(real)), -torch.inf)
            padded_scores[..., real] = bag_scores
            scores.append(padded_scores)
        return MILOutput(torch.cat(logits), torch.cat(scores))

    def _classify(
        self, features: Float[Tensor, "1 instance width"]
    ) -> tuple[Float[Tensor, "1 cls"], Float[Tensor, "1 head instance"]]:
        n_instances = features.shape[1]
        side = math.isqrt(n_instances - 1) + 1
        instances = self.projection(features)
        repeats = instances[:, : side**2 - n_instances]
        tokens = torch.cat([self.class_token, instances, repeats], dim=1)

        tokens, _ = self.layers[0](tokens)
        tokens, normed = self.layers[1](self.position(tokens, side))
        query_key = self.get_submodule("layers.1.attention.query_key")
        scores = query_key(normed[:, : 1 + n_instances])
        return self.head(self.norm(tokens[:, 0])), scores
