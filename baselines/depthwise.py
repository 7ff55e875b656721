"""Depth-wise convolution whose gradient for the kernels is a convolution too, fast on the CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from baselines.backward import once_differentiable
from baselines.fused import can_fuse

# Positions at a time in the gradient for the kernels: their input then stays in the cache.
_CHUNK = 1024


def depthwise_convolution(
    inputs: Float[Tensor, "bag channel y x"],
    kernels: Float[Tensor, "channel 1 height width"],
    bias: Float[Tensor, " channel"] | None = None,
) -> Float[Tensor, "bag channel y x"]:
    """Slides one kernel of odd sides over each channel, zeros around: ``sum_j w_j x_{i+j} + b``.

    Args:
        inputs: The channels; the fastest memory layout is channels last, as tokens have it.
        kernels: The weights w.
        bias: The bias b.
    """
    if can_fuse(inputs):
        convolved: Tensor = _DepthwiseConvolution.apply(inputs, kernels)  # type: ignore[no-untyped-call]
        return convolved if bias is None else convolved + bias[:, None, None]
    return F.conv2d(inputs, kernels, bias, padding=_halves(kernels), groups=len(kernels))


def _halves(kernels: Tensor) -> tuple[int, int]:
    return kernels.shape[2] // 2, kernels.shape[3] // 2


class _DepthwiseConvolution(torch.autograd.Function):
    """PyTorch's own backward pass takes most of its time, many forward passes, for the kernels."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, kernels)
        return F.conv2d(inputs, kernels, padding=_halves(kernels), groups=len(kernels))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        inputs, kernels = ctx.saved_tensors
        halves, mirrored = _halves(kernels), kernels.flip(2, 3)
        grad_inputs = F.conv2d(grad, mirrored, padding=halves, groups=len(kernels))
        return grad_inputs, _kernel_gradient(inputs, grad, halves)


def _kernel_gradient(inputs: Tensor, grad: Tensor, halves: tuple[int, int]) -> Tensor:
    """Slides the gradient of the results, as the kernel, over the inputs: ``sum_i g_i x_{i+j}``."""
    n_bags, n_channels = grad.shape[:2]
    n_rows = -(-_CHUNK // grad.shape[3])
    surrounded = F.pad(inputs, (0, 0, halves[0], halves[0]))
    total = grad.new_zeros(n_bags * n_channels, 1, 2 * halves[0] + 1, 2 * halves[1] + 1)
    for start in range(0, grad.shape[2], n_rows):
        rows = grad[:, :, start : start + n_rows]
        seen = surrounded[:, :, start : start + rows.shape[2] + 2 * halves[0]]
        # Bags become channels: a group is one channel of one bag.
        kernels = rows.flatten(0, 1)[:, None]
        part = F.conv2d(
            seen.flatten(0, 1)[None], kernels, padding=(0, halves[1]), groups=len(kernels)
        )
        total += part.transpose(0, 1)
    return total.view(n_bags, n_channels, *total.shape[1:]).sum(dim=0)
