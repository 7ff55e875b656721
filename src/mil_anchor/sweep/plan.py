"""What a sweep of processes is going to run: its jobs, composed one by one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mil_anchor.results import METRICS_FILE, read_metrics
from mil_anchor.run_folder import completed, differing
from mil_anchor.sweep.job_process import JobProcess
from mil_anchor.sweep.jobs import Job, State, SweepTable, begun_job, error_of_shared_folder
from mil_anchor.sweep.slots import Need, Slot, need_of
from mil_anchor.sweep.task import objective


class Plan:
    """The jobs of a sweep, composed one by one.

    Args:
        loader: Composes the jobs' configurations.
        config: That of the sweep.
        overrides: Of each job.
        first: Number of the first job.

    Attributes:
        jobs: Those composed so far.
        waiting: Those of them that are to be run, by what they need.
    """

    def __init__(
        self,
        loader: ConfigLoader,
        config: DictConfig,
        *,
        overrides: Sequence[Sequence[str]],
        first: int,
    ) -> None:
        self.jobs: list[PlannedJob] = []
        self.waiting: dict[Need, list[PlannedJob]] = {}
        self._loader = loader
        self._config = config
        self._unread = enumerate(overrides, start=first)
        self._first_in: dict[Path, PlannedJob] = {}

    def read_on(self) -> bool:
        """Compose the next job; False if there is none left."""
        for number, overrides in self._unread:
            job = PlannedJob(self._loader, self._config, list(overrides), number)
            self.jobs.append(job)
            if not job.has_ended:
                job.refuse_if_other(self._first_in.setdefault(job.folder, job))
            if not job.has_ended:
                self.waiting.setdefault(job.need, []).append(job)
            return True
        return False

    def next_need(self) -> Need | None:
        """What the next jobs to be run need; None if none is left."""
        while True:
            for need, alike in self.waiting.items():
                if alike:
                    return need
            if not self.read_on():
                return None


class PlannedJob:
    """A job: its row in ``sweep.csv``, its command, and what comes of it."""

    folder: Path
    need: Need

    def __init__(
        self, loader: ConfigLoader, config: DictConfig, overrides: list[str], number: int
    ) -> None:
        self.has_ended = False
        self._overrides = overrides
        self._value: float | None = None
        self._error: Exception | None = None
        self._table = SweepTable(Path(config.hydra.sweep.dir))
        # Until there is a configuration to name it after.
        self._row = Job(
            folder=" ".join(overrides),
            model="",
            plugin="",
            data="",
            seed=0,
            fold="",
            state=State.RUNNING,
            seconds=0.0,
            error="",
            sweep=config.hydra.callbacks.sweep.started,
        )
        try:
            with _as_current(loader.load_sweep_config(config, overrides), number) as own:
                self._read(own)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            self._fail(error)

    def refuse_if_other(self, first: "PlannedJob") -> None:
        """Fail unless this is the run that another job makes in the same folder; or skip."""
        changed = differing(first._resolved, self._resolved)
        if not changed:
            self.skip_if_complete()
            return
        self._row = self._row._replace(folder=" ".join(self._overrides))  # the other keeps its row
        self._fail(error_of_shared_folder(self.folder, changed))

    def skip_if_complete(self) -> None:
        """Look into the folder: is the result there, or another run?"""
        try:
            metrics = completed(self.folder, self._resolved)
        except (ValueError, OSError) as error:
            self._fail(error)
            return
        if metrics is not None:
            self._succeed(State.SKIPPED, metrics)

    def start(self, slot: Slot) -> JobProcess:
        """Start its process."""
        overrides = [*self._command, "++trainer.enable_progress_bar=false"]
        threads = self._resolved["threads"] or slot.threads
        if self._resolved["threads"] is None:
            overrides.append(f"threads={threads}")
        if slot.gpus is not None:
            overrides.append(f"++trainer.devices={slot.gpus}".replace(" ", ""))
        process = JobProcess(overrides, folder=self.folder, threads=threads)
        self.record(State.RUNNING)
        return process

    def record(self, state: State, seconds: float = 0.0, error: str = "") -> None:
        """Write its row."""
        self._table.record(self._row._replace(state=state, seconds=seconds, error=error))

    def conclude(self, process: JobProcess) -> None:
        """Record how its process has ended."""
        error = process.error()
        if error is None and not (self.folder / METRICS_FILE).exists():
            error = f"it ended without {METRICS_FILE}"
        if error is None:
            self._succeed(State.DONE, read_metrics(self.folder), process.seconds)
        else:
            self._fail(RuntimeError(error), process.seconds)

    def returned(self, *, may_raise: bool) -> JobReturn:
        """What the sweeper is told."""
        returned = JobReturn(overrides=self._overrides)
        returned.status = JobStatus.COMPLETED
        returned.return_value = self._value
        if may_raise and self._error is not None:
            returned.status = JobStatus.FAILED
            returned.return_value = self._error
        return returned

    def _read(self, config: DictConfig) -> None:
        hydra = config.hydra
        # Hydra's own half is the larger one: not to be copied.
        task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        self._row = begun_job(task, hydra)
        self._table = SweepTable(Path(hydra.sweep.dir))
        self.folder = (Path(hydra.sweep.dir) / str(hydra.sweep.subdir)).absolute()
        self._resolved: dict[str, Any] = OmegaConf.to_container(task, resolve=True)  # type: ignore[assignment]
        self.need = need_of(self._resolved["trainer"], torch.cuda.device_count())
        of_hydra = [own for own in hydra.overrides.hydra if not own.startswith("hydra.mode=")]
        self._command = [*of_hydra, *hydra.overrides.task, f"hydra.job.num={hydra.job.num}"]

    def _succeed(self, state: State, metrics: dict[str, Any], seconds: float = 0.0) -> None:
        self.has_ended = True
        self._value = objective(metrics)
        self.record(state, seconds)

    def _fail(self, error: Exception, seconds: float = 0.0) -> None:
        self.has_ended = True
        self._error = error
        # Hydra leaves what OmegaConf says to the cause of an exception without words.
        told = error if str(error) else error.__cause__ or error
        self.record(State.FAILED, seconds, " ".join(str(told).split()))


@contextmanager
def _as_current(config: DictConfig, number: int) -> Iterator[DictConfig]:
    """Let resolvers see a job's configuration as Hydra's."""
    current = HydraConfig.instance()
    before = current.cfg
    with open_dict(config):
        config.hydra.job.id = str(number)
        config.hydra.job.num = number
    current.set_config(config)
    try:
        yield config
    finally:
        current.cfg = before
