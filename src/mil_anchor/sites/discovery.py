"""Discovery: finds the attention of an unknown model in what one training step has run."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from mil_anchor.sites.base import ModuleCall, Site, find_submodule
from mil_anchor.sites.gated import ACTIVATIONS, GatedSite, activated
from mil_anchor.sites.graph import (
    nodes_of,
    parameters_below,
    parameters_beside,
    parameters_between,
)
from mil_anchor.sites.layout import arrange, possible_layouts
from mil_anchor.sites.normalizations import Normalization
from mil_anchor.sites.products import ClassTokenSite, MultiheadSite
from mil_anchor.sites.proof import MASKED, varies
from mil_anchor.sites.score import AttentionSite

KINDS = (
    "AttentionSite(block, tap=...) where a submodule puts out the scores; GatedSite(value, gate, "
    "score) where three sibling modules make them; ClassTokenSite(qkv) for the class token of a "
    "fused projection (TransMIL); MultiheadSite(block) for nn.MultiheadAttention; "
    "CriticalInstanceSite(query) for DSMIL; or a class of your own (docs/your-model.md)"
)


class NothingToSeeError(ValueError):
    """A step has run no attention with gradients; another step may."""


@dataclass(frozen=True)
class _Tap:
    """A submodule output that a softmax over the instances has got."""

    call: ModuleCall
    output: int | str | None
    scores: Tensor
    scale: float
    softmax: Normalization


def discover(
    root: nn.Module,
    calls: Sequence[ModuleCall],
    seen: Sequence[Normalization],
    *,
    loss: Tensor,
    n_bags: int | None = None,
    callback: str = "AnchorCallback",
) -> Site:
    """The one attention site of a model, found in what a training step has run.

    A submodule whose output is the argument of a softmax over the instances is the tap. The block
    is the smallest submodule around it that takes the instance features, owns all parameters
    through which the scores alone reach the loss, and owns no others that train.

    Args:
        root: The module that the calls' paths start from.
        calls: Every call of every submodule, named by its path, in the order of their return.
        seen: What the model normalised.
        loss: The step's loss, with its graph.
        n_bags: Number of bags in the batch, where the batch tells it.
        callback: The class that the lines to paste are for.

    Raises:
        NothingToSeeError: No submodule is the tap, its parameters are frozen, or the loss depends
            on it alone.
        ValueError: No block fits around it, or several taps do; the message lists what there is,
            ready to paste.
    """
    found: dict[str, Site | str] = {}
    for tap in _taps(calls, seen, n_bags):
        if tap.call.name not in found:
            found[tap.call.name] = _site_around(root, calls, tap, loss, n_bags)
    sites = list(dict.fromkeys(site for site in found.values() if isinstance(site, Site)))
    unclear = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    if sites:
        unclear = {name: reason for name, reason in unclear.items() if reason != _IS_OUTPUT}
    inner = [site for site in sites if all(_is_inside(site, other) for other in sites)]
    if len(inner) == 1 and not unclear:
        return inner[0]
    model = type(root).__name__
    if sites:
        lines = [f"{callback}({site})" for site in (*sites, *_all_of(sites))]
        raise ValueError(
            f"One attention block must be meant, but the softmaxes over instances that {model} "
            f"runs get their scores from {list(found)}. Name one: {' or '.join(lines)}."
        )
    why = " and ".join(
        f"the scores of its softmax come from '{name}', {reason}"
        for name, reason in unclear.items()
    )
    guesses = [f"{callback}({site})" for site in _guesses(root, calls)]
    guesses += [f"{callback}('{name}') for that layer alone" for name in unclear]
    nothing = (
        "no submodule that ran with gradients put out the argument of a softmax over instances"
    )
    if any(one.scores.shape[-1] > 1 and not varies(one.scores) for one in seen):
        nothing += " (equal scores, as of a layer that starts with zeros, show nothing)"
    may_wait = all(reason in (_FROZEN, _IS_OUTPUT) for reason in unclear.values())
    kind = NothingToSeeError if may_wait else ValueError
    raise kind(
        f"The attention of {model} must be found, but {why or nothing}. Say where it is"
        f"{', perhaps ' + ' or '.join(guesses) if guesses else ''}: {KINDS}. "
        f"Submodules that put out something for each instance: {_candidates(calls)}."
    )


_FROZEN = "whose parameters are frozen"
_IS_OUTPUT = "which is all that the loss depends on, as class probabilities are"
_NO_OWNER = (
    "but no submodule around takes instance features and owns all parameters of that scorer and no "
    "others"
)
_TRAINED_BETWEEN = (
    "and parameters that train, a temperature perhaps, come between it and the softmax"
)


def _taps(
    calls: Sequence[ModuleCall], seen: Sequence[Normalization], n_bags: int | None
) -> Iterator[_Tap]:
    """Of each softmax over two or more instances, the first module that put out its argument."""
    outputs = [(call, key, value) for call in calls for key, value in _outputs(call.returned)]
    for softmax in seen:
        # Equal scores are equal to the output of any layer that starts with zeros.
        if softmax.function == "sigmoid" or not varies(softmax.scores):
            continue
        matches = []
        for call, key, value in outputs:
            scale = _scale_between(value.detach(), softmax)
            if scale is not None:
                matches.append(_Tap(call, key, value, scale, softmax))
        exact = [match for match in matches if match.scale == 1]
        # A softmax over classes gets the scores of a module that has no axis of that length.
        yield from [
            tap
            for tap in (exact or matches)[:1]
            if _layout(tap, tap.call.features, n_bags) is not None
        ]


def _outputs(returned: Any) -> Iterator[tuple[int | str | None, Tensor]]:
    if isinstance(returned, Tensor):
        items: Any = [(None, returned)]
    elif isinstance(returned, tuple | list):
        items = enumerate(returned)
    else:
        items = returned.items() if isinstance(returned, dict) else []
    yield from (
        (key, value)
        for key, value in items
        if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
    )


def _scale_between(value: Tensor, softmax: Normalization) -> float | None:
    """The positive factor that makes this output the softmax's argument; None: it is not."""
    target = softmax.scores
    if value.numel() != target.numel():
        return None
    target = target.reshape([n for n in target.shape[:-1] if n > 1] + [target.shape[-1]])
    for own in _unfused(value, target):
        for axes in permutations(range(own.ndim)):
            if own.permute(axes).shape == target.shape:
                scale = _factor(own.permute(axes), target, free_constant=softmax.function == "exp")
                if scale is not None:
                    return scale
    return None


