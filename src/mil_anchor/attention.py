"""Raw attention scores to attention, and what is measured on attention.

Everything here works over the last axis (the instances of a bag), in log space, without an
epsilon, and in float32 (float64 scores stay float64), also under autocast. Instances that the mask
leaves out, and scores of ``-inf``, get a log-attention of ``-inf``: an attention of exactly zero.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mil_anchor.precision import running_in


def log_softmax(
    scores: Float[Tensor, "*bag_row instance"], mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "*bag_row instance"]:
    """Log of the usual attention, ``log softmax(z)``.

    Args:
        scores: Raw scores, usually (bag, row, instance).
        mask: True marks a real instance. It has the shape of the scores, or that shape without
            the row axis. None: all instances are real.

    Raises:
        ValueError: A score is NaN or +inf, a bag has no real instance, or the mask does not fit.

    Source: ASMIL (arXiv 2603.06658), eq. 1-2.
    """
    return F.log_softmax(valid_scores(scores, mask), dim=-1)


def log_normalized_sigmoid(
    scores: Float[Tensor, "*bag_row instance"], mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "*bag_row instance"]:
    """Log of the normalized sigmoid (NSF), ``log(sigmoid(z_i) / sum_j sigmoid(z_j))``.

    It is computed as ``log_softmax(log sigmoid(z))``, the same number for every finite score.
    Unlike the softmax it depends on the scores' offset: pass raw scores, never probabilities.

    Args:
        scores: Raw scores, usually (bag, row, instance).
        mask: As for `log_softmax`.

    Raises:
        ValueError: As for `log_softmax`.

    Source: ASMIL (arXiv 2603.06658), eq. 5.
    """
    valid = valid_scores(scores, mask)
    return F.log_softmax(F.logsigmoid(valid), dim=-1)


def softmax(
    scores: Float[Tensor, "*bag_row instance"], mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "*bag_row instance"]:
    """Attention of the raw scores; see `log_softmax`."""
    return log_softmax(scores, mask).exp()


def normalized_sigmoid(
    scores: Float[Tensor, "*bag_row instance"], mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "*bag_row instance"]:
    """Normalized sigmoid of the raw scores; see `log_normalized_sigmoid`.

    Among scores above tau no two values differ by more than the factor ``1 + exp(-tau)``; a score
    below -tau gets at most ``exp(-tau) / h`` beside h scores above tau (ASMIL, Theorem 1).

    Example:
        >>> normalized_sigmoid(torch.tensor([[8.0, 9.0, -9.0]])).round(decimals=3)
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    return log_normalized_sigmoid(scores, mask).exp()


def valid_scores(
    scores: Float[Tensor, "*bag_row instance"], mask: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "*bag_row instance"]:
    """Raw scores, checked, in float32 at least, and ``-inf`` where the mask leaves an instance out.

    Args:
        scores: Raw scores, usually (bag, row, instance).
        mask: As for `log_softmax`.

    Raises:
        ValueError: As for `log_softmax`.
    """
    with running_in("float32", scores.device.type):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            scores = scores.masked_fill(~_fit_mask(mask, scores), -torch.inf)
    _check(scores)
    return scores


def kl_divergence(
    log_target: Float[Tensor, "*bag_row instance"], log_online: Float[Tensor, "*bag_row instance"]
) -> Float[Tensor, "*bag_row"]:
    """KL(target ‖ online), summed over the instances: one value per bag and row, in nats.

    Instances of target zero add nothing, whatever the online attention is there. Pass a detached
    target: with it the gradient with respect to the online scores is ``softmax(z) - target``.

    Args:
        log_target: Log-attention that the online attention is held to.
        log_online: Log-attention of the model.

    Source: ASMIL (arXiv 2603.06658), eq. 7-8; summed, not averaged, over instances.
    """
    with running_in("float32", log_online.device.type):
        target = log_target.exp()
        # (-inf) - (-inf) is NaN, and replaced before anything multiplies it: a difference hands no
        # NaN on in the backward pass.
        difference = (log_target - log_online).masked_fill(target == 0, 0)
        return (target * difference).sum(dim=-1)


