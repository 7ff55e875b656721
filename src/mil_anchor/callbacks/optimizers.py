"""What our callbacks that follow the training weights ask of an optimizer."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters that an optimizer owns."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_moved(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether the step that an optimizer has just been called for was one, for these parameters."""
    # A fused optimizer is called in a step that it then skips, for the AMP scaler.
    if bool(getattr(optimizer, "found_inf", False)):
        return False
    # A training step that returns None still calls optimizer.step, without gradients.
    return any(parameter.grad is not None for parameter in parameters)
