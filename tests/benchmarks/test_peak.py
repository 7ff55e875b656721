import pytest

from benchmarks.peak import training_peak


@pytest.mark.slow
def test_training_peak__ten_times_the_bag__takes_more():
    small, large = (
        training_peak("DSMIL 1024", n_instances, has_plugin=True, device="cpu")
        for n_instances in (1000, 10_000)
    )
    assert 0 < 3 * small < large
