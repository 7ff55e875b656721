import numpy as np
import pytest

from benchmarks.resident import in_fresh_process, peak_growth, return_freed_memory

MB = 10**6


def touch(megabytes):
    np.ones(megabytes * MB, dtype=np.uint8)


def grow(megabytes, earlier=0):
    return_freed_memory()
    touch(earlier)
    return peak_growth(lambda: touch(megabytes))


def fail():
    raise OSError("the work has failed")


def test_peak_growth__64_mb_that_are_freed_again__are_seen():
    assert in_fresh_process(grow, 64) == pytest.approx(64 * MB, rel=0.05)


def test_peak_growth__more_before_it__does_not_count():
    assert in_fresh_process(grow, 64, earlier=256) == pytest.approx(64 * MB, rel=0.05)


def test_in_fresh_process__error__is_raised_here():
    with pytest.raises(OSError, match="the work has failed"):
        in_fresh_process(fail)
