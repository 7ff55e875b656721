"""Runs a copy of a block up to its scores."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from mil_anchor.sites.base import ModuleCall, map_tensors, tensors_in


def run_until(
    block: nn.Module, watched: Mapping[str, nn.Module], args: Any, kwargs: Any, *, n_calls: int
) -> list[ModuleCall]:
    """Run a block until watched submodules have been called so many times, and give these calls.

    What comes after the scores (pooling, or samples drawn around them) costs time and may draw
    random numbers. If the block runs with gradients, calls under no_grad do not count.
    """
    calls: list[ModuleCall] = []
    with_grad = torch.is_grad_enabled()

    def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if with_grad and not torch.is_grad_enabled():
            return
        # Models mask their scores in place afterwards: a copy of what is no larger than its input.
        size = max((x.numel() for x in tensors_in((args, kwargs))), default=0)
        kept = map_tensors(lambda x: x.clone() if x.numel() <= size else x, output)
        calls.append(ModuleCall(name, module, args, kwargs, kept))
        if len(calls) == n_calls:
            raise _HasRunError

    handles = [
        module.register_forward_hook(partial(keep, name), with_kwargs=True)
        for name, module in watched.items()
    ]
    try:
        with suppress(_HasRunError):
            block(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _HasRunError(Exception):
    """All taps have run: what a block does with its scores is not wanted."""
