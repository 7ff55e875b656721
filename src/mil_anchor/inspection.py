"""Inspects a model: where its attention is, what the anchor would mirror, and whether it is so."""

import importlib
import inspect
import math
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.callbacks.search import search
from mil_anchor.callbacks.watch import StepWatch
from mil_anchor.sites.base import Site
from mil_anchor.sites.proof import find_difference
from mil_anchor.sites.registry import known_site

# What constructors call the width of the features, and the number of classes.
_WIDTHS = ("in_features", "in_dim", "input_dim", "input_size", "embed_dim", "n_feats", "d_in")
_CLASSES = ("n_classes", "num_classes", "n_class", "n_out", "output_class")
# What models raise on a bag of a form that they do not take.
_WRONG_FORM = (
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    AssertionError,
)


class Inspection(NamedTuple):
    """What is known of a model's attention after one training forward.

    Args:
        site: Where the attention is, seen from the model.
        known: Whether the model's class told it; otherwise it was found in what the model ran.
        difference: What differs between the scores and what the model's softmax got; None if
            nothing does.
        provable: Whether the model runs a softmax that the scores can be compared with.
        block: The module that the anchor mirrors.
        n_rows: Rows (heads, class branches) of each distribution.
        n_distributions: Distributions in one forward.
    """

    site: Site
    known: bool
    difference: str | None
    provable: bool
    block: nn.Module
    n_rows: int
    n_distributions: int


def load_model(target: str, width: int) -> nn.Module:
    """The model that a class or a function makes.

    Args:
        target: ``"package.module:name"`` of a class, of a function, or of a model.
        width: Width of the instance features, for arguments that ask for it.

    Raises:
        ValueError: There is no such thing, it needs arguments that only you know, or it fails.
    """
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
        made: Any = attrgetter(name)(module)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"The model must be named 'package.module:factory', but '{target}' cannot be imported: "
            f"{error if name else 'no name follows the colon'}."
        ) from error
    if callable(made) and not isinstance(made, nn.Module):
        arguments = _arguments_of(made, target, width)
        try:
            made = made(**arguments)
        except (TypeError, ValueError, RuntimeError, LookupError, OSError) as error:
            raise ValueError(
                f"'{target}' must make a model when it is called with {arguments}, but it failed: "
                f"{type(error).__name__}: {error}. Write a function that makes it."
            ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"'{target}' must make a torch.nn.Module, but it made a {type(made).__name__}."
        )
    return made


def inspect_model(model: nn.Module, *, width: int, n_instances: int = 100) -> Inspection:
    """Run one training forward on a random bag and look at the attention.

    Args:
        model: The model.
        width: Width of the instance features.
        n_instances: Instances of the bag.

    Raises:
        ValueError: The model cannot be called on a bag, or its attention is not found; the message
            lists what there is.
    """
    if width < 1 or n_instances < 2:
        raise ValueError(
            "A bag must have two instances at least, and features of width 1 at least, but got "
            f"{n_instances} and {width}. The attention of one instance shows nothing."
        )
    model.train()
    watch = StepWatch(model)
    watch.watch_calls()
    failures = []
    try:
        for form, args, kwargs in _attempts(model, torch.randn(2, n_instances, width)):
            with watch:
                try:
                    loss = _loss(model(*args, **kwargs))
                except _WRONG_FORM as error:
                    failures.append(f"{form}: {type(error).__name__}: {error}")
                    continue
                return _look(model, watch, loss)
    finally:
        watch.remove()
    raise ValueError(
        f"{type(model).__name__} must take a bag of features, but it failed on each form tried. "
        "Write a function that returns a model which takes (bag, instance, width). "
        + "; ".join(failures)
    )


def _arguments_of(factory: Any, target: str, width: int) -> dict[str, Any]:
    values = {"in_shape": (width,)} | dict.fromkeys(_WIDTHS, width) | dict.fromkeys(_CLASSES, 2)
    parameters = inspect.signature(factory).parameters.values()
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unknown = [name for name in required if name not in values]
    if unknown:
        raise ValueError(
            f"'{target}' needs the arguments {unknown}, which inspect cannot know. Write a "
            "function without arguments that makes the model, and name that."
        )
    # A width that the factory could do without is told, too: it should fit the bag.
    wanted = {p.name for p in parameters} & {"in_shape", *_WIDTHS} | set(required)
    return {name: values[name] for name in sorted(wanted)}


def _attempts(
    model: nn.Module, bags: Tensor
) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Ways to call a model: on one bag, on two (batch normalisation), with less and more."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    named = {p.name for p in parameters}
    for batch in (bags[:1], bags):
        known = _inputs_by_name(batch)
        needed = {
            p.name: known[p.name] for p in parameters if p.default is p.empty and p.name in known
        }
        # Some models cannot do without a mask that they take as optional; and in some True is
        # padding, so that a mask is the second choice.
        masks = {name: known[name] for name in ("mask", "attn_mask") if name in named}
        form = f"{tuple(batch.shape)} (bag, instance, width)"
        yield form, (batch,), needed
        if masks.keys() - needed:
            yield f"{form} with {', '.join(masks)}", (batch,), needed | masks
    yield f"{tuple(bags[0].shape)} (instance, width)", (bags[0],), {}
    yield f"data={tuple(bags[:1].shape)}", (), {"data": bags[:1]}


def _inputs_by_name(bags: Tensor) -> dict[str, Any]:
    """What models may need beside the features."""
    n_bags, n_instances, _ = bags.shape
    mask = torch.ones(n_bags, n_instances, dtype=torch.bool)
    side = math.isqrt(n_instances - 1) + 1
    places = torch.arange(n_instances)
    return {
        "mask": mask,
        "attn_mask": mask,
        "adj": torch.eye(n_instances).expand(n_bags, -1, -1),
        "coords": torch.stack([places // side, places % side], dim=1).expand(n_bags, -1, -1),
        "label": torch.zeros(n_bags, dtype=torch.long),
        "lens": torch.full((n_bags,), n_instances),
        "loss_fn": nn.CrossEntropyLoss(),
    }


def _loss(output: Any) -> Tensor:
    """Some number that depends on everything the model has put out."""
    values = [value.float().mean() for value in _differentiable(output)]
    if not values:
        raise TypeError("the model returned no tensor with a gradient")
    return torch.stack(values).sum()


def _differentiable(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, dict | list | tuple):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _differentiable(item)
    elif hasattr(output, "__dict__"):
        yield from _differentiable(vars(output))


def _look(model: nn.Module, watch: StepWatch, loss: Tensor) -> Inspection:
    known, is_certain = known_site(model)
    with watch.paused():
        site = known
        if site is None or not is_certain:
            site = search(model, known, watch, batch=None, loss=loss, callback="AnchorCallback")
        recorder = AttentionRecorder(model, site, only_with_grad=True)
        try:
            recorder.replay(watch.calls)
            attention = recorder.look(None)
            difference = find_difference(recorder.site, attention, watch.seen)
        finally:
            recorder.remove()
    if not attention:
        raise ValueError(
            f"The attention block '{site.path}' must run as a module when the model does, but it "
            "did not. Name the block in use."
        )
    return Inspection(
        recorder.site,
        site is known,
        difference,
        site.must_be_proven,
        recorder.block,
        attention[0].scores.shape[1],
        len(attention),
    )
