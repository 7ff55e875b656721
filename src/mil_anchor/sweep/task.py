"""One job of Hydra: a run, and in a sweep its row in ``sweep.csv``."""

import gc
import logging
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from mil_anchor.experiment import run
from mil_anchor.failure import in_one_line
from mil_anchor.run_folder import CONFIG_FILE, completed, differing, read_config
from mil_anchor.sweep.jobs import State, SweepTable, begun_job, error_of_shared_folder
from mil_anchor.sweep.ranks import check_tasks, in_sweep

log = logging.getLogger(__name__)


def task(config: DictConfig) -> float | None:
    """Run one experiment for Hydra, alone or as a job of a sweep inside this process.

    A job of a sweep has its row in ``sweep.csv``, is skipped where its result is there, and leaves
    nothing behind in the process for the next one.

    Returns:
        Its objective.

    Raises:
        ValueError: See :func:`mil_anchor.experiment.run`.
    """
    # Raised inside Lightning for every batch that it moves; nothing a user can change.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    if not in_sweep():
        return objective(run(config))
    with _process_as_found():
        return _recorded(config)


def objective(metrics: dict[str, Any]) -> float | None:
    """What a search maximises: the validation score by which a run chooses its checkpoint.

    Args:
        metrics: What ``metrics.json`` holds.

    Returns:
        AUROC + F1, less a share of the loss below 1e-4; None where the validation bags define
        none, which Optuna counts as a failed trial (a NaN would end its search).
    """
    value = metrics.get("val/selection")
    return None if value is None else float(value)


def _recorded(config: DictConfig) -> float | None:
    hydra = HydraConfig.get()
    # hydra.job.chdir=true has changed to the run folder.
    table = SweepTable(Path(hydra.runtime.cwd, hydra.sweep.dir))
    row = begun_job(config, hydra)
    start_s = time.monotonic()

    @rank_zero_only
    def record(state: State, error: str = "") -> None:
        seconds = time.monotonic() - start_s
        table.record(row._replace(state=state, seconds=seconds, error=error))

    try:
        check_tasks(hydra.launcher)
        resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        folder = Path(hydra.runtime.output_dir)
        of_sweep = {job.folder for job in table.jobs(row.sweep)}
        if row.folder in of_sweep and (folder / CONFIG_FILE).exists():
            changed = differing(read_config(folder), resolved)
            if changed:
                row = row._replace(folder=" ".join(hydra.overrides.task))  # the other keeps its row
                raise error_of_shared_folder(folder, changed)
        metrics = completed(folder, resolved)
        if metrics is not None:
            record(State.SKIPPED)
            return objective(metrics)
        record(State.RUNNING)
        result = objective(run(config))
    except (KeyboardInterrupt, SystemExit):
        record(State.INTERRUPTED)
        raise
    except Exception as error:
        record(State.FAILED, in_one_line(error))
        # Hydra keeps the error, and its frames would keep the model.
        traceback.clear_frames(error.__traceback__)
        raise
    record(State.DONE)
    return result


@contextmanager
def _process_as_found() -> Iterator[None]:
    """Take back what Lightning sets for a whole process: the next job may not set it."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmarks = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=only_warns)
        torch.backends.cudnn.benchmark = benchmarks
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Also lets the other ranks of a job know that this one has failed.
            torch.distributed.destroy_process_group()
        # The trainer and its model refer to each other.
        gc.collect()
        torch.cuda.empty_cache()
