"""One experiment: compose, build, fit, test, write the run folder."""

import csv
import inspect
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
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

from mil_anchor.callbacks.monitor import AttentionMonitor, read_attention
from mil_anchor.callbacks.random_state import RandomState
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.module import MILModule, Prediction
from mil_anchor.results import METRICS_FILE, attention_summary, read_metrics

log = logging.getLogger(__name__)

# What may differ between an interrupted run and the one that continues it.
_NOT_COMPARED = {"resume", "out", "logger", "trainer.enable_progress_bar"}


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


def _log_to_hydra() -> None:
    """What the callbacks say belongs into run.log, too."""
    callbacks = logging.getLogger("mil_anchor.callbacks")
    callbacks.handlers.clear()
    callbacks.propagate = True


def register_config() -> None:
    """Tell Hydra the schema and the name of a run's folder; before ``hydra.main``."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)


def run(config: DictConfig) -> dict[str, Any]:
    """Run one experiment in Hydra's output folder, or continue it, or find it complete.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ValueError: The configuration or the data is wrong, or the folder holds another run.
    """
    _log_to_hydra()
    check_arguments(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    done = _prepare_folder(folder, resolved)
    if done is not None:
        log.info("%s: complete already (resume=false runs it anew)", folder)
        _log_result(done)
        return done

    # First of all what can be wrong without looking at data.
    plugins = _plugins(config)
    seed_everything(config.seed, workers=True, verbose=False)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data: BagDataModule = hydra.utils.instantiate(config.data)
    data.setup("fit")
    model = hydra.utils.instantiate(
        config.model, in_features=data.in_features, n_classes=data.n_classes
    )
    module: MILModule = hydra.utils.instantiate(
        config.module, model=model, n_classes=data.n_classes
    )
    callbacks = [*plugins, _monitor(config, folder), *_fixed_callbacks(config)]
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
        logger=hydra.utils.instantiate(config.logger),
        default_root_dir=str(folder),
        enable_model_summary=False,
    )
    _fit(trainer, module, data, folder / "checkpoints" / "last.ckpt")
    if not best.best_model_path:
        raise ValueError(
            "A run must train at least one epoch and validate it, so that a checkpoint can be "
            f"tested, but none was written with trainer.max_epochs={config.trainer.max_epochs}. "
            "Train longer, without fast_dev_run or limits on validation."
        )
    evaluated = _evaluate(trainer, module, data, best.best_model_path, folder)

    fit_s = timer.time_elapsed("train")
    metrics = {
        **resolved["names"],
        "seed": config.seed,
        "fold": config.data.fold,
        **evaluated,
        "best_epoch": torch.load(best.best_model_path, weights_only=True)["epoch"],
        "time/fit_s": fit_s,
        "time/epoch_s": fit_s / max(1, trainer.current_epoch),
    }
    _write_metrics(folder, metrics)
    _log_result(metrics)
    return metrics


def check_arguments(config: DictConfig) -> None:
    """Check every group's keys against the arguments that its ``_target_`` takes.

    Raises:
        ValueError: A key is no argument, or it is one that the data decides.
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
    for path, node in _groups(config):
        if "_target_" not in node:
            raise ValueError(
                f"'{path}' must say what to build in _target_, but it has only the keys "
                f"{list(node)}. Look for a misspelled _target_."
            )
        target = hydra.utils.get_object(node._target_)
        parameters = inspect.signature(target).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        unknown = [
            key for key in map(str, node) if not key.startswith("_") and key not in parameters
        ]
        if unknown:
            raise ValueError(
                f"Every key below '{path}' must be an argument of {node._target_}, but {unknown} "
                f"are not. It takes: {', '.join(parameters)}."
            )
    decided = [key for key in ("in_features", "n_classes") if key in config.model]
    if decided:
        raise ValueError(
            f"{decided} of the model follow from the data, but the configuration sets them. "
            "Remove them from 'model'."
        )


