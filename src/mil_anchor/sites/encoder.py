"""The site of encoder and attention together: what the anchor mirrors is the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from mil_anchor.sites.base import (
    ModuleCall,
    RecordedAttention,
    Site,
    describe,
    find_submodule,
    first_floating,
    joined,
)
from mil_anchor.sites.running import run_until

# No site has a submodule of this name.
_MODEL = "<model>"


@dataclass(frozen=True)
class EncoderSite(Site):
    """The attention of another site, whose anchor is the whole model around it.

    The copy runs on what the model itself got, the raw features: its scores come from its own
    encoder. It runs in evaluation mode, up to the attention, once for each call of the model. A
    model that drops or shuffles instances at random pairs other instances: it has no such site.

    Args:
        inner: The attention, with its paths seen from the same module as ``model``.
        model: Path of the model, which must be called as a module.

    Example:
        >>> from mil_anchor.sites.score import AttentionSite
        >>> print(EncoderSite(AttentionSite("net.attention"), "net"))
        EncoderSite(AttentionSite('net.attention'), 'net')

    Source: ASMIL's released code (arXiv 2603.06658) mirrors projection and attention; its text, the
    attention alone.
    """

    inner: Site
    model: str

    @property
    @override
    def path(self) -> str:
        return self.inner.path

    @property
    @override
    def n_class_tokens(self) -> int:
        return self.inner.n_class_tokens

    @property
    @override
    def must_be_proven(self) -> bool:
        return self.inner.must_be_proven

    @property
    def layout(self) -> str | None:
        """Axes of the scores where the inner site names them, None: they are told by shapes."""
        return getattr(self.inner, "layout", "")

    @property
    def scale(self) -> float | int | str | None:
        """What the scores are multiplied by where the inner site names it."""
        return getattr(self.inner, "scale", 1)

    @override
    def within(self, prefix: str) -> "EncoderSite":
        return replace(self, inner=self.inner.within(prefix), model=joined(prefix, self.model))

    @override
    def bound(self, root: nn.Module) -> "EncoderSite":
        return replace(self, inner=self.inner.bound(root))

    @override
    def settled(self, calls: Sequence[ModuleCall]) -> "EncoderSite":
        inner = self.inner.settled([call for call in calls if call.name != _MODEL])
        return replace(self, inner=inner)

    @override
    def find_block(self, root: nn.Module) -> nn.Module:
        return find_submodule(root, self.model)

    @override
    def watched(self, root: nn.Module) -> dict[str, nn.Module]:
        # Last: hooks of one module fire in this order, and its call ends those of the inner site.
        return self.inner.watched(root) | {_MODEL: self.find_block(root)}

    @override
    def read(self, calls: Sequence[ModuleCall], n_bags: int | None) -> list[RecordedAttention]:
        read = []
        own: list[ModuleCall] = []
        for call in calls:
            if call.name == _MODEL:
                read += self._read_one(call, own, n_bags)
                own = []
            else:
                own.append(call)
        # Calls inside the model return before its own.
        model = next((call.module for call in calls if call.name == _MODEL), None)
        inside = set() if model is None else set(model.modules())
        if own and (model is None or any(call.module in inside for call in own)):
            raise ValueError(
                f"With scope='encoder' the attention '{self.path}' must run in a call of "
                f"'{self.model}' as a module, but it ran without one. Call the model and not its "
                "forward or its parts, wrap encoder and attention in one submodule that is called "
                "and name it with EncoderSite(site, model), or use scope='block'."
            )
        return read

    @override
    def rescore(self, block: nn.Module, inputs: Any) -> Float[Tensor, "bag row instance"]:
        rerun: _Rerun = inputs.rerun
        if rerun.block is not block or inputs.position not in rerun.scores:
            rerun.block = block
            rerun.scores = dict(enumerate(self._scores_of(block, inputs)))
        return rerun.scores.pop(inputs.position)

    @override
    def instances(self, inputs: Any) -> Float[Tensor, "bag instance width"]:
        """The raw features.

        Raises:
            ValueError: They are not (bag, instance, width), or it cannot be told which are padding.
        """
        given: _ModelInputs = inputs
        features, shapes = first_floating((given.args, given.kwargs)), given.rerun.shapes
        n_bags, _, n_instances = shapes[given.position]
        if features is not None and features.ndim == 2 and len(features) == n_bags * n_instances:
            features = features.reshape(n_bags, n_instances, -1)
        if features is not None and features.ndim == 3 and features.shape[1] == n_instances:
            if len(features) == n_bags:
                return features
            if n_bags == 1 and len(features) == len(shapes):  # a model that runs bag by bag
                return features[given.position : given.position + 1]
        raise ValueError(
            f"The first input of '{self.model}' must be the features of the instances that it "
            f"scores, but it is {describe(features)} for scores (bag, row, instance) of shapes "
            f"{shapes}. Use batch_size=1 if bags are padded, or scope='block'."
        )

    def _read_one(
        self, model: ModuleCall, calls: Sequence[ModuleCall], n_bags: int | None
    ) -> list[RecordedAttention]:
        """What the inner site reads of one call of the model."""
        read = self.inner.read(calls, n_bags)
        shapes = [tuple(one.scores.shape) for one in read]
        rerun = _Rerun(len(calls), shapes, with_grad=model.versions is not None)
        args, kwargs = model.inputs()
        return [
            one._replace(inputs=_ModelInputs(args, kwargs, n_bags, position, rerun))
            for position, one in enumerate(read)
        ]

    def _scores_of(self, copy: nn.Module, inputs: "_ModelInputs") -> list[Tensor]:
        """The scores of all distributions of one call, from a copy of the model."""
        rerun = inputs.rerun
        watched = self.inner.watched(_holding(copy, self.model))
        # A model may attend without gradients first: the same calls count as in the online model.
        # Nothing here has a graph, since neither parameters nor inputs require a gradient.
        with torch.set_grad_enabled(rerun.with_grad), torch.compiler.set_stance("force_eager"):
            calls = run_until(copy, watched, inputs.args, inputs.kwargs, n_calls=rerun.n_calls)
            scores = [one.scores.detach() for one in self.inner.read(calls, inputs.n_bags)]
        shapes = [tuple(one.shape) for one in scores]
        if shapes != rerun.shapes:
            raise ValueError(
                f"'{self.model}' must attend to the same instances in evaluation mode, in which "
                f"its copy runs, as in training, but its scores (bag, row, instance) have the "
                f"shapes {shapes} there and {rerun.shapes} here. Use scope='block'."
            )
        return scores


class _Rerun:
    """What a copy gives for one call of the model: it runs once for all distributions of it.

    Args:
        n_calls: How many calls of watched submodules the online model has made.
        shapes: The shapes of the scores of each distribution.
        with_grad: Whether the online model ran with gradients.
    """

    def __init__(self, n_calls: int, shapes: list[tuple[int, ...]], *, with_grad: bool) -> None:
        self.n_calls = n_calls
        self.shapes = shapes
        self.with_grad = with_grad
        self.block: nn.Module | None = None
        # Each is taken out once, so that none is left over from a copy that has moved since.
        self.scores: dict[int, Tensor] = {}


class _ModelInputs(NamedTuple):
    """What the model got, and which of the distributions of this call is meant."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    n_bags: int | None
    position: int
    rerun: _Rerun


