"""A normalized sigmoid whose number of high instances follows the anchor's attention."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mil_anchor.attention import log_normalized_sigmoid, log_softmax
from mil_anchor.targets.base import Target


@dataclass(frozen=True)
class AdaptiveSigmoidTarget(Target):
    """A normalized sigmoid whose number of high instances follows the anchor's own attention.

    With the anchor's attention ``a = softmax(z)``, its typical value ``l = sum_j a_j^2`` (the mean
    that attention itself sees; 1/n for n equal weights) and ``theta = threshold x l``:
    ``target_i = a_i^2 / (a_i^2 + theta^2) / sum_j (...)``. That is the sigmoid of
    ``(z_i - c) / tau`` with tau = 1/2 and c where the attention is theta, so no count is chosen.

    What holds for any scores:

    1. *Between uniform and squared attention*: ``1 <= target_i / target_j <= (a_i / a_j)^2``
       where ``a_i >= a_j``.
    2. *High instances are alike*: where both exceed ``theta exp(t)``, the ratio is at most
       ``1 + exp(-2 t)``. An instance below ``theta exp(-t)`` gets at most ``2 exp(-2 t)`` of what
       one above theta gets.
    3. *Invariance*: the offset of the scores changes nothing.

    What it pulls to: ``target_i / a_i`` is proportional to ``a_i / (a_i^2 + theta^2)``, highest at
    theta and symmetric around it in log attention. With ``x = ln(a / theta)`` this is the f of
    `CenteredSigmoidTarget`, here ``ln(2 cosh x)``: instances above theta approach each other, those
    below drift apart. For *every* n, n equal weights and nothing else are a stable fixed point
    (``x = -ln threshold > 0``). Beside n weights ``h``, others of weight ``w < h`` sink exactly if
    ``h w < theta^2``; it suffices that ``w / h < (threshold x s)^2`` when the n hold the share s of
    the attention. Attention that has not separated yet becomes flatter,
    as under the NSF, so ramp the weight in; at threshold 1 it would stay, but then high instances
    that differ a little fall apart into ever fewer.

    Args:
        threshold: Which multiple of the typical attention half counts, in (0, 1).

    Raises:
        ValueError: The threshold lies outside (0, 1).

    Example:
        Two and three instances stand out:

        >>> scores = torch.tensor([[4.0, 4.5, 0.0, 0.0], [4.0, 4.5, 4.2, 0.0]])
        >>> AdaptiveSigmoidTarget()(scores).exp().round(decimals=2)
        tensor([[0.4400, 0.5600, 0.0000, 0.0000],
                [0.3000, 0.3700, 0.3300, 0.0000]])

    Source: ours.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), but got {self.threshold}.")

    @override
    def log_target(
        self, scores: Float[Tensor, "*bag_row instance"], *, progress: float | int
    ) -> Float[Tensor, "*bag_row instance"]:
        log_attention = log_softmax(scores)
        typical = torch.logsumexp(2 * log_attention, dim=-1, keepdim=True)
        return log_normalized_sigmoid(2 * (log_attention - typical - math.log(self.threshold)))
