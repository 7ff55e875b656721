"""One experiment: compose, build, fit, test, write the run folder."""

import copy
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import MISSING, DictConfig, OmegaConf

from mil_anchor.callbacks.bag_features import FEATURES_FOLDER, BagFeatures
from mil_anchor.callbacks.evaluated import evaluated_weights
from mil_anchor.callbacks.monitor import AttentionMonitor, read_attention
from mil_anchor.callbacks.random_state import RandomState
from mil_anchor.composition import build_module, build_plugins, check_arguments, named_site
from mil_anchor.data.bags import BagSequence
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.data.folder import SlideDataModule
from mil_anchor.evidence import write_evidence
from mil_anchor.inspection import inspect_model
from mil_anchor.maps.file import MAPS_FILE
from mil_anchor.maps.recorder import MapRecorder
from mil_anchor.module import MILModule, Prediction
from mil_anchor.results import attention_summary
from mil_anchor.run_folder import (
    folder_name,
    held,
    prepare_folder,
    write_metrics,
    write_parts,
    write_predictions,
)
from mil_anchor.sites.base import Site

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
        return _run(config, folder)


def _run(config: DictConfig, folder: Path) -> dict[str, Any]:
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    done = prepare_folder(folder, resolved)
    if done is not None:
        log.info("%s: complete already (resume=false runs it anew)", folder)
        _log_result(done)
        return done

    # First of all what can be wrong without looking at data.
    plugins = build_plugins(config)
    seed_everything(config.seed, workers=True, verbose=False)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    maps = MapRecorder(named_site(config), path=folder / MAPS_FILE)
    callbacks = [*plugins, _monitor(config, folder), maps, *_fixed_callbacks(config)]
    if config.bag_features:
        callbacks.append(BagFeatures(path=folder / FEATURES_FOLDER))
    timer = Timer()
    best = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="val/selection",
        mode="max",
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    trainer: Trainer = hydra.utils.instantiate(
        config.trainer,
        callbacks=[*callbacks, timer, best],
        logger=list(hydra.utils.instantiate(config.logger).values()),
        default_root_dir=str(folder),
        enable_model_summary=False,
    )
    data = _data(config, trainer)
    if trainer.is_global_zero:
        write_parts(folder / "split.csv", data)
    maps.epochs_of = _ranked(data.val_bags)[: config.maps]
    module = build_module(config, data)
    _fit(trainer, module, data, folder / "checkpoints" / "last.ckpt")
    if not best.best_model_path:
        raise ValueError(
            "A run must train at least one epoch and validate it, so that a checkpoint can be "
            f"tested, but none was written with trainer.max_epochs={config.trainer.max_epochs}. "
            "Train longer, without fast_dev_run or limits on validation."
        )
    evaluated: dict[str, float | str] = {}
    parts = ("val", "test") if config.test else ("val",)
    evaluated |= _evaluate(
        trainer, module, data, parts=parts, maps=maps, checkpoint=best.best_model_path
    )
    attention = folder / "attention.csv"
    evaluated |= attention_summary(read_attention(attention) if attention.exists() else [])
    if trainer.is_global_zero:
        evaluated |= write_evidence(folder, mpp=data.mpp, n_drawn=config.maps)

    fit_s = timer.time_elapsed("train")
    metrics = {
        **resolved["names"],
        "seed": config.seed,
        "fold": config.data.fold,
        # What is not defined, such as the AUROC of one class, is left out: JSON has no NaN.
        **{key: value for key, value in evaluated.items() if value == value},
        "weights": evaluated_weights(trainer),
        "best_epoch": torch.load(best.best_model_path, weights_only=True)["epoch"],
        "time/fit_s": fit_s,
        "time/epoch_s": fit_s / max(1, trainer.current_epoch),
    }
    write_metrics(folder, metrics)
    _log_result(metrics)
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


def _fixed_callbacks(config: DictConfig) -> list[Callback]:
    callbacks: list[Callback] = [RandomState()]
    if config.early_stopping is not None:
        patience = config.early_stopping
        callbacks.append(EarlyStopping("val/selection", mode="max", patience=patience))
    if config.trainer.get("enable_progress_bar", True):
        callbacks.append(RichProgressBar())
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


def _evaluate(
    trainer: Trainer,
    module: MILModule,
    data: BagDataModule,
    *,
    parts: Sequence[str],
    maps: MapRecorder,
    checkpoint: str,
) -> dict[str, float]:
    """Metrics of the chosen checkpoint on parts of the data; writes its predictions."""
    if maps.site is None and maps.found is None and not maps.gave_up:
        maps.found = _site_without_a_fit(module, data)
    metrics: dict[str, float] = {}
    rows: list[tuple[str, Prediction]] = []
    evaluate_of = {"val": trainer.validate, "test": trainer.test}
    for part in parts:
        if part not in data.parts:
            log.warning("No slides for %s, so nothing is measured there.", part)
            continue
        metrics |= evaluate_of[part](module, datamodule=data, ckpt_path=checkpoint, verbose=False)[
            0
        ]
        rows += [(part, prediction) for prediction in module.predictions]
    if trainer.is_global_zero:
        if isinstance(data, SlideDataModule) and not maps.path.exists() and not maps.gave_up:
            log.warning("No attention maps: these slides have neither coordinates nor tile labels.")
        write_predictions(Path(trainer.default_root_dir) / "predictions.csv", rows)
    return metrics


def _site_without_a_fit(module: MILModule, data: BagDataModule) -> Site | None:
    """Where the attention is, when the fit was complete before this process began."""
    try:
        return inspect_model(copy.deepcopy(module.model), width=data.in_features).site.within(
            "model"
        )
    except ValueError as error:
        log.warning("No attention maps: %s", error)
        return None


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
