import pytest

import benchmarks.peak
from benchmarks.peak import TrainingRun, training_peaks


@pytest.mark.slow
def test_training_peaks__ten_times_the_bag__takes_more():
    runs = [TrainingRun("DSMIL 1024", n, has_plugin=True) for n in (1000, 10_000)]
    small, large = training_peaks(runs, device="cpu")
    assert 0 < 3 * small < large


def test_training_peaks__larger_bag_last__starts_first_and_is_told_last(monkeypatch):
    started = []

    def size(_, run, **__):
        started.append(run.n_instances)
        return run.n_instances

    monkeypatch.setattr(benchmarks.peak, "in_fresh_process", size)
    monkeypatch.setattr(benchmarks.peak, "_AT_ONCE", 1)
    runs = [TrainingRun("DSMIL 1024", n, has_plugin=True) for n in (30, 10, 20)]

    assert training_peaks(runs, device="cpu") == [30, 10, 20]
    assert started == [30, 20, 10]
