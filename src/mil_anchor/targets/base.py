"""What a target is: a distribution that the online attention is pulled to."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mil_anchor.attention import valid_scores


@dataclass(frozen=True)
class Target(ABC):
    """A distribution over the instances of each bag and row, made of raw scores.

    Calling a target checks the scores and carries no gradient. One of your own is a subclass with
    the method `log_target`.
    """

    reads_scores: ClassVar[bool] = True
    """Whether the values of the scores matter; if not, no anchor is needed."""

    @abstractmethod
    def log_target(
        self, scores: Float[Tensor, "*bag_row instance"], *, progress: float | int
    ) -> Float[Tensor, "*bag_row instance"]:
        """The log-target of scores that are checked and ``-inf`` on padding."""

    @torch.no_grad()
    def __call__(
        self,
        scores: Float[Tensor, "*bag_row instance"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        progress: float | int = 1.0,
    ) -> Float[Tensor, "*bag_row instance"]:
        """The log-target over the last axis.

        Args:
            scores: Raw scores of the anchor, usually (bag, row, instance).
            mask: True marks a real instance. It has the shape of the scores, or that shape
                without the row axis. None: all instances are real.
            progress: How far the training has come, from 0 to 1.

        Returns:
            Log of a distribution, in float32 at least; ``-inf`` on padding.

        Raises:
            ValueError: A score is NaN or +inf, a bag has no real instance, the mask does not fit,
                or the progress lies outside [0, 1].
        """
        return self.log_target(valid_scores(scores, mask), progress=progress)


def check_temperature(temperature: float | int) -> None:
    """Raise a ValueError unless the temperature is a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, but got {temperature}.")
