"""The peak memory of a model's training, each in a fresh process."""

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.models import bag_for, fit_of
from benchmarks.record import be_quiet
from benchmarks.resident import in_fresh_process, peak_growth, return_freed_memory
from mil_anchor import AnchorCallback
from mil_anchor.data.bags import Batch

MB = 1e6
N_STEPS = 2
# Enough to load what a first step loads: kernels, modules.
N_FIRST = 1000
_AT_ONCE = 2


class TrainingRun(NamedTuple):
    """What is trained: a model, on a bag of so many instances, with or without anchor and NSF."""

    model: str
    n_instances: int
    has_plugin: bool


def training_peaks(runs: Sequence[TrainingRun], *, device: str) -> list[float]:
    """Megabytes by which two training steps exceed the loaded bag, each run in a fresh process.

    Gradients and Adam's state are in it, the model's weights too.

    Args:
        runs: What is trained; on a CPU two at a time, which share no memory.
        device: ``"cpu"`` (the growth of the resident set) or ``"cuda"`` (what torch has allocated).
    """
    peak_of = partial(in_fresh_process, _train, device=device)
    # The longest first, so that none is left over at the end.
    order = sorted(range(len(runs)), key=lambda index: -runs[index].n_instances)
    with ThreadPoolExecutor(_AT_ONCE if device == "cpu" else 1) as pool:
        started = {index: pool.submit(peak_of, runs[index]) for index in order}
        return [started[index].result() for index in range(len(runs))]


def _train(run: TrainingRun, *, device: str) -> float:
    name, n_instances, has_plugin = run
    be_quiet()
    torch.set_num_threads(1)
    return_freed_memory()
    _steps(name, bag_for(name, N_FIRST, device=device), has_plugin=has_plugin, device=device)
    batch = bag_for(name, n_instances, device=device)
    work = partial(_steps, name, batch, has_plugin=has_plugin, device=device)
    return (_cuda_growth(work) if device == "cuda" else peak_growth(work)) / MB


def _steps(name: str, batch: Batch, *, has_plugin: bool, device: str) -> None:
    plugin = [AnchorCallback()] if has_plugin else []
    with fit_of(name, batch, callbacks=plugin, device=device) as fit:
        for _ in range(N_STEPS):
            fit.step()


def _cuda_growth(work: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before
