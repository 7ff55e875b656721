"""Attention pooling over the real instances of padded bags."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mask_scores(
    scores: Float[Tensor, "bag row instance"], mask: Bool[Tensor, "bag instance"]
) -> Float[Tensor, "bag row instance"]:
    """Sets the scores of padded instances to ``-inf``, so that a softmax gives them nothing."""
    return scores.masked_fill(~mask[:, None], -torch.inf)


def attention_pool(
    scores: Float[Tensor, "bag row instance"], features: Float[Tensor, "bag instance width"]
) -> Float[Tensor, "bag row width"]:
    """Averages the instances of each bag, weighted by the softmax of each row of masked scores."""
    # In this order the gradient of the features is contiguous; in the other, every elementwise
    # step of the backward pass below would be strided.
    return torch.bmm(scores.softmax(dim=-1), features)
