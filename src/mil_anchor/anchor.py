"""The anchor: an exponential moving average (EMA) of an attention block."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mil_anchor.sites.base import map_tensors, tensors_in

Result = TypeVar("Result")

# Hooks that belong to the computation itself: without them the block loses its weight.
_STRUCTURAL_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Anchor:
    """EMA mirror of an attention block: ``theta' <- m theta' + (1 - m) theta``.

    The mirror starts as an exact copy without the block's hooks, stays in eval mode (it consumes no
    random numbers), takes no gradient, and holds its floating tensors in float32 at least: an
    average of bfloat16 numbers at m = 0.999 would never move.

    Args:
        online: The attention block to mirror. Lazy parameters must be materialised.
        decay: The EMA factor m, in [0, 1).

    Raises:
        ValueError: The decay lies outside [0, 1), or the block holds uninitialised parameters.

    Source: ASMIL (arXiv 2603.06658), eq. 4.
    """

    def __init__(self, online: nn.Module, *, decay: float = 0.999) -> None:
        check_decay(decay)
        if has_lazy_parameters(online):
            raise ValueError(
                "The anchor copies a block whose parameters exist, but this block still has lazy "
                "ones. Run one forward pass first."
            )
        self.decay = decay
        self.online = online
        self.block = _bare_copy(online).requires_grad_(requires_grad=False).eval()
        for tensor in _tensors(self.block):
            tensor.data = tensor.data.to(_anchor_dtype(tensor))

    @torch.no_grad()
    def apply(self, function: Callable[[nn.Module, Any], Result], inputs: Any) -> Result:
        """``function(mirror, inputs)`` with the inputs detached and in the mirror's precision."""
        tensors = list(_tensors(self.block))
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
        device = next((t.device for t in tensors), torch.device("cpu"))

        def cast(value: Tensor) -> Tensor:
            value = value.detach()
            return value if dtype is None or not value.is_floating_point() else value.to(dtype)

        # Some blocks draw random numbers in eval mode, too: the model must not miss them.
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.autocast(device.type, enabled=False), forked:
            return function(self.block, map_tensors(cast, inputs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the mirror on the online block's inputs, in the mirror's own precision."""
        return self.apply(lambda block, inputs: block(*inputs[0], **inputs[1]), (args, kwargs))

    @torch.no_grad()
    def update(self, parameters: Collection[Tensor] | None = None) -> None:
        """Move the mirror one step towards the online block, and copy its buffers.

        Args:
            parameters: Only these parameters of the online block move (those that one of several
                optimizers has just changed); None moves all of them.
        """
        chosen = None if parameters is None else {id(parameter) for parameter in parameters}
        pairs = [
            (mirrored, online)
            for mirrored, online in zip(
                self.block.parameters(), self.online.parameters(), strict=True
            )
            if chosen is None or id(online) in chosen
        ]
        floating = [(m, o.to(m.dtype)) for m, o in pairs if m.is_floating_point()]
        if floating:
            mirrors, targets = map(list, zip(*floating, strict=True))
            torch._foreach_lerp_(mirrors, targets, 1 - self.decay)
        for mirrored, online in pairs:
            if not mirrored.is_floating_point():
                mirrored.copy_(online)
        for copied, buffer in zip(self.block.buffers(), self.online.buffers(), strict=True):
            copied.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of the mirror by name, as plain tensors on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in _named(self.block)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved mirror.

        Raises:
            ValueError: The saved names or shapes are not those of the block.
        """
        own = dict(_named(self.block))
        wrong = sorted(own.keys() ^ state.keys()) or sorted(
            name for name, tensor in own.items() if tensor.shape != state[name].shape
        )
        if wrong:
            raise ValueError(
                "A saved anchor must come from the same attention block, but these entries are "
                f"missing, unknown or of another shape: {wrong}."
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])


def check_decay(decay: float) -> None:
    """Raise a ValueError unless the EMA factor lies in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(
            f"decay must lie in [0, 1), but got {decay}. 0.999 is the paper's; at 1 the anchor "
            "would never move."
        )


def has_lazy_parameters(block: nn.Module) -> bool:
    """Whether the block waits for its first input to know its shapes."""
    tensors = (*block.parameters(), *block.buffers())
    return any(nn.parameter.is_lazy(tensor) for tensor in tensors)


def _bare_copy(block: nn.Module) -> nn.Module:
    """Deep copy that leaves hooks behind and takes non-leaf tensors by value."""
    # deepcopy looks an object up in the memo before it copies it. So hooks are replaced there
    # (a copied hook would fire, and a bound method would drag its owner along), and so are
    # tensors with a graph, which deepcopy refuses: weight_norm, prune and models that store
    # their last attention map keep such tensors as attributes.
    memo: dict[int, Any] = {}
    for module in block.modules():
        for table in _HOOK_TABLES:
            hooks: OrderedDict[int, Callable[..., Any]] = vars(module)[table]
            kept = ((key, hook) for key, hook in hooks.items() if _is_structural(hook))
            memo[id(hooks)] = OrderedDict(kept)
        for tensor in tensors_in(vars(module)):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    # mypy cannot see that a copy of a module is a module.
    duplicate: nn.Module = copy.deepcopy(block, memo)
    return duplicate


def _is_structural(hook: object) -> bool:
    return isinstance(hook, _STRUCTURAL_HOOKS)


def _anchor_dtype(tensor: Tensor) -> torch.dtype:
    return (
        torch.promote_types(tensor.dtype, torch.float32)
        if tensor.is_floating_point()
        else tensor.dtype
    )


def _named(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _tensors(block: nn.Module) -> Iterator[Tensor]:
    return (tensor for _, tensor in _named(block))
