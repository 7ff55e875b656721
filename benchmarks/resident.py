"""The largest resident set of some work, in a fresh process."""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_RETURN_ABOVE = 64 * 1024
_Result = TypeVar("_Result")


def in_fresh_process(work: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """What a function returns in a process that has imported its module, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    # The server imports it once, for all processes that fork from it.
    context.set_forkserver_preload([work.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(partial(work, *args, **kwargs)).result()


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident set is larger at its peak during the work than before it.

    The kernel keeps the peak, so that nothing between two samples is missed, and forgets it on
    request: what the process took earlier, while it read its bag say, does not count.
    """
    gc.collect()
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _kilobytes("VmRSS")
    work()
    return 1024 * (_kilobytes("VmHWM") - before)


def return_freed_memory() -> None:
    """Let malloc give freed tensors back at once, so that the resident set is what is in use."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _RETURN_ABOVE)
    mallopt(_M_TRIM_THRESHOLD, _RETURN_ABOVE)


def _kilobytes(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])