def _unfused(value: Tensor, target: Tensor) -> Iterator[Tensor]:
    """The output without axes of length one, and with (bag instance) as two axes."""
    squeezed = value.squeeze()
    yield squeezed
    n_instances = target.shape[-1]
    if 0 < squeezed.ndim < target.ndim and squeezed.shape[0] % n_instances == 0:
        yield squeezed.reshape(-1, n_instances, *squeezed.shape[1:])


def _factor(own: Tensor, target: Tensor, *, free_constant: bool) -> float | None:
    real = target > MASKED
    if not bool(real.any(dim=-1).all()):
        return None
    own, target = own.double(), target.double()
    if free_constant:
        # Only the logarithm of the attention is known: scores but for a constant of each row.
        own, target = (_centred(x, real) for x in (own, target))
    own, target = own[real], target[real]
    if bool((own - target).abs().amax() <= 1e-6 * target.abs().amax()):
        return 1.0
    scale = float(own @ target / (own @ own).clamp_min(1e-300))
    fits = bool((scale * own - target).abs().amax() <= 1e-5 * target.abs().amax())
    return round(scale, 6) if fits and scale > 0 and not free_constant else None


def _centred(values: Tensor, real: Tensor) -> Tensor:
    kept = values.where(real, 0)
    return kept - kept.sum(dim=-1, keepdim=True) / real.sum(dim=-1, keepdim=True)


