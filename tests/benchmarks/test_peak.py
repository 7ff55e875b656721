import pytest

from benchmarks.peak import TrainingRun, training_peaks


@pytest.mark.slow
def test_training_peaks__ten_times_the_bag__takes_more():
    runs = [TrainingRun("DSMIL 1024", n, has_plugin=True) for n in (1000, 10_000)]
    small, large = training_peaks(runs, device="cpu")
    assert 0 < 3 * small < large
