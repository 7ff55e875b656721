"""tanh of many instances in less time on the CPU, for the scorers of ABMIL and CLAM."""

import torch
from torch import Tensor, nn
from typing_extensions import override

# Entries from which three quick passes are less than a slow one (measured on an AMD EPYC, whose
# tanh takes five times as long as its sigmoid; on an Intel Xeon it takes about as long).
_FEWEST = 2**15


class Tanh(nn.Tanh):
    """``tanh x``, of many entries on the CPU as ``2 sigmoid(2x) - 1``.

    Where x is small the result is off by rounding of one, and not of itself; that of low precision
    is computed in float32.
    """

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Returns the tanh of every entry."""
        # A compiler makes its own, and would make two for a size that it does not know.
        is_plain = input.device.type != "cpu" or torch.compiler.is_compiling()
        if is_plain or input.numel() < _FEWEST:
            return super().forward(input)
        doubled = (2 * input).to(torch.promote_types(input.dtype, torch.float32))
        # In place where autograd needs nothing of what was there.
        sigmoid = doubled.sigmoid_()
        scaled = sigmoid.mul(2) if sigmoid.requires_grad else sigmoid.mul_(2)
        return scaled.sub_(1).to(input.dtype)