def with_encoder(site: Site, root: nn.Module) -> EncoderSite:
    """The same attention, with the outermost model inside the root as what the anchor mirrors.

    Args:
        site: The attention, with paths seen from the root.
        root: The LightningModule.

    Raises:
        ValueError: No submodule of the root holds the attention block and more.
    """
    if isinstance(site, EncoderSite):
        return site
    own = set(root.modules())
    parts = {part for part in site.bound(root).find_block(root).modules() if part in own}
    for path, module in root.named_modules():
        # Containers, and the wrapper of torch.compile, have no forward of their own.
        runs = type(module).forward is not nn.Module.forward
        if path and runs and module not in parts and parts <= set(module.modules()):
            return EncoderSite(site, path)
    raise ValueError(
        f"With scope='encoder' the attention block '{site.path}' must lie in a submodule of "
        f"{type(root).__name__} that holds the encoder, too, but it lies in none. Wrap encoder and "
        "attention in one submodule and name the site inside it, as in "
        "AttentionSite('net', tap='pool.scorer'), or use scope='block'."
    )


def _holding(copy: nn.Module, path: str) -> nn.Module:
    """A root in which the copy lies under the path of the model."""
    for name in reversed(path.split(".") if path else []):
        holder = nn.Module()
        holder.add_module(name, copy)
        copy = holder
    return copy
