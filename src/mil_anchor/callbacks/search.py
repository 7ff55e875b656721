"""Looks for a model's attention in what a training step has run."""

from typing import Any

from torch import Tensor, nn

from mil_anchor.callbacks.processes import tell
from mil_anchor.callbacks.recorder import AttentionRecorder, n_bags_of
from mil_anchor.callbacks.watch import StepWatch
from mil_anchor.sites.base import Site
from mil_anchor.sites.discovery import discover
from mil_anchor.sites.proof import find_difference, is_provable


def search(
    root: nn.Module,
    guess: Site | None,
    watch: StepWatch,
    *,
    batch: Any,
    loss: Tensor,
    callback: str,
) -> Site:
    """The site of a model that has run under a watch of all its calls.

    Args:
        root: The model.
        guess: The site that goes with the name of its class, if it has a known one: a model of
            that name may be another one, so it must agree with what has run.
        watch: What has run.
        batch: What it ran on.
        loss: What came of it, with its graph.
        callback: The class that the lines to paste are for.

    Raises:
        NothingToSeeError: The step has shown no attention; another one may.
        ValueError: What it has shown is not clear.
    """
    guess_fits, guess_reads = _try(root, guess, watch, batch)
    if guess is not None and guess_fits:
        return guess
    try:
        site = discover(
            root, watch.calls, watch.seen, loss=loss, n_bags=n_bags_of(batch), callback=callback
        )
    except ValueError:
        if guess is not None and guess_reads:  # its proof tells better what is wrong
            return guess
        raise
    tell(
        f"{callback}: found the attention of {type(root).__name__} in '{site.path}'. "
        f"To name it: {callback}({site})."
    )
    return site


def _try(root: nn.Module, guess: Site | None, watch: StepWatch, batch: Any) -> tuple[bool, bool]:
    """Whether a guessed site agrees with what has run, and whether it can be read at all."""
    if guess is None:
        return False, False
    recorder = AttentionRecorder(root, guess, only_with_grad=True)
    try:
        recorder.replay(watch.calls)
        attention = recorder.look(batch)
    except (ValueError, RuntimeError):
        return False, False
    finally:
        recorder.remove()
    trains = any(parameter.requires_grad for parameter in recorder.block.parameters())
    if not trains or not is_provable(attention):
        return False, False
    site = recorder.site
    unproven = not site.must_be_proven
    return unproven or find_difference(site, attention, watch.seen) is None, True
