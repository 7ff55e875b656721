"""What a composed configuration must hold, and what is built of it."""

import inspect
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args

import hydra
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.module import MILModule

_SAID = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}
_PLAIN = set(_SAID)


def check_arguments(config: DictConfig) -> None:
    """Check every group's keys against the arguments that its ``_target_`` takes.

    Raises:
        ValueError: A key is no argument, a value is not of its type, or the data decides it.
    """
    if set(config.names) != {"model", "plugin", "data"}:
        raise ValueError(
            f"'names' must have the keys model, plugin and data, but has {sorted(config.names)}."
        )
    if config.early_stopping is not None and config.early_stopping < 1:
        raise ValueError(
            "early_stopping must be at least 1 epoch, or null for none, but got "
            f"{config.early_stopping}."
        )
    if config.threads is not None and config.threads < 1:
        raise ValueError(
            f"threads must be at least 1, or null for torch's own choice, but got {config.threads}."
        )
    if config.maps < 0:
        raise ValueError(f"maps must be a number of slides from 0, but got {config.maps}.")
    for path, node in _groups(config):
        _check_group(path, node)
    decided = [key for key in ("in_features", "n_classes") if key in config.model]
    if decided:
        raise ValueError(
            f"{decided} of the model follow from the data, but the configuration sets them. "
            "Remove them from 'model'."
        )


def _groups(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The parts that are built."""
    yield from plugin_parts(config)
    for name in config.logger:
        yield f"logger.{name}", config.logger._get_node(name)
    for name in ("model", "data", "module", "trainer"):
        node = config._get_node(name)
        if isinstance(node, DictConfig):
            yield name, node


def plugin_parts(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The callbacks of a plug-in: none, one, or several whose others stand below ``also``."""
    own = {key: config.plugin._get_node(key) for key in config.plugin if key != "also"}
    if own:
        yield "plugin", OmegaConf.create(own, parent=config)
    for name, node in config.plugin.get("also", {}).items():
        yield f"plugin.also.{name}", node


def build_plugins(config: DictConfig) -> list[Callback]:
    """The callbacks of the plug-in."""
    return [hydra.utils.instantiate(node) for _, node in plugin_parts(config)]


def build_module(config: DictConfig, data: BagDataModule) -> MILModule:
    """The model for the widths and classes of the data, in the module that trains it."""
    model = hydra.utils.instantiate(
        config.model, in_features=data.in_features, n_classes=data.n_classes
    )
    module: MILModule = hydra.utils.instantiate(
        config.module, model=model, n_classes=data.n_classes
    )
    return module


def named_site(config: DictConfig) -> Any:
    """The attention block that the configuration names: a site, a path, or None."""
    return (
        hydra.utils.instantiate(config.site) if isinstance(config.site, DictConfig) else config.site
    )


def _check_group(path: str, node: DictConfig) -> None:
    if "_target_" not in node:
        raise ValueError(
            f"'{path}' must say what to build in _target_, but it has only the keys "
            f"{list(node)}. Look for a misspelled _target_."
        )
    target = hydra.utils.get_object(node._target_)
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = [key for key in map(str, node) if not key.startswith("_") and key not in parameters]
    if unknown:
        raise ValueError(
            f"Every key below '{path}' must be an argument of {node._target_}, but {unknown} "
            f"are not. It takes: {', '.join(parameters)}."
        )
    for key in map(str, node):
        if key in parameters:
            _check_type(f"{path}.{key}", node[key], parameters[key].annotation)


def _check_type(path: str, value: Any, annotation: Any) -> None:
    """Demand a switch or a number where the argument is one: any string would count as true."""
    allowed = set(get_args(annotation) or [annotation])
    if not allowed <= _PLAIN:
        return
    fits = type(value) in allowed or (type(value) is int and float in allowed)
    if not fits:
        kinds = " or ".join(sorted(_SAID[kind] for kind in allowed))
        raise ValueError(f"'{path}' must be {kinds}, but got {value!r}.")
