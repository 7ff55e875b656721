"""What the monitor measures on the attention of one bag, and the form in which it keeps it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float16, Float64, Num
from torch import Tensor

from mil_anchor.attention import js_divergence, log_softmax
from mil_anchor.callbacks.recorder import batch_entry
from mil_anchor.ranks import rank_auroc, rank_correlation
from mil_anchor.sites.base import ModuleCall


def round_attention(
    log_attention: Float[Tensor, "row instance"],
) -> Float16[Tensor, "row instance"]:
    """Log-attention for keeping, in float16: ``log a + H(a)``, which is near 0 where the mass is.

    There float16 is finest, so that the rounding alone is a divergence of about 2e-8 nats, where
    ``log a`` in float16 costs up to 6e-7 and makes ties of near uniform attention. The square root
    of the attention costs as little, but the ranks of small attention.
    """
    entropy = torch.special.entr(log_attention.exp()).sum(dim=-1, keepdim=True)
    rounded: Tensor = (log_attention + entropy).half()
    return rounded


def restore_attention(
    rounded: Float16[Tensor, "row _"] | None, shape: tuple[int, ...]
) -> Float64[Tensor, "row _"] | None:
    """The log-attention that `round_attention` has rounded; None if it has not this shape.

    A bag that was resampled to another size has no earlier attention to compare with.
    """
    if rounded is None or rounded.shape != shape:
        return None
    return log_softmax(rounded.double())


def divergence(
    previous: Float64[Tensor, "row instance"] | None, current: Float64[Tensor, "row instance"]
) -> float | None:
    """Jensen-Shannon divergence in nats, mean over rows; None without an earlier log-attention."""
    return None if previous is None else _mean(js_divergence(previous, current))


def correlation(
    one: Float64[Tensor, "row instance"] | None, other: Float64[Tensor, "row instance"]
) -> float | None:
    """Rank correlation, mean over the rows that have one; None if there are none."""
    return None if one is None else _mean(rank_correlation(one, other))


def labelled_auroc(
    log_attention: Float[Tensor, "row instance"], labels: Num[Tensor, " label"] | None
) -> float | None:
    """AUROC of the attention, mean over rows; None unless instances of both classes are known.

    Args:
        log_attention: Real instances only.
        labels: Of the same instances: above 0 is positive, 0 negative and below unknown.
    """
    if labels is None or len(labels) != log_attention.shape[-1]:
        return None
    known = labels >= 0
    return _mean(rank_auroc(log_attention[:, known], labels[known] > 0))


def labels_of_bags(batch: Any, n_bags: int) -> list[Num[Tensor, " _"] | None]:
    """The labels of each bag's real instances, on the CPU; None where the batch has none."""
    labels, mask = batch_entry(batch, "instance_label"), batch_entry(batch, "mask")
    if not isinstance(labels, Tensor) or labels.numel() % max(n_bags, 1):
        return [None] * n_bags
    of_bags = labels.detach().cpu().reshape(n_bags, -1)
    if not isinstance(mask, Tensor) or mask.numel() != labels.numel():
        return list(of_bags)
    real = mask.cpu().reshape(of_bags.shape).bool()
    return [own[own_real] for own, own_real in zip(of_bags, real, strict=True)]


def mixing_of_bags(
    path: str, calls: Sequence[ModuleCall], of_bags: Mapping[str, Float[Tensor, "_ _"]]
) -> list[Float64[Tensor, "_ _"]]:
    """By which weights a model has mixed the instances of each bag, on the CPU.

    Args:
        path: The submodule, for the message.
        calls: Its calls; each puts out (bag, row, at least the instances).
        of_bags: The attention of the bags by id, in the order of the calls.

    Raises:
        ValueError: The calls do not tell them for these bags.
    """
    outputs = [output for call in calls for output in call.output]
    wanted = [tuple(log_attention.shape) for log_attention in of_bags.values()]
    found = [tuple(output.shape) for output in outputs]
    cut = [(*own[:-1], min(own[-1], n)) for own, (_, n) in zip(found, wanted, strict=False)]
    if len(found) != len(wanted) or cut != wanted:
        raise ValueError(
            f"The submodule '{path}' must put out how the model mixes each bag in evaluation, "
            f"(row, instance) = {wanted} or more instances for bags {list(of_bags)}, but it gave "
            f"{found}. Name the right submodule in AttentionSite(mixing=...), or none."
        )
    return [
        output[:, :n_instances].detach().double().cpu()
        for output, (_, n_instances) in zip(outputs, wanted, strict=True)
    ]


def _mean(of_rows: Float64[Tensor, " row"]) -> float | None:
    """Mean over the rows that are not NaN; None if all are."""
    defined = of_rows[~of_rows.isnan()]
    return float(defined.mean()) if len(defined) else None
