"""One experiment: compose, build, fit, test, write the run folder."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import MISSING, DictConfig, OmegaConf

from mil_anchor.callbacks.bag_features import FEATURES_FOLDER, BagFeatures
from mil_anchor.callbacks.cost import StepCost
from mil_anchor.callbacks.evaluated import evaluated_weights
from mil_anchor.callbacks.monitor import AttentionMonitor
from mil_anchor.callbacks.random_state import RandomState
from mil_anchor.composition import build_module, build_plugins, check_arguments, named_site
from mil_anchor.data.bags import BagSequence
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.environment import write_environment
from mil_anchor.evaluation import evaluate
from mil_anchor.loggers import log_result, opened_loggers
from mil_anchor.maps.file import MAPS_FILE
from mil_anchor.maps.recorder import MapRecorder
from mil_anchor.run_folder import (
    SPLIT_FILE,
    WholeCheckpoints,
    folder_name,
    held,
    prepare_folder,
    write_metrics,
    write_parts,
)
from mil_anchor.sweep.ranks import check_ranks
from mil_anchor.sweep.slots import register_resolvers, thread_share

log = logging.getLogger(__name__)


@dataclass
class Config:
    """Schema of the composed configuration: a key that is not here is refused.

    The arguments inside a group are checked against the signature of its ``_target_``.
    """

    model: dict[str, Any] = MISSING
    plugin: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    module: dict[str, Any] = MISSING
    trainer: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING
    names: dict[str, str] = MISSING
    seed: int = MISSING
    hidden: int = MISSING
    site: Any = None
    out: str = MISSING
    resume: bool = MISSING
    threads: int | None = None
    early_stopping: int | None = None
    maps: int = MISSING
    test: bool = MISSING
    bag_features: bool = MISSING


def _log_to_hydra() -> None:
    """What the callbacks say belongs into run.log, too."""
    callbacks = logging.getLogger("mil_anchor.callbacks")
    callbacks.handlers.clear()
    callbacks.propagate = True


def register_config() -> None:
    """Tell Hydra the schema and the name of a run's folder; before ``hydra.main``."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_folder", folder_name, replace=True)
    register_resolvers()


def run(config: DictConfig) -> dict[str, Any]:
    """Run one experiment in Hydra's output folder, or continue it, or find it complete.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ValueError: The configuration or the data is wrong, or the folder holds another run.
    """
    _log_to_hydra()
    folder = Path(HydraConfig.get().runtime.output_dir)
    with held(folder):
        check_arguments(config)
        with _own_threads(config.threads):
            return _run(config, folder)


@contextmanager
def _own_threads(threads: int | None) -> Iterator[None]:
    """Give a run its CPU threads; the next one in this process chooses again."""
    before = torch.get_num_threads()
    own = threads if threads is not None else thread_share()
    if own is not None:
        torch.set_num_threads(own)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(config: DictConfig, folder: Path) -> dict[str, Any]:
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    done = prepare_folder(folder, resolved)
    if done is not None:
        log.info("%s: complete already (resume=false runs it anew)", folder)
        _log_result(done)
        return done

    # First of all what can be wrong without looking at data.
    plugins = build_plugins(config)
    with opened_loggers(config, folder, settings=resolved) as loggers:
        metrics = _train_and_evaluate(config, folder, plugins=plugins, loggers=loggers)
    # Not before the loggers have finished: a run that is complete is not begun again.
    write_metrics(folder, metrics)
    _log_result(metrics)
    return metrics


