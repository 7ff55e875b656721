"""Sites whose scores are made of sibling submodules: gated scorers that no module owns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from mil_anchor.sites.base import (
    ModuleCall,
    RecordedAttention,
    Site,
    find_submodule,
    first_floating,
    joined,
)
from mil_anchor.sites.layout import (
    arrange,
    batched_features,
    check_layout,
    fitting_layouts,
    tell_layout,
)

ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "gelu": F.gelu,
}


def activated(values: Tensor, name: str | None) -> Tensor:
    """The values behind one of `ACTIVATIONS`, or as they are."""
    return values if name is None else ACTIVATIONS[name](values)


@dataclass(frozen=True)
class GatedSite(Site):
    """A gated scorer ``w(V(h) * U(h))`` whose parts are siblings: no module owns the product.

    Args:
        value: Path of V, which takes the instance features.
        gate: Path of U; None: there is no gate, and the scores are ``w(V(h))``.
        score: Path of w, which puts out the raw scores.
        layout: Axes of w's output, as in `AttentionSite`.
        value_activation: What the model's own forward applies to V's output, "tanh", "sigmoid",
            "relu" or "gelu"; None: nothing, as where V holds its activation.
        gate_activation: The same for U.

    Raises:
        ValueError: The layout names an unknown axis, an axis twice, or no instance axis; or an
            activation is unknown.

    Source: Ilse, Tomczak, Welling, *Attention-based Deep Multiple Instance Learning*, ICML 2018,
    eq. 8 and 9, in the form of the authors' code.
    """

    value: str
    gate: str | None
    score: str
    layout: str | None = None
    value_activation: str | None = None
    gate_activation: str | None = None

    def __post_init__(self) -> None:
        if self.layout is not None:
            check_layout(self.layout)
        for name in (self.value_activation, self.gate_activation):
            if name is not None and name not in ACTIVATIONS:
                raise ValueError(
                    f"An activation must be one of {', '.join(ACTIVATIONS)} or None, but got "
                    f"{name!r}. Write a Site of your own for others."
                )

    @property
    @override
    def path(self) -> str:
        return "+".join(part for part in (self.value, self.gate, self.score) if part is not None)

    @override
    def within(self, prefix: str) -> "GatedSite":
        gate = None if self.gate is None else joined(prefix, self.gate)
        value, score = joined(prefix, self.value), joined(prefix, self.score)
        return replace(self, value=value, gate=gate, score=score)

    @override
    def find_block(self, root: nn.Module) -> nn.Module:
        return _Gated(
            find_submodule(root, self.value),
            None if self.gate is None else find_submodule(root, self.gate),
            find_submodule(root, self.score),
            (self.value_activation, self.gate_activation),
        )

    @override
    def watched(self, root: nn.Module) -> dict[str, nn.Module]:
        return {name: find_submodule(root, getattr(self, name)) for name in ("value", "score")}

    @override
    def settled(self, calls: Sequence[ModuleCall]) -> "GatedSite":
        if self.layout is not None:
            return self
        for value, score in self._pairs(calls):
            fitting = fitting_layouts(score.output, value.features)
            if len(fitting) == 1:
                return replace(self, layout=fitting[0])
        return self

    @override
    def read(self, calls: Sequence[ModuleCall], n_bags: int | None) -> list[RecordedAttention]:
        read = []
        for value, score in self._pairs(calls):
            scores = self._scores(score.output, value.features, n_bags)
            shape = (len(scores), scores.shape[-1])
            read.append(RecordedAttention(scores, None, (value.inputs(), n_bags, shape)))
        return read

    @override
    def rescore(self, block: nn.Module, inputs: Any) -> Float[Tensor, "bag row instance"]:
        (args, kwargs), n_bags, _ = inputs
        return self._scores(block(*args, **kwargs), first_floating((args, kwargs)), n_bags)

    @override
    def instances(self, inputs: Any) -> Float[Tensor, "bag instance width"]:
        given, _, shape = inputs
        return batched_features(first_floating(given), shape, self.value)

    def _pairs(self, calls: Sequence[ModuleCall]) -> list[tuple[ModuleCall, ModuleCall]]:
        values = [call for call in calls if call.name == "value"]
        scores = [call for call in calls if call.name == "score"]
        if len(values) != len(scores):
            raise ValueError(
                f"'{self.value}' and '{self.score}' must run equally often, but they ran "
                f"{len(values)} and {len(scores)} times. Name the parts of one gated scorer."
            )
        return list(zip(values, scores, strict=True))

    def _scores(self, output: Tensor, features: Tensor | None, n_bags: int | None) -> Tensor:
        layout = self.layout or tell_layout(output, features, self.path)
        return arrange(output, layout, self.path, n_bags)


class _Gated(nn.Module):
    """The product that the model computes in its own forward."""

    def __init__(
        self,
        value: nn.Module,
        gate: nn.Module | None,
        score: nn.Module,
        activations: tuple[str | None, str | None],
    ) -> None:
        super().__init__()
        self.value, self.gate, self.score = value, gate, score
        self.activations = activations

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = activated(self.value(*args, **kwargs), self.activations[0])
        if self.gate is not None:
            hidden = hidden * activated(self.gate(*args, **kwargs), self.activations[1])
        return self.score(hidden)
