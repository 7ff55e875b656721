"""Loggers of a run: continued where the run is, finished however it ends, given its results."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from filelock import FileLock
from jaxtyping import UInt8
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from mil_anchor.results import Run
from mil_anchor.run_folder import write_text

LOGGERS_FILE = "loggers.json"
# The package of each, and the extra of mil_anchor that brings it.
_PACKAGES = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
_Image = UInt8[np.ndarray, "row column 3"]


@contextmanager
def opened_loggers(
    config: DictConfig, folder: Path, *, settings: Mapping[str, Any]
) -> Iterator[list[Logger]]:
    """The loggers that a configuration names; they are finished when the block ends.

    A run that goes on from a checkpoint goes on in its runs at W&B and MLflow, whose ids are kept
    in ``loggers.json``; any other begins new ones. What ends with an exception is marked there as
    failed, and in MLflow a killed run as killed when its folder is begun anew.

    Args:
        config: The composed configuration.
        folder: The run folder.
        settings: The resolved configuration, which becomes the loggers' hyper-parameters.

    Raises:
        ModuleNotFoundError: The package of a logger is not installed.
    """
    nodes = {name: config.logger._get_node(name) for name in config.logger}
    for name, node in nodes.items():
        _check_package(name, node)
    file = folder / LOGGERS_FILE
    ids: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    is_continued = (folder / "checkpoints" / "last.ckpt").exists()
    loggers: list[Logger] = []
    with ExitStack() as stack:
        for name, node in nodes.items():
            with _alone(Path(config.out)) if _kind(node) == "MLFlowLogger" else nullcontext():
                logger = _begin(node, ids.get(name), is_continued=is_continued, settings=settings)
            loggers.append(logger)
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                stack.push(partial(_finish, logger))
                if isinstance(logger, WandbLogger | MLFlowLogger):
                    ids[name] = str(logger.version)
                    write_text(file, json.dumps(ids) + "\n")
        yield loggers


@rank_zero_only
def log_result(
    loggers: Sequence[Logger], folder: Path, metrics: Mapping[str, Any], *, step: int
) -> None:
    """Give loggers what ``metrics.json`` will hold as the run's summary, and its images.

    These are the JSD and the concentration of attention by epoch, and the heat maps that the run
    has drawn. Without matplotlib there are none.

    Args:
        loggers: Those of the run.
        folder: The run folder.
        metrics: What ``metrics.json`` will hold.
        step: The number of training steps.
    """
    numbers = {key: value for key, value in metrics.items() if not isinstance(value, str)}
    takes_images = any(type(logger).__name__ in _PACKAGES for logger in loggers)
    images = _images(folder, metrics) if takes_images else {}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(logger.hparams, metrics=numbers, step=step)
            for name, image in images.items():
                logger.experiment.add_image(name, image, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.experiment.summary.update(dict(metrics))
            for name, image in images.items():
                logger.log_image(name, [image])
        elif isinstance(logger, MLFlowLogger):
            logger.log_metrics(numbers, step)
            for key in metrics.keys() - numbers.keys():
                logger.experiment.set_tag(logger.run_id, key, metrics[key])
            for name, image in images.items():
                logger.experiment.log_image(logger.run_id, image, f"{name}.png")


def _kind(node: DictConfig) -> str:
    return str(node._target_).rpartition(".")[2]


def _check_package(name: str, node: DictConfig) -> None:
    package = _PACKAGES.get(_kind(node))
    if package is not None and find_spec(package) is None:
        raise ModuleNotFoundError(
            f"logger={name} needs the package {package}, which is not installed. "
            f"Run: pip install 'mil_anchor[{package}]'"
        )


def _alone(out: Path) -> FileLock:
    """Keep the jobs of a sweep from making MLflow's tables at once, which breaks these."""
    out.mkdir(parents=True, exist_ok=True)
    return FileLock(out / ".mlflow.lock")


def _begin(
    node: DictConfig, known: str | None, *, is_continued: bool, settings: Mapping[str, Any]
) -> Logger:
    """Build a logger and begin its run, or go on with the known one."""
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        logger: Logger = hydra.utils.instantiate(node)
        return logger
    if _kind(node) == "MLFlowLogger":
        return _begin_mlflow(node, known, is_continued=is_continued, settings=settings)
    if _kind(node) == "WandbLogger":
        logger = _begin_wandb(node, known if is_continued else None)
    else:
        logger = hydra.utils.instantiate(node)
    logger.log_hyperparams(dict(settings))
    return logger


def _begin_wandb(node: DictConfig, known: str | None) -> WandbLogger:
    known_id: dict[str, Any] = {} if known is None else {"id": known}
    logger: WandbLogger = hydra.utils.instantiate(node, **known_id)
    if logger.save_dir is not None:
        Path(logger.save_dir).mkdir(parents=True, exist_ok=True)
    # Lightning sets "offline" there, where later jobs of this process would find it.
    before = os.environ.get("WANDB_MODE")
    _ = logger.experiment
    os.environ.pop("WANDB_MODE", None)
    if before is not None:
        os.environ["WANDB_MODE"] = before
    return logger


def _begin_mlflow(
    node: DictConfig, known: str | None, *, is_continued: bool, settings: Mapping[str, Any]
) -> MLFlowLogger:
    from mlflow import MlflowClient

    client = MlflowClient(node.tracking_uri)
    earlier = None if known is None else _find(client, known)
    if earlier is not None and is_continued:
        # Its parameters stay: MLflow lets nobody change them.
        client.update_run(earlier.info.run_id, status="RUNNING")
        logger: MLFlowLogger = hydra.utils.instantiate(node, run_id=earlier.info.run_id)
        return logger
    if earlier is not None and earlier.info.status == "RUNNING":
        client.set_terminated(earlier.info.run_id, "KILLED")
    logger = hydra.utils.instantiate(node)
    logger.log_hyperparams(dict(settings))
    return logger


def _find(client: Any, run_id: str) -> Any:
    """A run of MLflow, or None if its store does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _finish(logger: Logger, kind: type[BaseException] | None, *_: object) -> None:
    """Finish a logger's run as what it is, whatever an earlier stage has called it."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=0 if kind is None else 1)
    else:
        logger.finalize("success" if kind is None else "failed")


def _images(folder: Path, metrics: Mapping[str, Any]) -> dict[str, _Image]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        from mil_anchor.figures import concentration_figure, jsd_figure
    except ModuleNotFoundError:
        return {}
    images = {}
    run = Run(folder, dict(metrics))
    for name, draw in (("jsd", jsd_figure), ("concentration", concentration_figure)):
        try:
            canvas = FigureCanvasAgg(draw([run]))
        except ValueError:  # nothing is known of its attention
            continue
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.array(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
        images[f"attention/{name}"] = pixels[..., :3]
    for file in sorted((folder / "heatmaps").glob("*.png")):
        images[f"heatmaps/{file.stem}"] = np.array(Image.open(file).convert("RGB"))
    return images
