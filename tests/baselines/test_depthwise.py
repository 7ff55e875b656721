"""The depth-wise convolution against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from baselines.depthwise import depthwise_convolution


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((1, 3, 1, 1), (7, 7)),
        ((1, 3, 5, 6), (7, 7)),
        ((2, 3, 50, 47), (7, 5)),  # more than one chunk, and two bags
        ((1, 4, 2100, 1), (33, 1)),
    ],
)
def test_depthwise_convolution__any_size__agrees_with_pytorchs_own(shape, kernel, channels_last):
    torch.manual_seed(0)
    inputs = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        inputs = inputs.to(memory_format=torch.channels_last)
    kernels, bias = torch.randn(shape[1], 1, *kernel).double(), torch.randn(shape[1]).double()
    sources = [inputs.requires_grad_(), kernels.requires_grad_(), bias.requires_grad_()]
    padding = (kernel[0] // 2, kernel[1] // 2)

    actual = depthwise_convolution(inputs, kernels, bias)

    expected = F.conv2d(inputs, kernels, bias, padding=padding, groups=shape[1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(actual)
    for gradient, plain in zip(
        torch.autograd.grad((actual * weights).sum(), sources),
        torch.autograd.grad((expected * weights).sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-10 * plain.abs().max().item())


def test_depthwise_convolution__differentiated_twice__says_that_it_cannot():
    inputs = torch.ones(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    convolved = depthwise_convolution(inputs, torch.ones(2, 1, 3, 3, dtype=torch.float64))

    with pytest.raises(RuntimeError, match=r"differentiated once only, but create_graph=True"):
        torch.autograd.grad(convolved.square().sum(), inputs, create_graph=True)