def _groups(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The parts that are built; ``plugin=none`` is empty and is not."""
    for name in ("model", "plugin", "data", "module", "trainer", "logger"):
        node = config._get_node(name)
        if isinstance(node, DictConfig) and (node or name != "plugin"):
            yield name, node


def _run_folder(names: DictConfig, seed: int, fold: int, overrides: str) -> str:
    """``model/plugin/data/seed=0,fold=0``, then what else the command line set."""
    own = ",".join(part for part in (f"seed={seed}", f"fold={fold}", overrides) if part)
    return "/".join((names.model, names.plugin, names.data, own))


def _prepare_folder(folder: Path, resolved: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder ready; the result if it holds a complete run of this configuration."""
    file = folder / "config.yaml"
    begun = any((folder / name).exists() for name in (METRICS_FILE, "checkpoints/last.ckpt"))
    if resolved["resume"] and begun:
        earlier: Any = OmegaConf.to_container(OmegaConf.load(file))
        changed = sorted(_flat(earlier).items() ^ _flat(resolved).items())
        if changed:
            raise ValueError(
                f"{folder} holds a run of another configuration; these differ: "
                f"{sorted({key for key, _ in changed})}. Choose another out=..., or resume=false "
                "to replace that run."
            )
        if (folder / METRICS_FILE).exists():
            return read_metrics(folder)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        if not resolved["resume"]:
            for name in (METRICS_FILE, "predictions.csv", "attention.csv"):
                (folder / name).unlink(missing_ok=True)
            for name in ("checkpoints", "logs"):
                shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, OmegaConf.to_yaml(OmegaConf.create(resolved)))
    return None


def _flat(node: Any, path: str = "") -> dict[str, str]:
    if path in _NOT_COMPARED:
        return {}
    if not isinstance(node, dict):
        return {path: repr(node)}
    children = (_flat(child, f"{path}.{name}".lstrip(".")) for name, child in node.items())
    return {key: value for child in children for key, value in child.items()}


def _plugins(config: DictConfig) -> list[Callback]:
    return [hydra.utils.instantiate(config.plugin)] if config.plugin else []


def _monitor(config: DictConfig, folder: Path) -> AttentionMonitor:
    site = config.site
    if isinstance(site, DictConfig):
        site = hydra.utils.instantiate(site)
    # Not strict: a model trains without a plug-in whether or not its attention can be found.
    return AttentionMonitor(site, path=folder / "attention.csv", strict=False)


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
    trainer: Trainer, module: MILModule, data: BagDataModule, checkpoint: str, folder: Path
) -> dict[str, float]:
    """Metrics of the chosen checkpoint on validation and test bags; writes its predictions."""
    metrics: dict[str, float] = {}
    rows: list[tuple[str, Prediction]] = []
    for part, evaluate in (("val", trainer.validate), ("test", trainer.test)):
        metrics |= evaluate(module, datamodule=data, ckpt_path=checkpoint, verbose=False)[0]
        rows += [(part, prediction) for prediction in module.predictions]
    if trainer.is_global_zero:
        _write_predictions(folder / "predictions.csv", rows)
    attention = folder / "attention.csv"
    return metrics | attention_summary(read_attention(attention) if attention.exists() else [])


def _write_predictions(file: Path, rows: list[tuple[str, Prediction]]) -> None:
    n_classes = len(rows[0][1].probabilities)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["bag_id", "label", "split", *(f"prob_{c}" for c in range(n_classes))])
        writer.writerows([row.bag_id, row.label, part, *row.probabilities] for part, row in rows)


@rank_zero_only
def _write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    # Last of all files and in one piece: its presence says that the run is complete.
    _write(folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")


def _write(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


@rank_zero_only
def _log_result(metrics: dict[str, Any]) -> None:
    log.info(
        "%(model)s + %(plugin)s on %(data)s, seed %(seed)s, fold %(fold)s: "
        "test F1 %(test/f1).3f, AUROC %(test/auroc).3f, accuracy %(test/accuracy).3f",
        metrics,
    )
