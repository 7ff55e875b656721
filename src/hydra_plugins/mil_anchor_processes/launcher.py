"""``hydra/launcher=processes``: every job of a sweep in a process of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from typing_extensions import override


@dataclass
class ProcessesConfig:
    """Options of the launcher.

    Args:
        slots: How many jobs run at once; null: as many as the machine has GPUs or cores for.
    """

    _target_: str = "hydra_plugins.mil_anchor_processes.launcher.ProcessesLauncher"
    slots: int | None = None


ConfigStore.instance().store(
    group="hydra/launcher", name="processes", node=ProcessesConfig, provider="mil_anchor"
)


class ProcessesLauncher(Launcher):
    """Starts jobs as single runs, side by side on one machine: `mil_anchor.sweep.processes`.

    Args:
        slots: See `ProcessesConfig`.
    """

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots

    @override
    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.config = config

    @override
    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        # Hydra imports all launchers whenever it starts, whichever is used: that must be quick.
        from mil_anchor.sweep.processes import run_jobs

        return run_jobs(
            self.hydra_context.config_loader,
            self.config,
            overrides=job_overrides,
            first=initial_job_idx,
            at_once=self.slots,
        )
