"""``sweep.csv``: a row for each job of the sweeps into one folder, true while they run."""

import csv
import io
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from mil_anchor.run_folder import write_text

SWEEP_FILE = "sweep.csv"


class State(str, Enum):
    """How far a job is; ``skipped`` is one whose result was there before."""

    RUNNING = "running"
    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"


class Job(NamedTuple):
    """A row of ``sweep.csv``.

    Args:
        folder: Its run folder, relative to that of ``sweep.csv``.
        model: What the configuration names so; likewise ``plugin``, ``data``, ``seed``, ``fold``.
        plugin: See ``model``.
        data: See ``model``.
        seed: See ``model``.
        fold: See ``model``.
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
    fold: int
    state: State
    seconds: float
    error: str
    sweep: str


class SweepTable:
    """The ``sweep.csv`` of a folder; any number of processes may write to it.

    Args:
        out: The folder that holds the run folders.
    """

    def __init__(self, out: Path) -> None:
        self.file = out / SWEEP_FILE

    def record(self, job: Job) -> None:
        """Write the row of a job, in place of what stood there for its folder."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            rows = {row.folder: row for row in self.jobs()} | {job.folder: job}
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(Job._fields)
            for row in rows.values():
                writer.writerow(_cells(row))
            write_text(self.file, text.getvalue())

    def jobs(self, sweep: str | None = None) -> list[Job]:
        """All rows, or those of one sweep."""
        if not self.file.exists():
            return []
        with self.file.open(newline="") as stream:
            rows = [_job(row) for row in csv.DictReader(stream)]
        return [row for row in rows if sweep in (None, row.sweep)]


def _cells(job: Job) -> list[Any]:
    rounded = job._asdict() | {"state": job.state.value, "seconds": f"{job.seconds:.1f}"}
    return list(rounded.values())


def _job(row: dict[str, Any]) -> Job:
    for key, kind in (("seed", int), ("fold", int), ("state", State), ("seconds", float)):
        row[key] = kind(row[key])
    return Job(**row)
