"""``sweep.csv``: a row for each job of the sweeps into one folder, true while they run."""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from hydra.conf import HydraConf
from omegaconf import DictConfig

from mil_anchor.run_folder import is_held, write_text

SWEEP_FILE = "sweep.csv"


class State(str, Enum):
    """How far a job is.

    ``skipped`` is one whose result was there before, ``interrupted`` one whose process ended with
    neither a result nor an error: the next sweep continues it.
    """

    RUNNING = "running"
    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Job(NamedTuple):
    """A row of ``sweep.csv``.

    Args:
        folder: Its run folder, relative to that of ``sweep.csv``.
        model: What the configuration names so; likewise ``plugin``, ``data``, ``seed``, ``fold``.
        plugin: See ``model``.
        data: See ``model``.
        seed: See ``model``.
        fold: See ``model``; text where the command gave no number, which fails the job.
        state: How far it is.
        seconds: How long it has run, or ran.
        error: Why it failed, in one line; empty otherwise.
        sweep: The sweep that ran it last: when that began, in ISO form.
    """

    folder: str
    model: str
    plugin: str
    data: str
    seed: int
    fold: int | str
    state: State
    seconds: float
    error: str
    sweep: str


def begun_job(config: DictConfig, hydra: DictConfig | HydraConf) -> Job:
    """The row of a job that begins: running, for no time yet.

    Args:
        config: Of the job, without Hydra's own part.
        hydra: That part, as ``HydraConfig.get()`` gives it.
    """
    return Job(
        folder=str(hydra.sweep.subdir),
        model=config.names.model,
        plugin=config.names.plugin,
        data=config.names.data,
        seed=config.seed,
        fold=_number_or_text(str(config.data.get("fold", ""))),
        state=State.RUNNING,
        seconds=0.0,
        error="",
        sweep=hydra.callbacks["sweep"].started,
    )


def error_of_shared_folder(folder: Path, changed: Sequence[str]) -> ValueError:
    """What a job fails with whose folder is that of another job with another configuration."""
    return ValueError(
        f"Jobs of a sweep must differ in the names of their folders, but another one runs in "
        f"{folder}; these differ: {changed}. Start a sweep for each of their values, with a "
        "names.data=... or out=... of its own."
    )


class SweepTable:
    """The ``sweep.csv`` of a folder; any number of processes may write to it.

    Args:
        out: The folder that holds the run folders.
    """

    def __init__(self, out: Path) -> None:
        self.file = out / SWEEP_FILE

    def record(self, job: Job) -> None:
        """Write the row of a job, in place of what stood there for its folder."""
        with self._changed() as rows:
            rows[job.folder] = job

    def settle(self) -> None:
        """Call interrupted what is said to be running, though no process holds its run folder.

        A sweep that is killed cannot say so itself.
        """
        if not self.file.exists():
            return
        with self._changed() as rows:
            for folder, job in rows.items():
                if job.state is State.RUNNING and not is_held(self.file.parent / folder):
                    rows[folder] = job._replace(state=State.INTERRUPTED)

    def jobs(self, sweep: str | None = None) -> list[Job]:
        """All rows, or those of one sweep."""
        if not self.file.exists():
            return []
        with self.file.open(newline="") as stream:
            rows = [_job(row) for row in csv.DictReader(stream)]
        return [row for row in rows if sweep in (None, row.sweep)]

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Job]]:
        """The rows by folder, to be changed while no other process does."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            rows = {row.folder: row for row in self.jobs()}
            yield rows
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(Job._fields)
            for row in rows.values():
                writer.writerow(_cells(row))
            write_text(self.file, text.getvalue())


def _cells(job: Job) -> list[Any]:
    rounded = job._asdict() | {"state": job.state.value, "seconds": f"{job.seconds:.1f}"}
    return list(rounded.values())


def _job(row: dict[str, Any]) -> Job:
    read = {
        "seed": int(row["seed"]),
        "fold": _number_or_text(row["fold"]),
        "state": State(row["state"]),
        "seconds": float(row["seconds"]),
    }
    return Job(**row | read)


def _number_or_text(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text
