"""What depends on the order of scores alone: rank correlation and AUROC, both in O(N log N)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from torch import Tensor


def rank_correlation(
    one: Float[Tensor, "*row instance"], other: Float[Tensor, "*row instance"]
) -> Float64[Tensor, "*row"]:
    """Spearman's rank correlation over the last axis: Pearson's correlation of the mid-ranks.

    Args:
        one: Scores or log-attention, without NaN; ``-inf`` is the lowest.
        other: The same of another epoch, or another judge.

    Returns:
        One value in [-1, 1] for each row; NaN where all values of one side are equal.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([-9.0, 0.0, 0.1]))
        tensor(1., dtype=torch.float64)

    Source: Spearman, *The proof and measurement of association between two things*, 1904; ties get
    the mean of their ranks, as in ``scipy.stats.spearmanr``.
    """
    first, second = (_centred(mid_ranks(values)) for values in (one, other))
    norm = (first.square().sum(dim=-1) * second.square().sum(dim=-1)).sqrt()
    return (first * second).sum(dim=-1) / norm


def rank_auroc(
    scores: Float[Tensor, "*row instance"], positive: Bool[Tensor, " instance"]
) -> Float64[Tensor, "*row"]:
    """AUROC: how often a positive instance has a higher score than a negative one, ties half.

    With R the sum of the mid-ranks of the n positive of N instances it is
    ``(R - n (n + 1) / 2) / (n (N - n))``.

    Args:
        scores: Scores or log-attention, without NaN; ``-inf`` is the lowest.
        positive: Which instances are positive.

    Returns:
        One value in [0, 1] for each row; NaN unless there are instances of both classes.

    Example:
        >>> rank_auroc(torch.tensor([0.3, 0.1, 0.2]), torch.tensor([True, False, True]))
        tensor(1., dtype=torch.float64)

    Source: Mann and Whitney, *On a test of whether one of two random variables is stochastically
    larger than the other*, 1947.
    """
    n_positive = positive.sum().double()
    n_negative = len(positive) - n_positive
    rank_sum = mid_ranks(scores)[..., positive].sum(dim=-1)
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def mid_ranks(values: Float[Tensor, "*row instance"]) -> Float64[Tensor, "*row instance"]:
    """Ranks from 1 over the last axis; equal values share the mean of their ranks.

    Example:
        >>> mid_ranks(torch.tensor([0.5, -1.0, 0.5])).tolist()
        [2.5, 1.0, 2.5]
    """
    in_order, order = values.sort(dim=-1)
    positions = torch.arange(1, values.shape[-1] + 1, device=values.device).double()
    positions = positions.expand(values.shape)
    differs = in_order[..., 1:] != in_order[..., :-1]
    starts, ends = F.pad(differs, (1, 0), value=True), F.pad(differs, (0, 1), value=True)
    # Each position gets the first and the last one of its run of equal values.
    first = positions.masked_fill(~starts, 0).cummax(dim=-1).values
    last = positions.masked_fill(~ends, torch.inf).flip(-1).cummin(dim=-1).values.flip(-1)
    return torch.empty_like(first).scatter_(-1, order, (first + last) / 2)


def _centred(ranks: Float64[Tensor, "*row instance"]) -> Float64[Tensor, "*row instance"]:
    return ranks - ranks.mean(dim=-1, keepdim=True)
