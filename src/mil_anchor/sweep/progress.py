"""What a sweep shows while it runs and at its end, whoever runs its jobs."""

import atexit
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from typing_extensions import override

from mil_anchor.sweep.jobs import Job, State, SweepTable
from mil_anchor.sweep.ranks import in_sweep

_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# Their jobs write to the terminal themselves: a bar would be torn.
_LAUNCHERS_THAT_WRITE = ("BasicLauncher", "JoblibLauncher")
_POLL_S = 1.0


class SweepProgress(Callback):
    """Hydra's callback of a sweep: shows how far it is, and at the end a line for each job.

    Ends the process with exit code 1 if a job has failed.

    Args:
        started: When the sweep began, the same text in all its processes: its name in
            ``sweep.csv``.
    """

    def __init__(self, started: str) -> None:
        self.started = started
        self._follower: _Follower | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Launchers send it to the processes of their jobs; the thread stays here.
        return SweepProgress, (self.started,)

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        table = SweepTable(Path(config.hydra.sweep.dir))
        table.settle()
        console = Console()
        writes = config.hydra.launcher._target_.endswith(_LAUNCHERS_THAT_WRITE)
        self._follower = _Follower(
            table,
            sweep=self.started,
            n_jobs=count_jobs(config),
            console=console,
            has_bar=console.is_terminal and not writes,
        )
        self._follower.start()
        # Hydra does not come back here from a launcher's error or from Ctrl-C.
        atexit.register(self._follower.end)

    @override
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # It is in sweep.csv. Hydra's own sweeper would end the sweep, others know failed trials.
        if in_sweep() and job_return.status is JobStatus.FAILED and is_grid(config):
            job_return.status = JobStatus.COMPLETED
            job_return.return_value = None

    @override
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self._follower is not None and self._follower.end():
            raise SystemExit(1)


def is_grid(config: DictConfig) -> bool:
    """Whether Hydra's own sweeper makes the jobs: all combinations of the values."""
    return config.hydra.sweeper._target_ == _BASIC_SWEEPER  # type: ignore[no-any-return]


def count_jobs(config: DictConfig) -> int | None:
    """Jobs of the sweep: all combinations, or a search's trials; None if the sweeper decides."""
    sweeper = config.hydra.sweeper
    if not is_grid(config):
        return sweeper.get("n_trials")  # type: ignore[no-any-return]
    parameters = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*parameters, *config.hydra.overrides.task])
    n_values = {
        override.get_key_element(): len(list(override.sweep_string_iterator()))
        if override.is_discrete_sweep()
        else 1
        for override in overrides
    }
    return math.prod(n_values.values())


def time_left(
    jobs: Sequence[Job], n_jobs: int | None, *, running_s: Sequence[float], n_slots: int
) -> float | None:
    r"""Estimated seconds until a sweep is done, from the jobs that it trained so far.

    .. math:: (\bar t \cdot n_\mathrm{left} - \sum_r \min(t_r, \bar t)) / n_\mathrm{slots}

    with the mean duration of trained jobs and the time that each running one has had.

    Args:
        jobs: Its rows.
        n_jobs: How many there will be.
        running_s: How long each running one has run.
        n_slots: How many run side by side.

    Returns:
        None while nothing is known.

    Example:
        >>> row = dict(folder="", model="", plugin="", data="", seed=0, fold=0, error="", sweep="")
        >>> done = Job(**row, state=State.DONE, seconds=60.0)
        >>> time_left([done, done], 5, running_s=[30.0, 30.0], n_slots=2)
        60.0
    """
    trained = [job.seconds for job in jobs if job.state is State.DONE]
    if n_jobs is None or not trained:
        return None
    mean = sum(trained) / len(trained)
    n_left = max(0, n_jobs - sum(job.state is not State.RUNNING for job in jobs))
    work = mean * n_left - sum(min(seconds, mean) for seconds in running_s)
    return max(0.0, work) / max(1, n_slots)


