"""What a site is: the protocol between a model's attention and everything that uses it."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class ModuleCall:
    """One call of a watched submodule, while its model ran.

    Args:
        name: The name that `Site.watched` gave the submodule.
        module: The submodule.
        args: Its positional inputs, with their graph.
        kwargs: Its keyword inputs.
        returned: What it returned, with its graph; read it as `output`. Narrow tensors are copies.
        versions: Version counters of the inputs and of ``returned`` at that time; None when no
            gradient was recorded, since then nothing is computed from them again.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any
    versions: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def features(self) -> Tensor | None:
        """The first floating tensor among the inputs."""
        return first_floating((self.args, self.kwargs))

    @property
    def output(self) -> Any:
        """What the submodule returned.

        Raises:
            RuntimeError: The model has changed it in place since.
        """
        if self.versions is not None and versions_of(self.returned) != self.versions[1]:
            raise RuntimeError(self._changed("outputs"))
        return self.returned

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as ``(args, kwargs)``, detached, to be given to a copy of the submodule.

        Raises:
            RuntimeError: The model has changed them in place since.
        """
        if self.versions is not None and versions_of((self.args, self.kwargs)) != self.versions[0]:
            raise RuntimeError(self._changed("inputs"))
        args, kwargs = map_tensors(Tensor.detach, (self.args, self.kwargs))
        return args, kwargs

    def _changed(self, what: str) -> str:
        return (
            f"The {what} of the attention block's {type(self.module).__name__} must stay as they "
            "were when it ran, but the model has changed them in place. Replace the in-place "
            f"operation after it, or name a block whose {what} are left alone."
        )


class RecordedAttention(NamedTuple):
    """One attention distribution of each bag, as the model computed it.

    Args:
        scores: Raw scores, with their graph where there is one; -inf where the model masks.
        mask: True marks a real instance; None: all are real.
        inputs: What the site needs to compute the scores again with a copy of the block.
    """

    scores: Float[Tensor, "bag row instance"]
    mask: Bool[Tensor, "bag instance"] | None
    inputs: Any

    def by_bag(self, values: Float[Tensor, "bag row instance"]) -> list[Float[Tensor, "row _"]]:
        """Values that belong to the scores, bag by bag, real instances only."""
        if self.mask is None:
            return list(values)
        masks = self.mask.to(values.device)
        return [of_bag[:, real] for of_bag, real in zip(values, masks, strict=True)]


class Site(ABC):
    """Where a model keeps its attention; a kind of your own is a subclass with these six methods.

    Paths are seen from the module that the site is used on, with dots; an integer indexes a
    container, also from its end. A site holds no module: it is made before the model is, and one
    site serves many models.
    """

    @property
    @abstractmethod
    def path(self) -> str:
        """The block's name in messages and log keys."""

    @abstractmethod
    def within(self, prefix: str) -> "Site":
        """The same site seen from a module that holds the model under this path."""

    @abstractmethod
    def find_block(self, root: nn.Module) -> nn.Module:
        """What the anchor mirrors: the module with all parameters of the scorer.

        Raises:
            ValueError: The root has no such submodule.
        """

    @abstractmethod
    def watched(self, root: nn.Module) -> dict[str, nn.Module]:
        """The submodules whose calls tell the scores, by names of the site's own."""

    @abstractmethod
    def read(self, calls: Sequence[ModuleCall], n_bags: int | None) -> list[RecordedAttention]:
        """Raw scores of one training step, one item for each distribution.

        Args:
            calls: The calls of the watched submodules, in the order in which they returned.
            n_bags: Number of bags in the batch, where the batch tells it.

        Raises:
            ValueError: The calls do not give scores of the promised form.
        """

    @abstractmethod
    def rescore(self, block: nn.Module, inputs: Any) -> Float[Tensor, "bag row instance"]:
        """The raw scores that a copy of the block gives on the inputs of a recorded attention."""

    def reads_output(self, name: str) -> bool:  # noqa: ARG002 most sites read all of them
        """Whether `read` uses what the watched submodule of this name has returned.

        Where it does not, the recorder keeps no copy.
        """
        return True

    def instances(self, inputs: Any) -> Float[Tensor, "bag instance width"]:  # noqa: ARG002
        """The features of the instances, as the block got them, of a recorded attention.

        Args:
            inputs: Those of the recorded attention.

        Raises:
            ValueError: The site does not tell them.
        """
        raise ValueError(
            f"The features that the attention of '{self.path}' weighs must be known, but a "
            f"{type(self).__name__} does not tell them. Name the block that gets them as its first "
            "input with AttentionSite(block, tap=...), or override Site.instances."
        )

    @property
    def n_class_tokens(self) -> int:
        """Keys in front of the instances that the model's softmax covers and the scores do not."""
        return 0

    @property
    def must_be_proven(self) -> bool:
        """Whether the model runs a softmax over the instances that the scores must agree with."""
        return True

    def bound(self, root: nn.Module) -> "Site":  # noqa: ARG002 most sites need nothing of the root
        """The same site with what it takes from the model's attributes filled in.

        Raises:
            ValueError: The model has no such attribute.
        """
        return self

    def settled(self, calls: Sequence[ModuleCall]) -> "Site":  # noqa: ARG002
        """The same site with what it has learned from these calls, since later ones may not tell.

        A layout that was left open is settled by the first call whose shapes tell it.
        """
        return self

    def exists_in(self, root: nn.Module) -> bool:
        """Whether the root has the submodules and attributes that the site names."""
        try:
            self.bound(root).watched(root)
            self.find_block(root)
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        """Source text of the site, to paste."""
        if not dataclasses.is_dataclass(self):
            return f"{type(self).__name__}({self.path!r})"
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                parts.append(str(value) if isinstance(value, Site) else repr(value))
            elif field.repr and value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