def _site_around(
    root: nn.Module, calls: Sequence[ModuleCall], tap: _Tap, loss: Tensor, n_bags: int | None
) -> Site | str:
    """The site with the smallest block around a tap, or why there is none."""
    # Each call of the tap is a way to the loss that leads through scores.
    scores = [
        value
        for call in calls
        if call.name == tap.call.name
        for key, value in _outputs(call.returned)
        if key == tap.output
    ]
    nodes = nodes_of(scores)
    outputs = [value for call in calls for _, value in _outputs(call.returned)]
    others = parameters_beside(nodes, outputs, loss)
    below = parameters_below(nodes, without=[])
    if not any(parameter.requires_grad for parameter in tap.call.module.parameters()):
        return _FROZEN
    if not others:
        return _IS_OUTPUT
    if parameters_between(nodes, loss) - below:
        return _TRAINED_BETWEEN
    scorer = below - others
    path = tap.call.name
    while path:
        owned = {id(p) for p in find_submodule(root, path).parameters()}
        if owned & others:
            break
        block_call = next((call for call in calls if call.name == path), None)
        if block_call is not None and scorer and scorer <= owned:
            layout = _layout(tap, block_call.features, n_bags)
            if layout is not None:
                return _outside_compiled(_declared(block_call, tap, layout))
        path = path.rpartition(".")[0]
    return (_siblings(root, calls, tap, scorer, n_bags) if scorer else None) or _NO_OWNER


def _declared(block_call: ModuleCall, tap: _Tap, layout: str) -> AttentionSite:
    """The shortest declaration: the block's own output where that is the scores."""
    for key, value in _outputs(block_call.returned):
        same = value.shape == tap.scores.shape and torch.equal(value, tap.scores)
        if same:
            return AttentionSite(block_call.name, layout=layout, output=key, scale=tap.scale)
    below = tap.call.name[len(block_call.name) + 1 :]
    return AttentionSite(
        block_call.name, tap=below, layout=layout, output=tap.output, scale=tap.scale
    )


def _outside_compiled(site: AttentionSite) -> AttentionSite:
    """The same paths without the wrapper of torch.compile, so that they hold without it, too."""
    paths = (site.block.split("."), site.tap.split("."))
    block, tap = (".".join(part for part in path if part != "_orig_mod") for path in paths)
    return replace(site, block=block, tap=tap)


def _siblings(
    root: nn.Module,
    calls: Sequence[ModuleCall],
    tap: _Tap,
    scorer: Collection[int],
    n_bags: int | None,
) -> Site | None:
    """Sibling modules V and U, or V alone, whose (product of) activations the tap has got."""
    hidden = tap.call.features
    if hidden is None or tap.scale != 1:
        return None
    factors: list[ModuleCall] = []
    for call in calls:
        owned = _owned(root, call)
        if owned and owned <= set(scorer) and isinstance(call.returned, Tensor):
            # The outer of two modules with one output comes later.
            factors = [f for f in factors if not f.name.startswith(f"{call.name}.")]
            factors += [call] if call.returned.shape == hidden.shape else []
    gates = [None, *factors]
    for value, gate in ((value, gate) for value in factors for gate in gates if value is not gate):
        parts = [value, tap.call] + ([] if gate is None else [gate])
        if not set(scorer) <= set().union(*(_owned(root, part) for part in parts)):
            continue
        layout = _layout(tap, value.features, n_bags)
        activations = _activations(value, gate, hidden)
        if layout is not None and activations is not None:
            return GatedSite(
                value.name,
                None if gate is None else gate.name,
                tap.call.name,
                layout=layout,
                value_activation=activations[0],
                gate_activation=activations[1],
            )
    return None


def _owned(root: nn.Module, call: ModuleCall) -> set[int]:
    return {id(parameter) for parameter in find_submodule(root, call.name).parameters()}


