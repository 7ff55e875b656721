"""What the online attention is pulled to: distributions made of the anchor's scores."""

from mil_anchor.targets.adaptive import AdaptiveSigmoidTarget
from mil_anchor.targets.base import Target
from mil_anchor.targets.centered import CenteredSigmoidTarget
from mil_anchor.targets.names import TARGETS, as_target
from mil_anchor.targets.published import (
    EntmaxTarget,
    SigmoidTarget,
    SoftmaxTarget,
    UniformTarget,
)

__all__ = [
    "TARGETS",
    "AdaptiveSigmoidTarget",
    "CenteredSigmoidTarget",
    "EntmaxTarget",
    "SigmoidTarget",
    "SoftmaxTarget",
    "Target",
    "UniformTarget",
    "as_target",
]
