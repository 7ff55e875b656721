"""The anchor: an exponential moving average (EMA) of an attention block."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mil_anchor.precision import PRECISIONS, running_in
from mil_anchor.schedules import warmed_up
from mil_anchor.sites.base import map_tensors, tensors_in

Result = TypeVar("Result")

STARTS = ("copy", "random")

_Pairs: TypeAlias = list[tuple[Tensor, Tensor]]

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

    The mirror is a copy without the block's hooks, stays in eval mode (it consumes no random
    numbers), takes no gradient, and holds its floating tensors in float32 at least: an average of
    bfloat16 numbers at m = 0.999 would never move.

    Args:
        online: The attention block to mirror. Lazy parameters must be materialised.
        decay: The EMA factor m, in [0, 1).
        warmup: Update number t, from 0, has the factor ``min(m, (1 + t) / (10 + t))``, so that the
            mirror follows early, fast-changing weights.
        start: ``"copy"``: the block's weights; ``"random"``: a fresh initialisation by the
            ``reset_parameters`` of its submodules. That depends on the global random state, and
            leaves it as it was.
        precision: What the mirror runs in: ``"float32"``, that of its tensors, or ``"bf16"``,
            bfloat16 by autocast. Its tensors are the same with either.

    Attributes:
        n_updates: How many updates have been made; those by several optimizers all count.

    Raises:
        ValueError: The decay lies outside [0, 1), the block holds uninitialised parameters, the
            start or the precision is unknown, a submodule cannot be initialised again, or the
            precision is bf16 and the block float64.

    Source: ASMIL (arXiv 2603.06658), eq. 4. The random start is that of the authors' code, whose
    anchor is a second initialisation; the paper has neither it nor the warm-up.
    """

    def __init__(
        self,
        online: nn.Module,
        *,
        decay: float = 0.999,
        warmup: bool = False,
        start: str = "copy",
        precision: str = "float32",
    ) -> None:
        check_decay(decay)
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, but got '{precision}'."
            )
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, but got '{start}'.")
        if has_lazy_parameters(online):
            raise ValueError(
                "The anchor copies a block whose parameters exist, but this block still has lazy "
                "ones. Run one forward pass first."
            )
        self.decay = decay
        self.warmup = warmup
        self.precision = precision
        self.n_updates = 0
        self.online = online
        self.block = _bare_copy(online).requires_grad_(requires_grad=False).eval()
        for tensor in _tensors(self.block):
            tensor.data = tensor.data.to(_anchor_dtype(tensor))
        if start == "random":
            _initialize(self.block)
        if precision == "bf16" and _place_of(self.block)[1] == torch.float64:
            raise ValueError(
                "precision='bf16' must have an attention block of float32 or less, since autocast "
                "leaves float64 alone, but this one is float64. Use 'float32'."
            )
        self._modules = list(zip(self.block.modules(), online.modules(), strict=True))
        self._chosen: set[int] | None = None
        self._pairs: tuple[_Pairs, _Pairs] = ([], [])

    @torch.no_grad()
    def apply(self, function: Callable[[nn.Module, Any], Result], inputs: Any) -> Result:
        """``function(mirror, inputs)`` with the inputs detached and in the mirror's precision."""
        device, dtype = _place_of(self.block)
        is_bf16 = self.precision == "bf16"
        largest = max((x.numel() for x in tensors_in(inputs)), default=0) if is_bf16 else 0

        def cast(value: Tensor) -> Tensor:
            value = value.detach()
            if not value.is_floating_point():
                return value
            # The features: once here, and not for each layer that reads them. What stands beside
            # them may be coordinates, of which bfloat16 leaves nothing.
            if is_bf16 and value.numel() == largest:
                return value.to(torch.bfloat16)
            return value if dtype is None else value.to(dtype)

        # Some blocks draw random numbers in eval mode, too: the model must not miss them.
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with running_in(self.precision, device.type), forked:
            return function(self.block, map_tensors(cast, inputs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the mirror on the online block's inputs, in the mirror's precision."""
        return self.apply(lambda block, inputs: block(*inputs[0], **inputs[1]), (args, kwargs))

    @torch.no_grad()
    def update(self, parameters: Collection[Tensor] | None = None) -> None:
        """Move the mirror one step towards the online block, and copy its buffers.

        Args:
            parameters: Only these parameters of the online block move (those that one of several
                optimizers has just changed); None moves all of them.
        """
        decay = warmed_up(self.decay, self.n_updates) if self.warmup else self.decay
        self.n_updates += 1
        floating, others = self._pairs_of(parameters)
        if floating:
            mirrors = [mirrored for mirrored, _ in floating]
            targets = [online.to(mirrored.dtype) for mirrored, online in floating]
            torch._foreach_lerp_(mirrors, targets, 1 - decay)
        for mirrored, online in others:
            mirrored.copy_(online)
        # Not their tensors, which a forward pass may replace.
        for copy_of, module in self._modules:
            buffers = zip(copy_of._buffers.values(), module._buffers.values(), strict=True)
            for copied, buffer in buffers:
                if copied is not None and buffer is not None:
                    copied.copy_(buffer)

    def _pairs_of(self, parameters: Collection[Tensor] | None) -> tuple[_Pairs, _Pairs]:
        """Mirrored and online parameters, floating ones and others; kept for the next step."""
        chosen = None if parameters is None else {id(parameter) for parameter in parameters}
        # What is kept holds these parameters, so that no other tensor can have their ids.
        if chosen is None or chosen != self._chosen:
            pairs = [
                (mirrored, online)
                for mirrored, online in zip(
                    self.block.parameters(), self.online.parameters(), strict=True
                )
                if chosen is None or id(online) in chosen
            ]
            self._chosen = chosen
            self._pairs = (
                [pair for pair in pairs if pair[0].is_floating_point()],
                [pair for pair in pairs if not pair[0].is_floating_point()],
            )
        return self._pairs

    @torch.no_grad()
    def distance(self) -> Float[Tensor, ""]:
        """Relative Euclidean distance of the parameters, ``‖theta' - theta‖ / ‖theta‖``."""
        apart = size = torch.zeros(())
        for mirrored, parameter in zip(
            self.block.parameters(), self.online.parameters(), strict=True
        ):
            online = parameter.to(mirrored.dtype)
            apart = apart + (mirrored - online).square().sum()
            size = size + online.square().sum()
        return (apart / size).sqrt()

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
            f"decay must lie in [0, 1), but got {decay}. 0.999 is the paper's; at 1 the "
            "average would never move."
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


def _initialize(block: nn.Module) -> None:
    """Draw the block's parameters anew, without a trace in the global random state."""
    owners = {
        name: module
        for name, module in block.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    resets = {name: _reset_of(module) for name, module in owners.items()}
    without = [
        f"{type(module).__name__} '{name}'".removesuffix(" ''")
        for name, module in owners.items()
        if resets[name] is None
    ]
    if without:
        raise ValueError(
            "A random anchor needs a reset_parameters method in every part of the attention block "
            f"that owns parameters, but there is none in {', '.join(without)}. Write one, or use "
            "start='copy'."
        )
    # What a method leaves alone (the factors of an old weight_norm) would stay the block's.
    for parameter in block.parameters():
        if parameter.is_floating_point():
            nn.init.constant_(parameter, torch.nan)
    device = next((tensor.device for tensor in _tensors(block)), torch.device("cpu"))
    block.to("cpu")  # the same numbers on every device, and no generator but this one is touched
    with torch.random.fork_rng([]):
        # A stream of its own: a model made right after the same seed has drawn this one.
        torch.default_generator.manual_seed(int(torch.randint(2**62, ())))
        for name in reversed(resets):  # as constructors do: parts before what holds them
            resets[name]()
    block.to(device)
    left = [name for name, parameter in block.named_parameters() if bool(parameter.isnan().any())]
    if left:
        raise ValueError(
            "The reset_parameters methods of a random anchor must set all its parameters, but they "
            f"left {left} alone. Use start='copy'."
        )


def _reset_of(module: nn.Module) -> Any:
    """What draws a module's own parameters; torch's attention has it under a private name."""
    return getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))


def _is_structural(hook: object) -> bool:
    return isinstance(hook, _STRUCTURAL_HOOKS)


def _anchor_dtype(tensor: Tensor) -> torch.dtype:
    return (
        torch.promote_types(tensor.dtype, torch.float32)
        if tensor.is_floating_point()
        else tensor.dtype
    )


def _place_of(block: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where a block's tensors are, and the type of its floating ones, if it has any."""
    device = next((tensor.device for tensor in _tensors(block)), torch.device("cpu"))
    dtype = next((t.dtype for t in _tensors(block) if t.is_floating_point()), None)
    return device, dtype


def _named(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _tensors(block: nn.Module) -> Iterator[Tensor]:
    return (tensor for _, tensor in _named(block))