def _activations(
    value: ModuleCall, gate: ModuleCall | None, hidden: Tensor
) -> tuple[str | None, str | None] | None:
    """What turns the outputs of the siblings into what the tap got; None: nothing known."""
    of_gate: list[str | None] = [None] if gate is None else [None, "sigmoid"]
    for first, second in product((None, *ACTIVATIONS), of_gate):
        mine = activated(value.returned, first)
        if gate is not None:
            mine = mine * activated(gate.returned, second)
        if torch.allclose(mine, hidden, rtol=1e-5, atol=1e-7):
            return first, second
    return None


def _layout(tap: _Tap, features: Tensor | None, n_bags: int | None) -> str | None:
    """The first layout by which the scores belong to the features and to the softmax's rows."""
    n_instances = tap.softmax.scores.shape[-1]
    if features is None or features.ndim < 2:
        return None
    first, second = features.shape[:2]
    if features.ndim > 2:
        # Bags first, as everywhere, or instances first, as some transformers have it.
        # Convolutions have them last.
        third = features.shape[2]
        n_bags_possible = [first] * (n_instances in (second, third))
        n_bags_possible += [second] * (first == n_instances)
    else:
        fits = first in (n_instances, (n_bags or 1) * n_instances)
        n_bags_possible = [first // n_instances] * fits
    for bags in n_bags_possible:
        layouts = possible_layouts(tuple(tap.scores.shape), n_bags=bags, n_instances=n_instances)
        for layout in layouts:
            # Features without a bag axis give scores without one, or with both in one.
            has_bags = features.ndim > 2 or "(b n)" in layout or "b" not in layout
            if has_bags and _has_rows_of(tap, layout, bags):
                return layout
    return None


def _has_rows_of(tap: _Tap, layout: str, n_bags: int) -> bool:
    scores = arrange(tap.scores.detach(), layout, tap.call.name, n_bags)
    target = tap.softmax.scores.reshape(-1, scores.shape[-1])
    free_constant = tap.softmax.function == "exp"
    factors = [
        _factor(rows.reshape(target.shape), target, free_constant=free_constant)
        for rows in (scores, scores.transpose(0, 1))
        if rows.numel() == target.numel()
    ]
    return any(f is not None and math.isclose(f, tap.scale, rel_tol=1e-4) for f in factors)


def _is_inside(site: Site, other: Site) -> bool:
    return site == other or site.path.startswith(f"{other.path}.")


def _all_of(sites: Sequence[Site]) -> list[Site]:
    """One site for several blocks whose paths differ in numbers only."""
    patterns = {re.sub(r"(?<![^.])\d+(?![^.])", "*", site.path) for site in sites}
    patterns = {re.sub(r"\d+", "[0-9]*", pattern) for pattern in patterns}
    alike = {replace(site, block="") if isinstance(site, AttentionSite) else site for site in sites}
    if len(patterns) == len(alike) == 1 and isinstance(sites[0], AttentionSite) and len(sites) > 1:
        return [replace(sites[0], block=patterns.pop())]
    return []


def _guesses(root: nn.Module, calls: Sequence[ModuleCall]) -> list[Site]:
    """Sites of query-key products: which submodules they can be at, though not what they mean."""
    guesses: dict[str, Site] = {}
    for call in calls:
        if isinstance(call.module, nn.MultiheadAttention):
            given = dict(zip(("query", "key"), call.args, strict=False)) | call.kwargs
            among_each_other = given["query"].shape == given["key"].shape
            guesses[call.name] = MultiheadSite(call.name, class_token=among_each_other)
        elif (
            isinstance(call.module, nn.Linear)
            and call.module.out_features == 3 * call.module.in_features
            and ClassTokenSite(call.name).exists_in(root)
        ):
            guesses[call.name] = ClassTokenSite(call.name)
    return list(guesses.values())


def _candidates(calls: Sequence[ModuleCall]) -> str:
    """Submodules that put out fewer numbers than they take, with shapes."""
    lines = {}
    for call in calls:
        features = call.features
        for _, value in _outputs(call.returned):
            if features is not None and value.ndim > 1 and value.numel() < features.numel():
                lines[call.name] = f"{call.name} {tuple(features.shape)} -> {tuple(value.shape)}"
    return "; ".join(list(lines.values())[:20]) or "none"