def find_submodules(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The submodules under a path, each with its full path.

    A part may be the number of a container's child, also from its end, or a pattern with ``*``,
    ``?`` and ``[...]``.

    Raises:
        ValueError: There is no such submodule; the message names the part that fails.
    """
    found = [("", root)]
    for part in path.split(".") if path else []:
        deeper = [
            (f"{prefix}.{name}".removeprefix("."), child)
            for prefix, module in found
            for name, child in _children(module, part)
        ]
        if not deeper:
            module = found[0][1]
            names = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"The path '{path}' must name a submodule of {type(root).__name__}, but "
                f"{type(module).__name__} has no '{part}'. It has: {names}."
            )
        found = deeper
    return found


def find_submodule(root: nn.Module, path: str) -> nn.Module:
    """The one submodule under a path.

    Raises:
        ValueError: There is none, or the path has a pattern that fits several.
    """
    found = find_submodules(root, path)
    if len(found) > 1:
        raise ValueError(
            f"The path '{path}' must name one submodule of {type(root).__name__}, but it fits "
            f"{[name for name, _ in found]}."
        )
    return found[0][1]


def _children(module: nn.Module, part: str) -> list[tuple[str, nn.Module]]:
    compiled = module._modules.get("_orig_mod")
    if compiled is not None and part != "_orig_mod":
        # What torch.compile returns: users mean the model inside.
        return [(f"_orig_mod.{name}", child) for name, child in _children(compiled, part)]
    children = list(module.named_children())
    exact = [item for item in children if item[0] == part]
    if exact:
        return exact
    if part.startswith("-") and part[1:].isdigit():
        return [children[int(part)]] if 1 <= int(part[1:]) <= len(children) else []
    return [item for item in children if fnmatchcase(item[0], part)]


def joined(prefix: str, path: str) -> str:
    """The path seen from further outside."""
    return ".".join(part for part in (prefix, path) if part)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    # Every step walks through every watched call: the usual kinds of containers come first.
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def first_floating(value: Any) -> Tensor | None:
    """The first floating tensor in nested tuples, lists and mappings."""
    return next((tensor for tensor in tensors_in(value) if tensor.is_floating_point()), None)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nested tuples, lists and dicts with the function's result for each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


class PassiveHook:
    """A forward hook that only looks: the module still puts out what it computes."""


def versions_of(inputs: Any) -> tuple[int, ...]:
    """Version counters: they rise when a tensor is changed in place."""
    return tuple(tensor._version for tensor in tensors_in(inputs))


def describe(value: Any) -> str:
    """A value in a sentence: a tensor by its type and shape."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of ({', '.join(describe(item) for item in value)})"
    if isinstance(value, Mapping):
        return f"a mapping with keys {sorted(map(str, value))}"
    return f"a {type(value).__name__}"
