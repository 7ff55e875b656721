"""AEMCallback: spreads a model's attention by maximising its entropy."""

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mil_anchor.attention import kl_divergence, log_softmax, valid_scores
from mil_anchor.callbacks.regularizer import AttentionRegularizer
from mil_anchor.schedules import SCHEDULES, Constant, Schedule, as_schedule
from mil_anchor.sites.base import RecordedAttention, Site


class AEMCallback(AttentionRegularizer):
    """Adds the attention's negative entropy, ``lambda_t sum_n a_n ln a_n``, to the training loss.

    ``a = softmax(z)`` of the raw scores; the gradient with respect to z is
    ``lambda_t a_n (ln a_n + H(a))``. At the training's progress p, cosine annealing has
    ``lambda_t = lambda_0 / 2 (1 + cos(pi p))`` and linear annealing ``lambda_0 (1 - p)``.

    Args:
        site: The attention block: None (known by the model's class, or found in the first training
            step), a path, or a `Site`.
        weight: Coefficient lambda_0 of the first step, at least 0. The paper has 0.001
            (CAMELYON16), 0.1 (CAMELYON17) and 0.2 (LBC).
        annealing: ``"cosine"``, ``"linear"``, ``"none"``, or another schedule by its name or as a
            `Schedule`.
        top_k: Only the k highest attention values of a row count, renormalised to a sum of one; a
            bag of fewer instances counts whole. None: all of them.
        scope: Watch the attention ``"block"`` alone or the ``"encoder"`` in front of it too; the
            penalty is the same.
        strict: Whether scores that no softmax of the model has got are an error or a warning.

    Raises:
        ValueError: An argument is out of range; the message names it.

    Logs ``aem/entropy`` (in nats, of what the penalty acts on, the mean over the epoch's
    distributions) and ``aem/weight`` (the epoch's mean lambda_t).

    Source: AEM (arXiv 2406.15303). Here the penalty is the mean over the rows (heads, classes) and
    bags. The paper has cosine annealing in words only; its formula is our choice.
    """

    def __init__(
        self,
        site: Site | str | None = None,
        *,
        weight: float = 0.1,
        annealing: Schedule | str = "cosine",
        top_k: int | None = None,
        scope: str = "block",
        strict: bool = True,
    ) -> None:
        schedule = _schedule_of(annealing)
        if top_k is not None and top_k < 2:
            raise ValueError(
                f"top_k must be at least 2, but got {top_k}: the entropy of one instance is always "
                "0. Use None for all instances."
            )
        super().__init__(site, weight=weight, schedule=schedule, scope=scope, strict=strict)
        self.top_k = top_k

    @override
    def penalty(self, attention: RecordedAttention) -> Float[Tensor, "bag row"]:
        scores = valid_scores(attention.scores, attention.mask)
        if self.top_k is not None:
            # The softmax of what is left renormalises it.
            scores = scores.topk(min(self.top_k, scores.shape[-1])).values
        log_attention = log_softmax(scores)
        # The negative entropy is the divergence from a measure of one per instance.
        return kl_divergence(log_attention, torch.zeros_like(log_attention))

    @override
    def log_values(self, penalty: Tensor) -> dict[str, Tensor]:
        return {"aem/entropy": -penalty, "aem/weight": penalty.new_tensor(self.mean_weight)}


def _schedule_of(annealing: Schedule | str) -> Schedule:
    if annealing == "none":
        return Constant()
    if isinstance(annealing, str) and annealing not in SCHEDULES:
        raise ValueError(
            f"annealing must be one of none, {', '.join(SCHEDULES)}, or a Schedule, but got "
            f"'{annealing}'."
        )
    return as_schedule(annealing)
