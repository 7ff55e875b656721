"""Where a model keeps its attention: the block to mirror, and how its raw scores are read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionSite:
    """An attention block inside a model.

    Args:
        block: Path of the submodule that takes instance features and owns all parameters of the
            scorer, with dots; an integer indexes a container, also from its end
            (``"attention_net.-1"``). The anchor mirrors this block.
        tap: Path below the block of the submodule that puts out the raw scores. Empty: the block
            itself.
        layout: Axes of the tap's output in einops notation: ``b`` bag, ``n`` instance, ``r`` row
            (head, class branch ...), for example ``"b n r"``, ``"n r"``, ``"b n"`` or
            ``"(b n) r"``. An absent axis has length one. None: told from the shape of the block's
            first input, where the axis before the last counts the instances.
        output: Index or key of the scores when the tap returns a tuple or a mapping.

    Raises:
        ValueError: The layout names an unknown axis, an axis twice, or no instance axis.

    Example:
        >>> AttentionSite("attention_net.-1", layout="n r", output=0).block
        'attention_net.-1'
    """

    block: str
    tap: str = ""
    layout: str | None = None
    output: int | str | None = None

    def __post_init__(self) -> None:
        if self.layout is None:
            return
        axes = self.layout.replace("(", " ").replace(")", " ").split()
        named = [axis for axis in axes if axis != "1"]
        if "n" not in named or len(set(named)) != len(named) or not set(named) <= set("bnr"):
            raise ValueError(
                "A layout must consist of b (bag), n (instance), r (row) and 1, each letter at "
                f"most once and n always, but got '{self.layout}'. Write for example 'b n r'."
            )

    def within(self, prefix: str) -> "AttentionSite":
        """The same site seen from a module that holds the model under this path."""
        path = ".".join(part for part in (prefix, self.block) if part)
        return replace(self, block=path)

    def find_block(self, root: nn.Module) -> nn.Module:
        """The submodule that the anchor mirrors.

        Raises:
            ValueError: The root has no such submodule.
        """
        return find_submodule(root, self.block)

    def find_tap(self, block: nn.Module) -> nn.Module:
        """The submodule of the block that puts out the scores.

        Raises:
            ValueError: The block has no such submodule.
        """
        return find_submodule(block, self.tap)

    def read(
        self, output: Any, *, features: Tensor | None = None, n_bags: int | None = None
    ) -> Float[Tensor, "bag row instance"]:
        """Raw scores from what the tap returned.

        Args:
            output: The tap's return value.
            features: The block's first input, needed when the layout is to be told from it.
            n_bags: Number of bags in the batch, needed for layouts that fuse the bag axis.

        Raises:
            ValueError: The output is no floating tensor, or it does not fit the layout.
        """
        if self.output is not None:
            output = output[self.output]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ValueError(
                f"The scores of block '{self.block}' must be a floating tensor, but its tap "
                f"returned {_describe(output)}. Name the right tap, or pick the scores with "
                "AttentionSite(output=...)."
            )
        layout = self.layout or _tell_layout(self.block, output, features)
        axes = " ".join(axis if axis in layout else "1" for axis in "brn")
        if "(" in layout and n_bags is None:
            raise ValueError(
                f"The layout '{layout}' of block '{self.block}' needs the number of bags, but the "
                "batch does not tell it. Give the batch a mask, a label or a bag_id entry."
            )
        sizes = {"b": n_bags} if "(" in layout else {}
        try:
            return rearrange(output, f"{layout} -> {axes}", **sizes)
        except RuntimeError as error:  # einops' own error type derives from it
            raise ValueError(
                f"The scores of block '{self.block}' must have the layout '{layout}', but its tap "
                f"returned {_describe(output)}. Give the layout that fits, such as 'b n r'."
            ) from error

    def with_layout(self, output: Any, features: Tensor | None) -> "AttentionSite":
        """The same site with the layout, if this call tells it: a later call may not."""
        scores = output if self.output is None else output[self.output]
        if self.layout is not None or not isinstance(scores, Tensor):
            return self
        fitting = _fitting_layouts(scores, features)
        return replace(self, layout=fitting[0]) if len(fitting) == 1 else self

    @contextmanager
    def tapped(self, block: nn.Module) -> Iterator[list[Any]]:
        """Collect what the tap returns while the context is open."""
        outputs: list[Any] = []
        handle = self.find_tap(block).register_forward_hook(
            lambda _module, _args, output: outputs.append(output)
        )
        try:
            yield outputs
        finally:
            handle.remove()


def find_submodule(root: nn.Module, path: str) -> nn.Module:
    """The submodule under a dotted path; a number indexes a container, also from its end.

    Raises:
        ValueError: There is no such submodule; the message names the part that fails.
    """
    module = root
    for part in path.split(".") if path else []:
        children = dict(module.named_children())
        if part in children:
            module = children[part]
        elif (
            part.startswith("-")
            and part[1:].isdigit()
            and int(part[1:]) in range(1, len(children) + 1)
        ):
            module = list(children.values())[int(part)]
        else:
            raise ValueError(
                f"The path '{path}' must name a submodule of {type(root).__name__}, but "
                f"{type(module).__name__} has no '{part}'. It has: {', '.join(children) or 'none'}."
            )
    return module


_REGISTRY: dict[str, AttentionSite] = {}


def register_site(name: str, site: AttentionSite) -> None:
    """Make the attention of a model class known; nothing is imported.

    Args:
        name: The class as ``"package.module.Class"``. Subclasses inherit the site.
        site: Its attention, with paths seen from the model.

    Raises:
        ValueError: The name has no module part.
    """
    if "." not in name:
        raise ValueError(
            f"A model class must be named 'package.module.Class', but got '{name}'. "
            "Put the module in front."
        )
    _REGISTRY[name] = site


def find_site(model: nn.Module) -> AttentionSite:
    """The attention site of a registered model, which may sit anywhere inside this module.

    Returns:
        The site with paths seen from ``model``.

    Raises:
        ValueError: No submodule is of a registered class, or several are.
    """
    found: dict[str, AttentionSite] = {}
    for prefix, module in model.named_modules():
        # A part of a model that is found itself is no second model.
        if any(prefix.startswith(f"{outer}.") or outer == "" for outer in found):
            continue
        site = _lookup(module)
        if site is not None:
            found[prefix] = site.within(prefix)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        blocks = [site.block for site in found.values()]
        raise ValueError(
            f"One attention block must be meant, but {type(model).__name__} holds several known "
            f"models, with blocks {blocks}. Name one, as in AnchorCallback({blocks[0]!r})."
        )
    raise ValueError(
        f"The attention block of {type(model).__name__} must be known, but no part of it is of a "
        "registered class. Name the submodule that returns the raw scores, as in "
        f"AnchorCallback('attention'), or register_site(...). Submodules: {_candidates(model)}."
    )


def resolve_site(model: nn.Module, site: AttentionSite | str | None) -> AttentionSite:
    """A user's site: as it is, from a path, or found by the model's class."""
    if site is None:
        return find_site(model)
    return AttentionSite(site) if isinstance(site, str) else site


def _lookup(module: nn.Module) -> AttentionSite | None:
    for cls in type(module).__mro__:
        site = _REGISTRY.get(f"{cls.__module__}.{cls.__qualname__}")
        if site is not None:
            return site
    return None


def _candidates(model: nn.Module) -> str:
    paths = [
        path
        for path, module in model.named_modules()
        if path and any(True for _ in module.parameters())
    ]
    likely = [
        path
        for path in paths
        if any(hint in path.lower() for hint in ("att", "pool", "score", "gate"))
    ]
    return ", ".join((likely or paths)[:20]) or "none with parameters"


def _fitting_layouts(scores: Tensor, features: Tensor | None) -> list[str]:
    """The layouts by which these scores can belong to these features."""
    if features is None or features.ndim not in (2, 3):
        return []
    batched = features.ndim == 3
    return [
        layout
        for layout in (("b n r", "b r n", "b n") if batched else ("n r", "r n", "n"))
        if len(layout.split()) == scores.ndim
        and scores.shape[layout.split().index("n")] == features.shape[-2]
        and (not batched or scores.shape[0] == features.shape[0])
    ]


def _tell_layout(block: str, scores: Tensor, features: Tensor | None) -> str:
    if features is None or features.ndim not in (2, 3):
        raise ValueError(
            f"The layout of the scores of block '{block}' can only be told when its first input is "
            f"(bag, instance, width) or (instance, width), but that is {_describe(features)}. "
            f"Write AttentionSite('{block}', layout='b n r') with the axes that hold."
        )
    fitting = _fitting_layouts(scores, features)
    # With one row, both readings of a one-instance bag are the same.
    one_row = scores.numel() == features.shape[:-1].numel()
    if len(fitting) == 1 or (fitting and one_row):
        return fitting[0]
    raise ValueError(
        f"The layout of the scores of block '{block}' cannot be told: it takes "
        f"{_describe(features)} and returns {_describe(scores)}. "
        f"Write AttentionSite('{block}', layout='b n r') with the axes that hold."
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of ({', '.join(_describe(item) for item in value)})"
    if isinstance(value, Mapping):
        return f"a mapping with keys {sorted(map(str, value))}"
    return f"a {type(value).__name__}"


for _name, _site in {
    "baselines.abmil.ABMIL": AttentionSite("attention", layout="b n r"),
    "baselines.clam.CLAMSB": AttentionSite("attention", layout="b n r"),
    "baselines.clam.CLAMMB": AttentionSite("attention", layout="b n r"),
    "baselines.transmil.TransMIL": AttentionSite("layers.-1.attention.query_key", layout="b r n"),
    "baselines.dsmil.DSMIL": AttentionSite("attention", layout="b r n"),
}.items():
    register_site(_name, _site)
