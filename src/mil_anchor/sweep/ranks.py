"""The processes of one job of a sweep: who starts them, and what cannot work."""

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from omegaconf import DictConfig


def in_sweep() -> bool:
    """Whether Hydra runs this configuration as a job of a sweep, inside a process of the sweep."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def check_ranks(trainer: Trainer) -> None:
    """Refuse a job of a sweep that would start processes, or run once in each of several.

    Processes that Lightning starts from inside a sweep run the command of the whole sweep again;
    with a search, the ranks of one job then train different values.

    Raises:
        ValueError: The trainer asks for other processes than the launcher gives the job.
    """
    if not in_sweep():
        return
    n_processes = trainer.num_devices * trainer.num_nodes
    environment = getattr(trainer.strategy, "cluster_environment", None)
    starts_some = environment is None or not environment.creates_processes_externally
    n_tasks = _n_tasks(HydraConfig.get().launcher)
    if n_processes > 1 and starts_some:
        raise ValueError(
            "A job of a sweep must not start processes from inside the sweep's own, but the "
            f"trainer asks for {n_processes}. Leave the jobs to the default launcher "
            "(hydra/launcher=processes), or on a cluster to hydra/launcher=submitit_slurm "
            f"hydra.launcher.tasks_per_node={trainer.num_devices}."
        )
    if n_tasks not in (None, n_processes):
        raise ValueError(
            "The launcher must start as many processes for a job as its trainer asks for, but "
            f"hydra.launcher starts {n_tasks} and the trainer asks for {n_processes}. Set "
            f"hydra.launcher.tasks_per_node={trainer.num_devices} and "
            f"hydra.launcher.nodes={trainer.num_nodes}, or trainer.devices."
        )


def check_tasks(launcher: DictConfig) -> None:
    """Refuse several local processes for a job: they would all run it, unaware of each other.

    Args:
        launcher: Hydra's configuration of it.

    Raises:
        ValueError: ``submitit_local`` is to start more than one.
    """
    is_local = launcher._target_.endswith("submitit_launcher.LocalLauncher")
    if is_local and _n_tasks(launcher) != 1:
        raise ValueError(
            "hydra/launcher=submitit_local must start one process for a job, for it gives them no "
            f"ranks, but hydra.launcher.tasks_per_node={launcher.tasks_per_node}. For jobs of "
            "several processes leave the default launcher (hydra/launcher=processes)."
        )


def _n_tasks(launcher: DictConfig) -> int | None:
    """Processes that submitit starts for a job; None for other launchers."""
    if "tasks_per_node" not in launcher:
        return None
    return int(launcher.tasks_per_node) * int(launcher.nodes)