def _train_and_evaluate(
    config: DictConfig, folder: Path, *, plugins: list[Callback], loggers: list[Logger]
) -> dict[str, Any]:
    seed_everything(config.seed, workers=True, verbose=False)
    write_environment(folder)
    maps = MapRecorder(named_site(config), path=folder / MAPS_FILE)
    cost, timer = StepCost(), Timer()
    best = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="val/selection",
        mode="max",
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    watching = [_monitor(config, folder), maps, *_fixed_callbacks(config, folder)]
    trainer: Trainer = hydra.utils.instantiate(
        config.trainer,
        callbacks=[cost, *plugins, *watching, timer, best],
        logger=loggers,
        default_root_dir=str(folder),
        enable_model_summary=False,
    )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    check_ranks(trainer)
    data = _data(config, trainer)
    if trainer.is_global_zero:
        write_parts(folder / SPLIT_FILE, data)
    maps.epochs_of = _ranked(data.val_bags)[: config.maps]
    module = build_module(config, data)
    _fit(trainer, module, data, folder / "checkpoints" / "last.ckpt")
    if not best.best_model_path:
        raise ValueError(
            "A run must train at least one epoch and validate it, so that a checkpoint can be "
            f"tested, but none was written with trainer.max_epochs={config.trainer.max_epochs}. "
            "Train longer, without fast_dev_run or limits on validation."
        )
    evaluated = evaluate(
        trainer,
        module,
        data=data,
        parts=("val", "test") if config.test else ("val",),
        checkpoint=best.best_model_path,
        maps=maps,
        n_drawn=config.maps,
    )
    fit_s = timer.time_elapsed("train")
    metrics = {
        **config.names,
        "seed": config.seed,
        "fold": config.data.fold,
        "in_features": data.in_features,
        **evaluated,
        "weights": evaluated_weights(trainer),
        "best_epoch": torch.load(best.best_model_path, weights_only=True)["epoch"],
        "time/fit_s": fit_s,
        "time/epoch_s": fit_s / max(1, trainer.current_epoch),
        **cost.costs,
    }
    log_result(loggers, folder, metrics, step=trainer.global_step)
    return metrics


def _monitor(config: DictConfig, folder: Path) -> AttentionMonitor:
    # Not strict: a model trains without a plug-in whether or not its attention can be found.
    return AttentionMonitor(named_site(config), path=folder / "attention.csv", strict=False)


def _data(config: DictConfig, trainer: Trainer) -> BagDataModule:
    data: BagDataModule = hydra.utils.instantiate(config.data)
    # As the Trainer does in a fit: the data module asks it for the number of processes.
    data.trainer = trainer
    data.setup("fit")
    return data


def _ranked(bags: BagSequence) -> list[str]:
    """Ids of bags, those of high classes first: their attention has something to find."""
    labels = bags.labels
    order = sorted(range(len(bags)), key=lambda index: -labels[index])
    return [bags.bag_ids[index] for index in order]


def _fixed_callbacks(config: DictConfig, folder: Path) -> list[Callback]:
    callbacks: list[Callback] = [RandomState()]
    if config.bag_features:
        callbacks.append(BagFeatures(path=folder / FEATURES_FOLDER))
    if config.early_stopping is not None:
        patience = config.early_stopping
        callbacks.append(EarlyStopping("val/selection", mode="max", patience=patience))
    if config.trainer.get("enable_progress_bar", True):
        # Lightning's hundred times a second cost as much as many a training step.
        callbacks.append(RichProgressBar(refresh_rate=10))
    return callbacks


def _fit(trainer: Trainer, module: LightningModule, data: BagDataModule, last: Path) -> None:
    checkpoint = last if last.exists() else None
    if checkpoint is not None:
        log.info("Continuing from %s", checkpoint)
    try:
        with warnings.catch_warnings():
            # That is where the checkpoint to continue from lies.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:  # Lightning's way out of Ctrl-C
        log.warning("Interrupted. The same command continues after the last whole epoch.")
        raise


@rank_zero_only
def _log_result(metrics: dict[str, Any]) -> None:
    part = "test" if "test/f1" in metrics else "val"
    names = {"f1": "F1", "auroc": "AUROC", "accuracy": "accuracy"}
    there = {key: title for key, title in names.items() if f"{part}/{key}" in metrics}
    log.info(
        "%s, seed %s, fold %s: %s %s",
        "{model} + {plugin} on {data}".format(**metrics),
        metrics["seed"],
        metrics["fold"],
        part,
        ", ".join(f"{title} {metrics[f'{part}/{key}']:.3f}" for key, title in there.items()),
    )
