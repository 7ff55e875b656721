"""The targets of the papers, and the control."""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mil_anchor.attention import log_normalized_sigmoid, log_softmax
from mil_anchor.targets.base import Target, check_temperature


@dataclass(frozen=True)
class SoftmaxTarget(Target):
    """The anchor's own attention, ``softmax(z / temperature)``.

    At temperature 1 every distribution is a fixed point of the pull: it slows the attention down
    and changes nothing else. Above 1 the only fixed point is uniform attention, below 1 the
    target is sharper than the anchor's attention and pulls towards its highest instance.

    Args:
        temperature: Above 0; 1 is the paper's.

    Raises:
        ValueError: The temperature is not a finite number above 0.

    Source: ASMIL (arXiv 2603.06658), "+Anchor".
    """

    temperature: float | int = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @override
    def log_target(
        self, scores: Float[Tensor, "*bag_row instance"], *, progress: float | int
    ) -> Float[Tensor, "*bag_row instance"]:
        return log_softmax(scores / self.temperature)


@dataclass(frozen=True)
class SigmoidTarget(Target):
    """The normalized sigmoid (NSF) of ``z / temperature``; see `normalized_sigmoid`.

    It depends on the scores' offset, which a softmax leaves arbitrary. At temperature 1 uniform
    attention is its only fixed point, whatever the offset; see `CenteredSigmoidTarget`.

    Args:
        temperature: Above 0; 1 is the paper's.

    Raises:
        ValueError: The temperature is not a finite number above 0.

    Source: ASMIL (arXiv 2603.06658), eq. 5; the paper has no temperature.
    """

    temperature: float | int = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @override
    def log_target(
        self, scores: Float[Tensor, "*bag_row instance"], *, progress: float | int
    ) -> Float[Tensor, "*bag_row instance"]:
        return log_normalized_sigmoid(scores / self.temperature)


@dataclass(frozen=True)
class EntmaxTarget(Target):
    """Sparse attention: alpha-entmax, between softmax (alpha -> 1) and sparsemax (alpha = 2).

    ``argmax_p <p, z> + (1 - sum_i p_i^alpha) / (alpha (alpha - 1))`` over distributions p. Low
    instances get exactly zero: all those ``1 / (alpha - 1)`` or more below the highest score.

    What it pulls to: one instance. The derivative of an entmax by its score is about
    ``p^(2 - alpha)``, that of a softmax about p, which is smaller: of n equal weights, the one that
    gets ahead gains.

    Args:
        alpha: Above 1; 1.5 is the usual one.

    Raises:
        ValueError: alpha is not a finite number above 1.
        ModuleNotFoundError: The package ``entmax`` is not installed.

    Source: Peters et al. 2019 (arXiv 1905.05702), eq. 10; ASMIL (arXiv 2603.06658) compares the NSF
    with it. Computed by the authors' package ``entmax``.
    """

    alpha: float | int = 1.5

    def __post_init__(self) -> None:
        if not 1 < self.alpha < math.inf:
            raise ValueError(
                f"alpha must be a finite number above 1, but got {self.alpha}. At 1 the entmax is "
                "the softmax: use target='softmax'."
            )
        _import_entmax()

    @override
    def log_target(
        self, scores: Float[Tensor, "*bag_row instance"], *, progress: float | int
    ) -> Float[Tensor, "*bag_row instance"]:
        entmax = _import_entmax()
        if self.alpha == 2:
            attention: Tensor = entmax.sparsemax(scores)
        elif self.alpha == 1.5:
            attention = entmax.entmax15(scores)
        else:
            attention = entmax.entmax_bisect(scores, alpha=float(self.alpha))
        return attention.log()


@dataclass(frozen=True)
class UniformTarget(Target):
    """Equal attention for all real instances: the control that no anchor's scores are read for."""

    reads_scores: ClassVar[bool] = False

    @override
    def log_target(
        self, scores: Float[Tensor, "*bag_row instance"], *, progress: float | int
    ) -> Float[Tensor, "*bag_row instance"]:
        return log_softmax(scores.masked_fill(scores > -torch.inf, 0))


def _import_entmax() -> Any:
    try:
        return import_module("entmax")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The targets 'entmax' and 'sparsemax' are computed by the package 'entmax', which is "
            "not installed. Run: pip install 'mil_anchor[entmax]'"
        ) from error
