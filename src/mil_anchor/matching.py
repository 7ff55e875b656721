"""How far a model's attention is from a target: as a distribution, or by what it pools."""

import torch
from jaxtyping import Float
from torch import Tensor

from mil_anchor.attention import kl_divergence

REDUCTIONS = ("sum", "mean")


def attention_distance(
    log_target: Float[Tensor, "bag row instance"],
    log_online: Float[Tensor, "bag row instance"],
    *,
    reduction: str = "sum",
) -> Float[Tensor, "bag row"]:
    """KL(target ‖ online) of each bag and row, in nats.

    Args:
        log_target: Log-attention that the online attention is held to, detached.
        log_online: Log-attention of the model.
        reduction: ``"sum"`` over the instances, or ``"mean"`` over the real ones, which makes
            value and gradient N times smaller: among thousands of instances there is no term left.
            It is here to reproduce results got with it.

    Raises:
        ValueError: The reduction is unknown.

    Source: ASMIL (arXiv 2603.06658), eq. 7, is the sum; its authors' released code takes the mean.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, but got {reduction}.")
    divergence = kl_divergence(log_target, log_online)
    if reduction == "sum":
        return divergence
    return divergence / (log_online > -torch.inf).sum(dim=-1)


def bag_feature_distance(
    log_target: Float[Tensor, "bag row instance"],
    log_online: Float[Tensor, "bag row instance"],
    features: Float[Tensor, "bag instance width"],
) -> Float[Tensor, "bag row"]:
    """Mean squared difference of the bag features that two attentions pool from the same instances.

    ``‖sum_i (target_i - attention_i) h_i‖^2 / width``. It is zero for a *different* attention where
    the rows of h are affinely dependent, that is in every bag with more than ``width + 1``
    instances: the attention may still move freely there.

    Args:
        log_target: Log-attention that the online attention is held to, detached.
        log_online: Log-attention of the model; ``-inf`` marks padding.
        features: Instance features h; no gradient goes through them.

    Source: ASMIL (arXiv 2603.06658), App. I, the alternative to matching the attention. Which
    distance the paper takes is not known. Ours is divided by the width, so that one weight means
    the same for features of any width.
    """
    with torch.autocast(log_online.device.type, enabled=False):
        apart = log_target.exp() - log_online.exp()
        padding = (log_online == -torch.inf).all(dim=1)
        # What lies in padding is nobody's business, and may be NaN.
        real = features.detach().to(apart.dtype).masked_fill(padding[..., None], 0)
        return (apart @ real).square().mean(dim=-1)
