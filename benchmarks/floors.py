"""What a step cannot do without, alone: the floor of its time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from benchmarks.timing import Step
from mil_anchor import AnchorCallback
from mil_anchor.sites.base import RecordedAttention, map_tensors


class Products(NamedTuple):
    """The products of a model's step, as (rows, inner, columns) with 0 for the bag's instances.

    Args:
        step: Those of forward and backward pass; the features themselves need no gradient.
        anchor: Those of the anchor's forward pass.
    """

    step: tuple[tuple[int, int, int], ...]
    anchor: tuple[tuple[int, int, int], ...]


def _pooling(width: int, hidden: int, attention_width: int) -> Products:
    """Of ABMIL and CLAM: projection, V and U in one, their gradients, and that of h by them."""
    scorer = (0, hidden, 2 * attention_width)
    gradients = (
        (2 * attention_width, 0, hidden),
        (0, 2 * attention_width, hidden),
        (hidden, 0, width),
    )
    return Products(((0, width, hidden), scorer, *gradients), (scorer,))


def _critical(width: int, attention_width: int, n_classes: int) -> Products:
    """Of DSMIL: query network, instance classifier and pooling, and their gradients."""
    query = ((0, width, attention_width), (0, attention_width, attention_width))
    gradients = (
        (attention_width, 0, attention_width),
        (0, attention_width, attention_width),
        (attention_width, 0, width),
    )
    of_classes = (
        (0, width, n_classes),  # instance classifier
        (n_classes, 0, width),  # its gradient
        (n_classes, 0, width),  # pooling
        (n_classes, width, 0),  # the gradient of the attention
    )
    return Products((*query, *gradients, *of_classes), query)


PRODUCTS = {
    "ABMIL 1024-512-128": _pooling(1024, 512, 128),
    "ABMIL 384-128-128": _pooling(384, 128, 128),
    "CLAM-SB 1024": _pooling(1024, 512, 256),
    "DSMIL 1024": _critical(1024, 128, 2),
}


def floor_of(name: str, n_instances: int, *, device: str = "cpu") -> Step:
    """What runs the products of a step with the plug-in, and nothing else, in float32.

    Args:
        name: The model, a key of `PRODUCTS`.
        n_instances: Number of instances of the bag.
        device: Where they run.
    """
    products = PRODUCTS[name]
    runs = [
        _product(*(size or n_instances for size in shape), device=device)
        for shape in (*products.step, *products.anchor)
    ]

    def run() -> None:
        for product in runs:
            product()

    return run


class RepeatableAnchor(AnchorCallback):
    """The plug-in; its anchor's forward pass in the last step can be run again, alone."""

    _inputs: Any = None

    @override
    def penalty(self, attention: RecordedAttention) -> Tensor:
        self._inputs = map_tensors(Tensor.detach, attention.inputs)
        return super().penalty(attention)

    def run_anchor(self) -> None:
        """Run the anchor on what its block got last."""
        self.anchor.apply(self.online.site.rescore, self._inputs)


def _product(rows: int, inner: int, columns: int, *, device: str) -> Callable[[], object]:
    left = torch.randn(rows, inner, device=device)
    right = torch.randn(inner, columns, device=device)
    out = torch.empty(rows, columns, device=device)
    return lambda: torch.mm(left, right, out=out)