class _Follower(Thread):
    """Follows the rows of one sweep in ``sweep.csv``."""

    def __init__(
        self, table: SweepTable, *, sweep: str, n_jobs: int | None, console: Console, has_bar: bool
    ) -> None:
        super().__init__(daemon=True)
        self.table = table
        self.sweep = sweep
        self.n_jobs = n_jobs
        self.console = console
        self._bar = _bar(console) if has_bar else None
        self._ended = Event()
        self._shown: set[str] = set()
        self._seen_running: dict[str, float] = {}
        self._n_slots = 1

    @override
    def run(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._look()

    def end(self) -> bool:
        """Show the summary, once; whether a job has failed."""
        if self._ended.is_set():
            return False
        self._ended.set()
        self.join()
        if self._bar is not None:
            self._bar.stop()
        jobs = self.table.jobs(self.sweep)
        for job in jobs:
            self._say(f"{job.state.value:<11} {_described(job)}")
        if jobs:
            counts = Counter(job.state.value for job in jobs)
            counted = ", ".join(f"{number} {state}" for state, number in counts.items())
            missing = (self.n_jobs or 0) - len(jobs)
            rest = f", {missing} not started" if missing > 0 else ""
            self._say(f"{_jobs(len(jobs))}: {counted}{rest}. Table: {self.table.file}")
        return any(job.state in (State.FAILED, State.INTERRUPTED) for job in jobs)

    def _look(self) -> None:
        jobs = self.table.jobs(self.sweep)
        now = time.monotonic()
        running = [job.folder for job in jobs if job.state is State.RUNNING]
        self._seen_running = {folder: self._seen_running.get(folder, now) for folder in running}
        self._n_slots = max(self._n_slots, len(running))
        new = [job for job in jobs if job.folder not in {*self._shown, *running}]
        self._shown |= {job.folder for job in new}
        left_s = time_left(
            jobs,
            self.n_jobs,
            running_s=[now - since for since in self._seen_running.values()],
            n_slots=self._n_slots,
        )
        if self._bar is None:
            self._show_lines(new, rest=_rest(jobs, left_s))
        elif jobs:
            self._show_bar(new, n_finished=len(self._shown), rest=_rest(jobs, left_s))

    def _show_lines(self, new: Sequence[Job], *, rest: str) -> None:
        skipped = [job for job in new if job.state is State.SKIPPED]
        total = "?" if self.n_jobs is None else self.n_jobs
        n_before = len(self._shown) - len(new) + len(skipped)
        if skipped:
            self._say(f"[{n_before}/{total}] {_jobs(len(skipped))} complete already")
        others = [job for job in new if job.state is not State.SKIPPED]
        for number, job in enumerate(others, start=n_before + 1):
            self._say(f"[{number}/{total}{rest}] {job.state.value} {_described(job)}")

    def _show_bar(self, new: Sequence[Job], *, n_finished: int, rest: str) -> None:
        bar = self._bar
        if bar is None:
            return
        if not bar.tasks:
            bar.add_task("jobs", total=self.n_jobs, rest="")
            bar.start()
        for job in new:
            if job.state is State.FAILED:
                self._say(f"{job.state.value} {_described(job)}")
        bar.update(bar.task_ids[0], completed=n_finished, rest=rest.removeprefix(", "))

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rest]}"),
        console=console,
    )


def _jobs(number: int) -> str:
    return f"{number} job{'s' * (number != 1)}"


def _described(job: Job) -> str:
    seconds = f" in {_duration(job.seconds)}" if job.state is State.DONE else ""
    error = f": {job.error}" if job.error else ""
    return f"{job.folder}{seconds}{error}"


def _rest(jobs: Sequence[Job], left_s: float | None) -> str:
    counts = Counter(job.state for job in jobs)
    parts = [
        f", {counts[state]} {state.value}"
        for state in (State.FAILED, State.RUNNING)
        if counts[state]
    ]
    if left_s is not None and left_s >= 1:
        parts.append(f", about {_duration(left_s)} left")
    return "".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
