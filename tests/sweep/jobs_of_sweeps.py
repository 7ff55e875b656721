"""Configurations of jobs, composed as a sweep's launcher does, inside the test process."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, read_write

from mil_anchor.sweep.jobs import Job, State
from tests.composing import composed

TINY = (
    "model=abmil",
    "data=musk1",
    "hidden=8",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
)


def composed_job(out: Path, *overrides: str, launcher: str = "basic") -> DictConfig:
    """A tiny job of a sweep into ``out``; HydraConfig says that it is one."""
    arguments = (f"hydra/launcher={launcher}", "hydra.mode=MULTIRUN", f"out={out}", *TINY)
    config = composed(*arguments, *overrides)
    hydra = HydraConfig.get()
    with read_write(hydra):
        hydra.runtime.output_dir = str(out / hydra.sweep.subdir)
    return config


def row(folder: str, state: State, *, seconds: float = 1.0, error: str = "", sweep: str = "now"):
    """A row of ``sweep.csv``."""
    return Job(folder, "abmil", "none", "musk1", 0, 0, state, seconds, error, sweep)
