"""The default launcher: a process for each job of a sweep, side by side on one machine."""

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, configure_log, setup_globals
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from mil_anchor.sweep.job_process import JobProcess
from mil_anchor.sweep.jobs import State
from mil_anchor.sweep.plan import Plan, PlannedJob
from mil_anchor.sweep.progress import is_grid
from mil_anchor.sweep.slots import Slot, slots_for, usable_cores

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
    plan = Plan(loader, config, overrides=overrides, first=first)
    while (need := plan.next_need()) is not None:
        share = partial(slots_for, need, n_gpus=torch.cuda.device_count(), n_cores=usable_cores())
        alike = plan.waiting[need]
        # Hydra takes a while to compose a job: the first ones start when each slot has one.
        n_wanted = len(share(n_jobs=len(overrides), at_once=at_once))
        while len(alike) < n_wanted and plan.read_on():
            pass
        slots = share(n_jobs=len(alike), at_once=at_once)
        log.info("%d jobs, %d at once", len(overrides), len(slots))
        _run(alike, slots, plan)
    may_raise = not is_grid(config)
    return [job.returned(may_raise=may_raise) for job in plan.jobs]


class _Running(NamedTuple):
    job: PlannedJob
    process: JobProcess
    slot: Slot


def _run(waiting: list[PlannedJob], slots: Sequence[Slot], plan: Plan) -> None:
    """Run jobs in these slots, reading the plan to its end, until none waits, or until Ctrl-C."""
    free = list(slots)
    running: list[_Running] = []
    recorded_s = time.monotonic()
    with _collected_interrupts() as interrupts:
        while (waiting or running or plan.read_on()) and not interrupts:
            _fill(free, waiting, running)
            if not plan.read_on():
                time.sleep(_LOOK_EVERY_S)
            free += [one.slot for one in _conclude(running)]
            if time.monotonic() - recorded_s > _RECORD_EVERY_S:
                recorded_s = time.monotonic()
                for one in running:
                    one.job.record(State.RUNNING, one.process.seconds)
        if interrupts:
            _stop(running, interrupts)
            raise SystemExit(128 + signal.SIGINT)


def _fill(free: list[Slot], waiting: list[PlannedJob], running: list[_Running]) -> None:
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
def _collected_interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C, which would otherwise break off whatever is being done."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
