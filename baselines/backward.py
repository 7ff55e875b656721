"""What backward passes that are written by hand need."""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a backward pass refuse ``create_graph=True``.

    torch's decorator of this name fails only where a later derivative runs through the pass. Where
    ``torch.autograd.grad`` or ``functional.hessian`` take it for a dead end they go around it, and
    a second derivative, or the penalty on a gradient beside a loss, is silently zero.

    Raises:
        RuntimeError: In that backward pass, if it is asked for a graph of its own.
    """

    @wraps(backward)
    def refusing(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A fused pass must be differentiated once only, but create_graph=True asks for "
                "more. Take higher derivatives by torch.func, for which the plain layers run."
            )
        return backward(ctx, *gradients)

    return refusing


def taken_over(gradient: Tensor) -> Tensor:
    """The gradient, to be overwritten: itself if nobody else can see it, else a copy."""
    is_whole = not gradient._is_view() and gradient.is_contiguous()
    if is_whole and _holders(gradient) == _holders_of_own():
        return gradient
    return gradient.clone(memory_format=torch.contiguous_format)


class _Watched(torch.autograd.Function):
    """Tells who holds a gradient that comes to it as those get theirs that call `taken_over`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, found: list[tuple[int, ...]]) -> Tensor:
        ctx.found = found
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(_received(gradient))
        return gradient, None


def _holders(gradient: Tensor) -> tuple[int, ...]:
    """Counts who holds the tensor in torch and in Python (a hook may keep it), and its memory."""
    n_owners = getattr(gradient, "_use_count", int)()
    memory = gradient.untyped_storage()._cdata
    return n_owners, sys.getrefcount(gradient), torch._C._storage_Use_Count(memory)


@cache
def _holders_of_own() -> tuple[int, ...]:
    """What `taken_over` counts for a gradient that nobody else holds; each Python has its own."""
    if not hasattr(Tensor, "_use_count"):
        return ()  # Older releases of torch do not tell.
    found: list[tuple[int, ...]] = []
    with torch.inference_mode(mode=False), torch.enable_grad():
        values = torch.zeros(1, device="cpu", requires_grad=True)
        watched = _Watched.apply(values, found)  # type: ignore[no-untyped-call]
        torch.autograd.grad(watched.square().sum(), values)
    return found[0]


def _received(gradient: Tensor) -> tuple[int, ...]:
    # Called like `taken_over`, which is one holder more.
    return _holders(gradient)
