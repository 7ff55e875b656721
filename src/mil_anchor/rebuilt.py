"""Builds a complete run anew from its folder: data, model, and the scores of its attention."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.errors import InstantiationException
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mil_anchor.anchor import Anchor
from mil_anchor.callbacks.anchor import AnchorCallback
from mil_anchor.callbacks.recorder import AttentionRecorder
from mil_anchor.composition import build_module, build_plugins, named_site
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.inspection import inspect_model
from mil_anchor.module import MILModule
from mil_anchor.sites.base import Site
from mil_anchor.sites.encoder import with_encoder
from mil_anchor.sites.registry import as_site

_CHECKPOINT = "checkpoints/best.ckpt"


class RebuiltRun(NamedTuple):
    """A run as its chosen checkpoint left it, on the CPU.

    Args:
        config: Its resolved configuration.
        data: Its bags, set up.
        module: Its model with the weights that were trained; where others were evaluated
            (``plugin=slow``), these are not they.
        checkpoint: All that ``checkpoints/best.ckpt`` holds.
    """

    config: DictConfig
    data: BagDataModule
    module: MILModule
    checkpoint: dict[str, Any]


class RawScores(NamedTuple):
    """Raw attention scores of bags.

    Args:
        source: Whose they are: ``"anchor"`` or ``"online"``.
        of_bags: The scores of each bag, real instances only.
    """

    source: str
    of_bags: list[Float[Tensor, "row _"]]


def rebuild(folder: Path) -> RebuiltRun:
    """Build the data and the model of a run anew.

    Raises:
        ValueError: The folder does not hold a configuration and a checkpoint, or what they name,
            the data above all, is not there any more.
    """
    files = folder / "config.yaml", folder / _CHECKPOINT
    gone = [file.relative_to(folder).as_posix() for file in files if not file.exists()]
    if gone:
        raise ValueError(
            f"A run is built anew from its config.yaml and checkpoints/best.ckpt, but {folder} "
            f"lacks {gone}. Name the folder of a complete run."
        )
    config: Any = OmegaConf.load(files[0])
    try:
        data: BagDataModule = hydra.utils.instantiate(config.data)
        data.setup("fit")
        module = build_module(config, data)
        checkpoint = _load_checkpoint(folder)
        trained = checkpoint.get("current_model_state", checkpoint["state_dict"])
        module.load_state_dict(trained)
    except (InstantiationException, OSError, RuntimeError, ValueError, LookupError) as error:
        raise ValueError(
            f"The run in {folder} must be built anew from its data and its checkpoint, but: "
            f"{error} Bring back what it was trained with, or leave this run out."
        ) from error
    return RebuiltRun(config, data, module.eval(), checkpoint)


def validation_scores(run: RebuiltRun) -> RawScores:
    """Raw scores of the validation bags: those of the run's anchor, or the model's without one.

    Raises:
        ValueError: The attention of the model is not found.
    """
    plugins = build_plugins(run.config)
    callback = next((own for own in plugins if isinstance(own, AnchorCallback)), None)
    state = None if callback is None else run.checkpoint["callbacks"].get(callback.state_key)
    site = _site(run, callback)
    recorder = AttentionRecorder(run.module, site, only_with_grad=False)
    anchor = None
    if state:
        anchor = Anchor(recorder.block)
        anchor.load_state_dict(state["anchor"])
    try:
        of_bags = list(_scores(run, recorder, anchor))
    finally:
        recorder.remove()
    return RawScores("online" if anchor is None else "anchor", of_bags)


def holds_anchor(folder: Path) -> bool:
    """Whether the chosen checkpoint of a run holds an anchor."""
    if not (folder / _CHECKPOINT).exists():
        return False
    states = _load_checkpoint(folder).get("callbacks", {}).values()
    return any("anchor" in state for state in states)


def _load_checkpoint(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(
        folder / _CHECKPOINT, map_location="cpu", weights_only=True
    )
    return checkpoint


def _site(run: RebuiltRun, callback: AnchorCallback | None) -> Site:
    named = named_site(run.config)
    if callback is not None and callback.site is not None:
        named = callback.site
    if named is not None:
        site = as_site(named)
    else:
        model = copy.deepcopy(run.module.model)
        site = inspect_model(model, width=run.data.in_features).site.within("model")
    if callback is not None and callback.scope == "encoder":
        return with_encoder(site, run.module)
    return site


def _scores(
    run: RebuiltRun, recorder: AttentionRecorder, anchor: Anchor | None
) -> Iterator[Float[Tensor, "row instance"]]:
    for batch in run.data.val_dataloader():
        recorder.start()
        # With gradients: then inputs that the model has changed in place since are an error.
        run.module(batch)
        for attention in recorder.take(batch):
            scores = attention.scores.detach()
            if anchor is not None:
                own = anchor.apply(recorder.site.rescore, attention.inputs)
                scores = own.masked_fill(scores == -torch.inf, -torch.inf)
            yield from attention.by_bag(scores)
