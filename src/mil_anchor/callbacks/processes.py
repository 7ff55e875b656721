"""What the processes of a distributed run tell each other."""

from typing import Any

import torch.distributed


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in the order of ranks; one value without a distributed run.

    A collective call: every process must make it.
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
