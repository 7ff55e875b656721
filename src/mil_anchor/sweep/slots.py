"""What of a machine each job of a sweep gets: its GPUs, its share of the cores."""

import os
from enum import Enum
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from mil_anchor.sweep.ranks import in_sweep

_GPU_NAMES = ("gpu", "cuda")


class Resource(Enum):
    """What bounds the number of jobs side by side."""

    GPUS = "gpus"
    CORES = "cores"
    MACHINE = "machine"


class Need(NamedTuple):
    """What a job's trainer asks for.

    Args:
        resource: ``MACHINE`` where the configuration itself says which devices (a list), or asks
            for an accelerator that is not shared out here.
        n_processes: Of one job; each has a device of its own.
    """

    resource: Resource
    n_processes: int


class Slot(NamedTuple):
    """A place where one job at a time runs.

    Args:
        gpus: Indices for ``trainer.devices``; None leaves that as it is configured.
        threads: Of each process of the job.
    """

    gpus: list[int] | None
    threads: int


def register_resolvers() -> None:
    """Let configurations say ``${gpu_for:}``; before ``hydra.main``."""
    OmegaConf.register_new_resolver("gpu_for", gpu_for, replace=True)


def need_of(trainer: dict[str, Any], n_gpus: int) -> Need:
    """What a job with this configuration of its trainer asks for.

    Args:
        trainer: ``accelerator``, ``devices`` and ``num_nodes`` as Lightning's Trainer takes them.
        n_gpus: CUDA devices of this machine.

    Raises:
        ValueError: The job is to run on more than one machine.
    """
    n_nodes = trainer.get("num_nodes", 1)
    if n_nodes != 1:
        raise ValueError(
            f"Jobs of hydra/launcher=processes run on one machine, but trainer.num_nodes is "
            f"{n_nodes}. Choose hydra/launcher=submitit_slurm."
        )
    accelerator = trainer.get("accelerator", "auto")
    devices = trainer.get("devices", "auto")
    on_gpus = n_gpus > 0 and accelerator in (*_GPU_NAMES, "auto")
    if isinstance(devices, list):
        return Need(Resource.MACHINE, max(1, len(devices)))
    if str(devices) in ("auto", "-1"):
        devices = n_gpus if on_gpus else 1
    if isinstance(devices, str) and not devices.isdecimal():  # "0,2"
        return Need(Resource.MACHINE, len(devices.strip(",").split(",")))
    if devices is None or int(devices) < 1:  # Lightning takes none of these: the job will say so
        return Need(Resource.MACHINE, 1)
    if on_gpus:
        return Need(Resource.GPUS, int(devices))
    on_cores = accelerator in ("cpu", "auto")
    return Need(Resource.CORES if on_cores else Resource.MACHINE, int(devices))


def slots_for(
    need: Need, *, n_jobs: int, n_gpus: int, n_cores: int, at_once: int | None = None
) -> list[Slot]:
    """Share the machine out among jobs of equal needs.

    As many jobs run at once as there are groups of GPUs or of cores for, at most ``n_jobs``; the
    cores are divided among all their processes. More slots than groups of GPUs share these.

    Args:
        need: Of each job.
        n_jobs: That are to be run.
        n_gpus: CUDA devices of this machine.
        n_cores: That this process may use.
        at_once: How many jobs shall run at once; None: as said.

    Raises:
        ValueError: ``at_once`` is no number from 1.

    Example:
        >>> slots_for(Need(Resource.GPUS, 1), n_jobs=9, n_gpus=2, n_cores=8)
        [Slot(gpus=[0], threads=4), Slot(gpus=[1], threads=4)]
        >>> slots_for(Need(Resource.CORES, 2), n_jobs=9, n_gpus=0, n_cores=8, at_once=1)
        [Slot(gpus=None, threads=4)]
    """
    if at_once is not None and at_once < 1:
        raise ValueError(
            f"hydra.launcher.slots must be a number of jobs from 1, or null, but got {at_once}."
        )
    groups: list[list[int] | None] = [None]
    if need.resource is Resource.CORES:
        groups *= max(1, n_cores // need.n_processes)
    elif need.resource is Resource.GPUS and need.n_processes < n_gpus:
        starts = range(0, n_gpus - need.n_processes + 1, need.n_processes)
        groups = [list(range(start, start + need.n_processes)) for start in starts]
    n_slots = min(at_once or len(groups), n_jobs)
    threads = max(1, n_cores // (n_slots * need.n_processes))
    return [Slot(groups[index % len(groups)], threads) for index in range(n_slots)]


def usable_cores() -> int:
    """Cores that this process may run on: those of its affinity where the system knows one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_for(n_gpus: int | None = None) -> int | list[int]:
    """The resolver ``${gpu_for:}``, a value for ``trainer.devices``: one GPU for each job.

    Under a launcher that leaves the choice to its jobs (basic, joblib, submitit_local) job i of a
    sweep gets GPU i modulo their number; otherwise any one will do: 1.

    Args:
        n_gpus: How many there are to be dealt; None: those of this machine.
    """
    if _launcher() not in ("BasicLauncher", "JoblibLauncher", "LocalLauncher"):
        return 1
    if n_gpus is None:
        n_gpus = torch.cuda.device_count()
    return [HydraConfig.get().job.num % n_gpus] if n_gpus else 1


def thread_share() -> int | None:
    """CPU threads that a job of the running sweep should use; None: as many as torch takes.

    Under joblib the cores are divided among its workers; submitit's jobs have what they asked for
    (``cpus_per_task``). The launcher ``processes`` tells its jobs (``threads=...``).
    """
    launcher = _launcher()
    if launcher == "JoblibLauncher":
        n_cores = usable_cores()
        n_jobs: int = HydraConfig.get().launcher.n_jobs
        if n_jobs < 0:  # joblib: -1 is as many as there are cores, -2 one less, ...
            n_jobs = max(1, n_cores + 1 + n_jobs)
        return max(1, n_cores // n_jobs)
    if launcher in ("LocalLauncher", "SlurmLauncher"):
        share: int | None = HydraConfig.get().launcher.cpus_per_task
        return share or 1  # SLURM gives one, and submitit_local starts all jobs at once
    return None


def _launcher() -> str | None:
    """The class of the launcher that runs this job; None outside a sweep."""
    if not HydraConfig.initialized() or not in_sweep():
        return None
    target: str = HydraConfig.get().launcher._target_
    return target.rpartition(".")[2]
