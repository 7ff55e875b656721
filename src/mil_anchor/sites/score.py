"""Sites whose scores a submodule puts out, declared by a path."""

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from mil_anchor.sites.base import (
    ModuleCall,
    RecordedAttention,
    Site,
    describe,
    find_submodule,
    find_submodules,
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
from mil_anchor.sites.running import run_until


@dataclass(frozen=True)
class AttentionSite(Site):
    """An attention block inside a model.

    Args:
        block: Path of the submodule that takes instance features and owns all parameters of the
            scorer, with dots; an integer indexes a container, also from its end
            (``"attention_net.-1"``), and a pattern names several (``"heads.*"``), which are rows if
            they judge the same instances, else distributions of their own. The anchor mirrors it.
        tap: Path below the block of the submodule that puts out the raw scores. Empty: the block
            itself. A pattern names several, which are rows.
        layout: Axes of the tap's output in einops notation: ``b`` bag, ``n`` instance, ``r`` row
            (head, class branch ...), for example ``"b n r"``, ``"n r"``, ``"b n"`` or
            ``"(b n) r"``. An absent axis has length one. None: told from the shape of the block's
            first input, where the axis before the last counts the instances.
        output: Index or key of the scores when the tap returns a tuple or a mapping.
        scale: What the model multiplies the scores by before its softmax: a number, or an
            attribute of the model by its path, ``"1/temperature"`` for a divisor.
        mask: Name of the argument by which a mask reaches the block, ``"~mask"`` if True means
            padding there. Not needed where the batch has the mask of the whole bags.
        surrogate: The model never normalises these scores over the instances (an exact row of a
            Nystrom attention, say), so no softmax can prove them.
        mixing: Path, below the model, of the submodule that puts out by which weights the model
            mixes the instances instead, (bag, row, at least the instances), in evaluation. The
            monitor compares the two.

    Raises:
        ValueError: The layout names an unknown axis, an axis twice, or no instance axis.

    Example:
        >>> print(AttentionSite("attention_net.-1", layout="n r", output=0))
        AttentionSite('attention_net.-1', layout='n r', output=0)
    """

    block: str
    tap: str = ""
    layout: str | None = None
    output: int | str | None = None
    scale: float | str = 1.0
    mask: str | None = None
    surrogate: bool = False
    mixing: str = ""

    def __post_init__(self) -> None:
        if self.layout is not None:
            check_layout(self.layout)
        if isinstance(self.scale, str):
            path = self.scale.removeprefix("1/")
            is_right = all(part.isidentifier() or part.isdigit() for part in path.split("."))
            is_right = is_right and not path.isdigit()
        else:
            is_right = 0 < self.scale < math.inf
        if not is_right:
            raise ValueError(
                "scale must be a number above 0, or the name of an attribute of the model such as "
                f"'1/temperature', but got {self.scale!r}."
            )

    @property
    @override
    def path(self) -> str:
        return self.block

    @property
    @override
    def must_be_proven(self) -> bool:
        return not self.surrogate

    @override
    def within(self, prefix: str) -> "AttentionSite":
        scale = self.scale
        if isinstance(scale, str):
            divides, name = scale.startswith("1/"), scale.removeprefix("1/")
            scale = "1/" * divides + joined(prefix, name)
        mixing = joined(prefix, self.mixing) if self.mixing else ""
        return replace(self, block=joined(prefix, self.block), scale=scale, mixing=mixing)

    @override
    def bound(self, root: nn.Module) -> "AttentionSite":
        if not isinstance(self.scale, str):
            return self
        value = _number_of(root, self.scale.removeprefix("1/"))
        return replace(self, scale=1 / value if self.scale.startswith("1/") else value)

    @override
    def find_block(self, root: nn.Module) -> nn.Module:
        blocks = [block for _, block in find_submodules(root, self.block)]
        return blocks[0] if len(blocks) == 1 else nn.ModuleList(blocks)

    @override
    def watched(self, root: nn.Module) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for index, (_, block) in enumerate(find_submodules(root, self.block)):
            if self.tap:
                taps = find_submodules(block, self.tap)
                modules |= {f"{index} tap {row}": tap for row, (_, tap) in enumerate(taps)}
            modules[f"{index}"] = block
        for module in modules.values():
            if isinstance(module, nn.MultiheadAttention):
                raise ValueError(
                    f"'{joined(self.block, self.tap)}' is an nn.MultiheadAttention, which puts out "
                    f"no raw scores. Write MultiheadSite('{self.block}')."
                )
        return modules

    @override
    def settled(self, calls: Sequence[ModuleCall]) -> "AttentionSite":
        if self.layout is not None:
            return self
        for call, outputs in self._outputs_of_blocks(calls):
            scores = outputs[0] if self.output is None else self._chosen(outputs[0])
            if isinstance(scores, Tensor):
                fitting = fitting_layouts(scores, call.features)
                if len(fitting) == 1:
                    return replace(self, layout=fitting[0])
        return self

    @override
    def read(self, calls: Sequence[ModuleCall], n_bags: int | None) -> list[RecordedAttention]:
        by_block: dict[str, list[RecordedAttention]] = {}
        for call, outputs in self._outputs_of_blocks(calls):
            features = call.features
            scores = [self._scores(output, features, n_bags) for output in outputs]
            rows = _joined(scores)
            part = _Part(int(call.name), *call.inputs(), n_bags, (len(rows), rows.shape[-1]))
            read = RecordedAttention(rows, self._mask_of(call, rows), (part,))
            by_block.setdefault(call.name, []).append(read)
        return _as_rows(list(by_block.values()))

    @override
    def rescore(self, block: nn.Module, inputs: Any) -> Float[Tensor, "bag row instance"]:
        scores = []
        for part in inputs:
            # A list is never a block itself: it cannot be called.
            own = block[part.block] if isinstance(block, nn.ModuleList) else block
            if not self.tap:
                output = own(*part.args, **part.kwargs)
                scores.append(self._scores(output, part.features, part.n_bags))
                continue
            taps = {f"{row}": tap for row, (_, tap) in enumerate(find_submodules(own, self.tap))}
            calls = run_until(own, taps, part.args, part.kwargs, n_calls=len(taps))
            outputs = {call.name: call.output for call in calls}
            scores += [self._scores(outputs[name], part.features, part.n_bags) for name in taps]
        return _joined(scores)

    @override
    def reads_output(self, name: str) -> bool:
        return not self.tap or "tap" in name

    @override
    def instances(self, inputs: Any) -> Float[Tensor, "bag instance width"]:
        """What the block got first; without the class token that a block may get with it.

        Raises:
            ValueError: The block got nothing of the shape (bag, instance, width), or several blocks
                got features of their own.
        """
        axes = (self.layout or "").replace("(", "").replace(")", "").split()
        instances_first = "b" in axes and axes.index("n") < axes.index("b")
        features, *others = (
            batched_features(part.features, part.shape, self.path, instances_first=instances_first)
            for part in inputs
        )
        if not all(torch.equal(features, other) for other in others):
            raise ValueError(
                f"The attention blocks '{self.block}' must weigh the same features to be rows of "
                "one attention, but each got its own. Name one of them."
            )
        return features

    def _outputs_of_blocks(self, calls: Sequence[ModuleCall]) -> list[tuple[ModuleCall, list[Any]]]:
        """The calls of blocks, each with what its taps have returned."""
        found = []
        tapped: dict[str, Any] = {}
        for call in calls:
            block, _, row = call.name.partition(" tap ")
            if call.name in tapped:
                raise ValueError(
                    f"The tap '{self.tap}' must run once in each call of attention block "
                    f"'{self.block}', but it ran again. Name the smallest block around it."
                )
            if row:
                tapped[call.name] = call.output
                continue
            names = [name for name in tapped if name.partition(" tap ")[0] == block]
            rows = [tapped.pop(name) for name in sorted(names, key=_row_of)]
            if self.tap and not rows:
                raise ValueError(
                    f"The tap '{self.tap}' must run whenever the attention block '{self.block}' "
                    "does, with gradients, but it did not. Name the submodule that puts out the "
                    "scores; reentrant checkpointing hides it, so pass use_reentrant=False."
                )
            found.append((call, rows if self.tap else [call.output]))
        return found

    def _scores(self, output: Any, features: Tensor | None, n_bags: int | None) -> Tensor:
        if self.output is not None:
            output = self._chosen(output)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ValueError(
                f"The scores of block '{self.block}' must be a floating tensor, but its tap "
                f"returned {describe(output)}. Name the right tap, or pick the scores with "
                "AttentionSite(output=...)."
            )
        layout = self.layout or tell_layout(output, features, self.block)
        scores = arrange(output, layout, self.block, n_bags)
        return scores if self.scale == 1 else scores * float(self.scale)

    def _chosen(self, output: Any) -> Any:
        is_container = isinstance(output, Mapping | tuple | list)
        with suppress(LookupError, TypeError):
            if is_container:
                return output[self.output]
        raise ValueError(
            f"output={self.output!r} must pick the scores from what the tap of block "
            f"'{self.block}' returns, but that is {describe(output)}. Leave output away, or name "
            "another entry."
        )

    def _mask_of(self, call: ModuleCall, scores: Tensor) -> Bool[Tensor, "bag instance"] | None:
        if self.mask is None:
            return None
        name = self.mask.removeprefix("~")
        signature = inspect.signature(call.module.forward)
        if name not in signature.parameters:
            raise ValueError(
                f"mask='{self.mask}' must name an argument of attention block '{self.block}', but "
                f"its forward takes {list(signature.parameters)}."
            )
        value = signature.bind_partial(*call.args, **call.kwargs).arguments.get(name)
        if value is None:
            return None
        shape = (len(scores), scores.shape[-1])
        if not isinstance(value, Tensor) or value.numel() != shape[0] * shape[1]:
            raise ValueError(
                f"The argument '{name}' of attention block '{self.block}' must have one entry for "
                f"each of {shape} (bag, instance), but it is {describe(value)}."
            )
        mask = value.reshape(shape).bool()
        return ~mask if self.mask.startswith("~") else mask


def _as_rows(by_block: list[list[RecordedAttention]]) -> list[RecordedAttention]:
    """Calls of different blocks on the same instances, side by side as rows of one distribution."""
    if len(by_block) == 1:
        return by_block[0]
    shapes = [[(len(r.scores), r.scores.shape[-1]) for r in read] for read in by_block]
    if not by_block or any(own != shapes[0] for own in shapes):
        return [read for of_block in by_block for read in of_block]
    return [
        RecordedAttention(
            torch.cat([read.scores for read in of_call], dim=1),
            of_call[0].mask,
            tuple(part for read in of_call for part in read.inputs),
        )
        for of_call in zip(*by_block, strict=True)
    ]


def _joined(scores: list[Tensor]) -> Float[Tensor, "bag row instance"]:
    """The rows of several scores; one alone needs no copy."""
    return scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)


class _Part(NamedTuple):
    """What one block got, and how many bags and instances it scored."""

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    n_bags: int | None
    shape: tuple[int, int]

    @property
    def features(self) -> Tensor | None:
        """The first floating tensor among the inputs."""
        return first_floating((self.args, self.kwargs))


def _row_of(name: str) -> int:
    return int(name.rpartition(" ")[2])


def _number_of(root: nn.Module, path: str) -> float:
    """A number among the attributes of a submodule."""
    owner, _, name = path.rpartition(".")
    value = getattr(find_submodule(root, owner), name, None)
    if isinstance(value, nn.Parameter) or not isinstance(value, int | float | Tensor):
        raise ValueError(
            f"scale must name a fixed number of the model, but '{path}' of {type(root).__name__} "
            f"is {describe(value)}. Write the number."
        )
    return float(value)
