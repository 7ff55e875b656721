"""The default launcher: a process for each job of a sweep, side by side on one machine."""

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.errors import HydraException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mil_anchor.results import METRICS_FILE, read_metrics
from mil_anchor.run_folder import completed, differing
from mil_anchor.sweep.job_process import JobProcess
from mil_anchor.sweep.jobs import Job, State, SweepTable, begun_job, error_of_shared_folder
from mil_anchor.sweep.progress import is_grid
from mil_anchor.sweep.slots import Need, Slot, need_of, slots_for, usable_cores
from mil_anchor.sweep.task import objective

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
_RECORD_EVERY_S = 10.0
_STOP_WITHIN_S = 30.0


def run_jobs(
    loader: ConfigLoader,
    config: DictConfig,
    *,
    overrides: Sequence[Sequence[str]],
    first: int,
    at_once: int | None = None,
) -> list[JobReturn]:
    """Run the jobs of a sweep, each as a single run in a process of its own.

    A job whose folder holds its complete result is skipped, one that was interrupted goes on, and
    one that fails leaves the others alone; ``sweep.csv`` tells how far each is. Jobs that need the
    same run side by side (`mil_anchor.sweep.slots.slots_for`), those that need something else
    after them.

    Args:
        loader: Composes the jobs' configurations.
        config: That of the sweep.
        overrides: Of each job.
        first: Number of the first job.
        at_once: How many jobs shall run at once; None: as many as the machine has room for.

    Returns:
        For each job its objective. A failed one has None under Hydra's own sweeper, which an
        exception would end, and an exception under a search, which counts failed trials.

    Raises:
        ValueError: ``at_once`` is below 1, or this is one of several processes of a sweep.
        SystemExit: With code 130, after Ctrl-C.
    """
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    if rank != 0:
        raise ValueError(
            "A sweep must be started as one process, which starts those of each job, but this is "
            f"process {rank} of several. Start it without torchrun or srun."
        )
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    numbered = enumerate(overrides, start=first)
    jobs = [_Job(loader, config, list(given), number) for number, given in numbered]
    first_in: dict[Path, _Job] = {}
    for job in jobs:
        if not job.has_ended:
            job.refuse_if_other(first_in.setdefault(job.folder, job))
    waiting = [job for job in jobs if not job.has_ended]
    for need in dict.fromkeys(job.need for job in waiting):
        alike = [job for job in waiting if job.need == need]
        slots = slots_for(
            need,
            n_jobs=len(alike),
            n_gpus=torch.cuda.device_count(),
            n_cores=usable_cores(),
            at_once=at_once,
        )
        log.info("%d of %d jobs to run, %d at once", len(alike), len(jobs), len(slots))
        _run(alike, slots)
    may_raise = not is_grid(config)
    return [job.returned(may_raise=may_raise) for job in jobs]


class _Job:
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

    def refuse_if_other(self, first: "_Job") -> None:
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
        task = deepcopy(config)
        with open_dict(task):
            del task["hydra"]
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


class _Running(NamedTuple):
    job: _Job
    process: JobProcess
    slot: Slot


def _run(jobs: Sequence[_Job], slots: Sequence[Slot]) -> None:
    """Run jobs in these slots until none is left, or until Ctrl-C."""
    waiting, free = list(jobs), list(slots)
    running: list[_Running] = []
    recorded_s = time.monotonic()
    with _collected_interrupts() as interrupts:
        while (waiting or running) and not interrupts:
            _fill(free, waiting, running)
            time.sleep(_LOOK_EVERY_S)
            free += [one.slot for one in _conclude(running)]
            if time.monotonic() - recorded_s > _RECORD_EVERY_S:
                recorded_s = time.monotonic()
                for one in running:
                    one.job.record(State.RUNNING, one.process.seconds)
        if interrupts:
            _stop(running, interrupts)
            raise SystemExit(128 + signal.SIGINT)


def _fill(free: list[Slot], waiting: list[_Job], running: list[_Running]) -> None:
    """Start waiting jobs in free slots."""
    for job in list(waiting):
        if not free:
            return
        if any(job.folder == one.job.folder for one in running):
            continue  # The same run again, as searches ask for: its result will do for both.
        waiting.remove(job)
        job.skip_if_complete()
        if not job.has_ended:
            slot = free.pop(0)
            running.append(_Running(job, job.start(slot), slot))


def _conclude(running: list[_Running]) -> list[_Running]:
    """Take out and record those whose processes have ended."""
    ended = [one for one in running if one.process.has_ended()]
    for one in ended:
        running.remove(one)
        one.job.conclude(one.process)
    return ended


def _stop(running: list[_Running], interrupts: list[int]) -> None:
    """Stop what runs: in good order, but at once at the second Ctrl-C or when it takes long."""
    log.warning("Interrupted. The same command goes on after each job's last whole epoch.")
    for one in running:
        one.process.interrupt()
    deadline_s = time.monotonic() + _STOP_WITHIN_S
    while not all(one.process.has_ended() for one in running):
        if len(interrupts) > 1 or time.monotonic() > deadline_s:
            for one in running:
                one.process.kill()
        time.sleep(_LOOK_EVERY_S)
    for one in running:
        if one.process.error() is None:
            one.job.conclude(one.process)
        else:
            one.job.record(State.INTERRUPTED, one.process.seconds)


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


@contextmanager
def _collected_interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C, which would otherwise break off whatever is being done."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
