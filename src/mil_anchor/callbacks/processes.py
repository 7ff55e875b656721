"""What the processes of a distributed run tell each other, and what they must hold."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torchmetrics import MeanMetric

_log = logging.getLogger(__name__)

# By name, since the package pytorch_lightning has classes of its own.
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


@rank_zero_only
def tell(message: str) -> None:
    """Log a line once, not in every process."""
    _log.info(message)


def refuse_sharding(trainer: Trainer, who: str) -> None:
    """Raise a MisconfigurationException where no process holds whole parameters."""
    if {cls.__name__ for cls in type(trainer.strategy).__mro__} & _SHARDED:
        raise MisconfigurationException(
            f"{who} needs whole parameters on every device, but {type(trainer.strategy).__name__} "
            "shards them. Use strategy='ddp'."
        )


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in the order of ranks; one value without a distributed run.

    A collective call: every process must make it.
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def share(tensors: Iterable[Tensor]) -> None:
    """Give all processes rank 0's: after a step parameters are equal, buffers are not."""
    if is_distributed():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def weighted_mean(values: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    """Mean of scalars over all processes, each with its weight; on the values' device.

    A collective call. Unlike `self.log(..., sync_dist=True)` it is right when processes hold
    unequal numbers of bags, and a training step pays nothing for it.
    """
    stacked = torch.stack(list(values))
    mean = MeanMetric().to(stacked.device)
    mean.update(stacked, torch.tensor(weights, device=stacked.device))
    result: Tensor = mean.compute()
    return result
