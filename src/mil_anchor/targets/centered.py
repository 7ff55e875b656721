"""A normalized sigmoid whose offset is chosen so that about K instances get the attention."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mil_anchor.attention import log_normalized_sigmoid
from mil_anchor.schedules import Constant, Schedule, as_schedule
from mil_anchor.targets.base import Target, check_temperature

# Far more passes than any scores have needed; normal ones need three.
_MAX_PASSES = 100


@dataclass(frozen=True)
class CenteredSigmoidTarget(Target):
    r"""A normalized sigmoid whose offset gives about K instances the attention.

    ``target_i = sigmoid((z_i - c) / tau) / K`` with c per row such that the sigmoids sum to K. It
    lies between ``softmax(z / tau)`` (K -> 0) and the uniform distribution (K -> N), which is also
    the target of a bag of N <= K instances.

    What holds for any scores (as ASMIL's Theorem 1 does for the NSF above and below 0):

    1. *Cap*: no target exceeds 1/K, so its entropy is at least ln K.
    2. *High instances are alike*: for two of them with ``z >= c + t`` the ratio of the targets is
       at most ``1 / sigmoid(t / tau) = 1 + exp(-t / tau)``.
    3. *Low instances get nothing*: ``z <= c - t`` gives a target of at most ``exp(-t / tau) / K``.
    4. *There are about K high instances*: fewer than ``K (1 + exp(-t / tau))`` have ``z > c + t``,
       since each adds more than sigmoid(t / tau) to a sum of K. With t = 0: fewer than 2 K are
       above c.
    5. *Invariance*: ``z + a`` has the target of z, as it has its softmax; c moves by a.

    What it pulls to: ``softmax(z)`` stays where it is exactly if
    ``f(z_i) = z_i - log sigmoid((z_i - c) / tau)`` is equal for all i, and
    ``f' = 1 - sigmoid((c - z) / tau) / tau``. At tau >= 1 f rises strictly: only uniform attention
    is a fixed point, as it is of the NSF. At tau < 1 f falls below ``c + tau logit(1 - tau)`` and
    rises above it, so fixed points have two levels. Near one, a deviation within a level changes at
    the rate ``-softmax(z_i) f'(z_i)``: the high level is stable; the low one is not, unless its
    attention vanishes. What remains are n equal weights with ``n sigmoid = K`` and
    ``sigmoid > 1 - tau``: ``K <= n < K / (1 - tau)``, an entropy of ln n. So tau -> 0 gives n = K,
    and tau = 1/2 fewer than 2 K.

    Args:
        count: K in instances, at least 1; it need not be whole. Either count or
        share: K as a share of the bag's real instances, in (0, 1]; at least one instance.
        temperature: tau, above 0.
        start_share: K moves geometrically from this share of the bag's instances to the K above as
            ``schedule(progress)`` goes from 0 to 1. None: K stays.
        schedule: How K moves: a `Schedule` or its name, usually ``"ramp"``.

    Raises:
        ValueError: An argument is out of range; the message names it.

    Example:
        >>> target = CenteredSigmoidTarget(count=2, temperature=0.2)
        >>> target(torch.tensor([5.0, 9.0, 8.0, 5.0])).exp().round(decimals=3)
        tensor([0.0000, 0.5000, 0.5000, 0.0000])

    Source: ours. c is found by Newton's method on the log-odds of the mean sigmoid, which is linear
    in c for equal scores, within a bracket; each pass is O(N). The result is normalised after it.
    """

    count: float | int | None = None
    share: float | int | None = None
    temperature: float | int = 0.5
    start_share: float | int | None = None
    schedule: Schedule | str = "constant"

    def __post_init__(self) -> None:
        if (self.count is None) == (self.share is None):
            raise ValueError(
                "Give either count or share, the number of instances that the target is for, but "
                f"got count={self.count} and share={self.share}."
            )
        if self.count is not None and not 1 <= self.count < math.inf:
            raise ValueError(f"count must be a finite number of at least 1, but got {self.count}.")
        for name, share in (("share", self.share), ("start_share", self.start_share)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} must lie in (0, 1], but got {share}.")
        check_temperature(self.temperature)
        if (self.start_share is None) != isinstance(as_schedule(self.schedule), Constant):
            raise ValueError(
                "A start_share needs a schedule that leads away from it, such as 'ramp', and a "
                f"schedule needs a start_share, but got start_share={self.start_share} and "
                f"schedule={self.schedule!r}."
            )

    @override
    def log_target(
        self, scores: Float[Tensor, "*bag_row instance"], *, progress: float | int
    ) -> Float[Tensor, "*bag_row instance"]:
        # From the highest down: a far offset of the scores costs no digits.
        scaled = (scores - scores.amax(dim=-1, keepdim=True)) / self.temperature
        n_instances = (scaled > -torch.inf).sum(dim=-1, keepdim=True).to(scaled.dtype)
        count = self._count(n_instances, progress)
        is_selective = count < n_instances
        # Rows without a choice take part in the search with an easy one.
        center = _center(scaled, torch.where(is_selective, count, n_instances / 2), n_instances)
        uniform = scaled.masked_fill(scaled > -torch.inf, 0)
        return log_normalized_sigmoid(torch.where(is_selective, scaled - center, uniform))

    def _count(self, n_instances: Tensor, progress: float | int) -> Tensor:
        """K of each row."""
        if self.share is None:
            end = torch.full_like(n_instances, float(self.count or 1))
        else:
            end = (self.share * n_instances).clamp(min=1)
        if self.start_share is None:
            return end
        start = (self.start_share * n_instances).clamp(min=1)
        return start * (end / start) ** as_schedule(self.schedule)(float(progress))


def _center(scaled: Tensor, count: Tensor, n_instances: Tensor) -> Tensor:
    """The c of each row with ``sum sigmoid(scaled - c) = count``; the highest score is 0."""
    log_odds = torch.log(count) - torch.log(n_instances - count)
    real = scaled.masked_fill(scaled == -torch.inf, 0)
    low, high = real.amin(dim=-1, keepdim=True) - log_odds, -log_odds
    # Where it lies for normal scores, with the sigmoid taken for a normal distribution, too.
    mean = real.sum(dim=-1, keepdim=True) / n_instances
    variance = (real.square().sum(dim=-1, keepdim=True) / n_instances - mean.square()).clamp(min=0)
    center = mean - log_odds * torch.sqrt(1 + math.pi / 8 * variance)
    center = torch.minimum(torch.maximum(center, low), high)
    precision = torch.finfo(scaled.dtype).eps
    for _ in range(_MAX_PASSES):
        sigmoid = torch.sigmoid_(scaled - center)
        total = sigmoid.sum(dim=-1, keepdim=True)
        slope = total - sigmoid.square_().sum(dim=-1, keepdim=True)
        rest = n_instances - total
        low = torch.where(total > count, center, low)
        high = torch.where(total > count, high, center)
        error = torch.log(total) - torch.log(rest) - log_odds
        newton = center + error * total * rest / (n_instances * slope)
        # Between two groups of scores the slope vanishes; NaN and infinity are not inside.
        is_inside = (newton > low) & (newton < high)
        following = torch.where(is_inside, newton, (low + high) / 2)
        is_exact = (total - count).abs() <= 8 * precision * count
        is_still = (following - center).abs() <= precision * center.abs()
        if bool((is_exact | is_still).all()):
            break
        center = torch.where(is_exact, center, following)
    return center
