"""Scores, and what they become when they are pulled to a target."""

import torch
from torch import Tensor

from mil_anchor.attention import log_softmax
from mil_anchor.targets import Target


def exact_scores(seed: int, n_instances: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_instances, generator=generator, dtype=torch.float64) * scale


def pull(
    target: Target, *, n_high: int = 20, spread: float = 0.7, step_size: float = 40
) -> tuple[Tensor, Tensor]:
    """400 scores, some of them high, pulled to the target of their average; before and after.

    400 steps of 40 end where 20,000 steps of 1 do: at .518 and .510 for K = 20, tau = 1/2.
    """
    scores = exact_scores(0, 400, spread)
    scores[:n_high] += 4.0
    before, average = log_softmax(scores), scores.clone()
    for _ in range(400):
        gradient = log_softmax(scores).exp() - target(average).exp()
        scores = scores - step_size * gradient
        average = 0.9 * average + 0.1 * scores
    return before, log_softmax(scores)