def js_divergence(
    log_p: Float[Tensor, "*bag_row instance"], log_q: Float[Tensor, "*bag_row instance"]
) -> Float[Tensor, "*bag_row"]:
    """Jensen-Shannon divergence in nats, between 0 and ln 2: one value per bag and row.

    Source: ASMIL (arXiv 2603.06658), eq. 3 and 35.
    """
    with running_in("float32", log_p.device.type):
        # Where both are zero so is their mean; logaddexp(-inf, -inf) has a NaN gradient.
        neither = (log_p == -torch.inf) & (log_q == -torch.inf)
        log_sum = torch.logaddexp(log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0))
        log_middle = (log_sum - math.log(2)).masked_fill(neither, -torch.inf)
    return (kl_divergence(log_p, log_middle) + kl_divergence(log_q, log_middle)) / 2


def normalized_entropy(
    log_attention: Float[Tensor, "*bag_row instance"],
) -> Float[Tensor, "*bag_row"]:
    """Entropy divided by ln N: 1 for uniform attention, 0 when one instance has it all.

    N counts the instances whose attention is not exactly zero. A bag of one instance has the
    value 1: its attention is uniform.
    """
    supported = log_attention > -torch.inf
    finite = log_attention.masked_fill(~supported, 0)
    entropy = -(finite.exp() * finite * supported).sum(dim=-1)
    n_instances = supported.sum(dim=-1)
    largest = n_instances.clamp(min=2).to(entropy.dtype).log()
    return torch.where(n_instances > 1, entropy / largest, torch.ones_like(entropy))


def top_mass(
    log_attention: Float[Tensor, "*bag_row instance"],
    *,
    count: int | None = None,
    share: float | None = None,
) -> Float[Tensor, "*bag_row"]:
    """Attention held by a bag's highest instances together.

    Args:
        log_attention: Log-attention; ``-inf`` marks padding.
        count: How many of the highest instances (a smaller bag counts whole), or
        share: which share of the bag's real instances, rounded up to whole instances.

    Raises:
        ValueError: Not exactly one of count (at least 1) and share (in (0, 1]) is given.
    """
    if (count is None) == (share is None):
        raise ValueError(f"Give either count or share, but got count={count} and share={share}.")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, but got {count}.")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], but got {share}.")
    n_instances = (log_attention > -torch.inf).sum(dim=-1, keepdim=True)
    if share is not None:
        n_top = torch.ceil(n_instances * share).long()
    else:
        n_top = n_instances.clamp(max=count)
    highest_first = log_attention.exp().sort(dim=-1, descending=True).values
    return highest_first.cumsum(dim=-1).gather(-1, n_top - 1).squeeze(-1)


def _fit_mask(mask: Tensor, scores: Tensor) -> Tensor:
    if mask.shape == scores.shape:
        return mask
    if scores.ndim > 1 and mask.shape == scores.shape[:-2] + scores.shape[-1:]:
        return mask.unsqueeze(-2)
    raise ValueError(
        "The mask must have the shape of the scores, with or without the row axis, but the scores "
        f"are {tuple(scores.shape)} and the mask is {tuple(mask.shape)}."
    )


def _check(scores: Tensor) -> None:
    if scores.shape[-1] == 0:
        raise ValueError(
            f"Every bag needs a real instance, but these scores have none: {tuple(scores.shape)}. "
            "Drop slides without tiles before batching."
        )
    # One pass answers for both: the largest score of a row is NaN if any is, +inf if any is, and
    # -inf only when no instance is real. Such a number minus itself is NaN, and any other is 0.
    largest = scores.detach().amax(dim=-1)
    if not bool((largest - largest).any()):
        return
    rows = scores.reshape(scores.shape[0] if scores.ndim > 1 else 1, -1, scores.shape[-1])
    broken = [bag for bag, row in enumerate(rows) if bool((row.isnan() | (row == torch.inf)).any())]
    if broken:
        raise ValueError(
            f"Raw scores must be finite, but bags {broken} of these scores have a NaN or +inf. "
            "Look for NaN features or a learning rate that made the model diverge."
        )
    empty = [bag for bag, row in enumerate(rows) if bool((row == -torch.inf).all(dim=-1).any())]
    raise ValueError(
        f"Every bag needs a real instance, but bags {empty} of these scores are all padding. "
        "Drop slides without tiles before batching."
    )
