import os

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import open_dict

from mil_anchor.experiment import register_config
from mil_anchor.sweep.slots import (
    Need,
    Resource,
    Slot,
    gpu_for,
    need_of,
    slots_for,
    thread_share,
    usable_cores,
)
from tests.composing import ROOT

GPUS, CORES, MACHINE = Resource.GPUS, Resource.CORES, Resource.MACHINE


@pytest.mark.parametrize(
    ("trainer", "n_gpus", "need"),
    [
        ({"accelerator": "cpu", "devices": 1}, 4, Need(CORES, 1)),
        ({"accelerator": "cpu", "devices": 2}, 4, Need(CORES, 2)),
        ({"accelerator": "cpu", "devices": "auto"}, 4, Need(CORES, 1)),
        ({"accelerator": "gpu", "devices": 1}, 4, Need(GPUS, 1)),
        ({"accelerator": "cuda", "devices": "2"}, 4, Need(GPUS, 2)),
        ({"accelerator": "gpu", "devices": -1}, 4, Need(GPUS, 4)),
        ({"accelerator": "auto", "devices": 1}, 4, Need(GPUS, 1)),
        ({"accelerator": "auto", "devices": 1}, 0, Need(CORES, 1)),
        ({}, 4, Need(GPUS, 4)),
        ({}, 0, Need(CORES, 1)),
        # The configuration says which, ...
        ({"accelerator": "gpu", "devices": [1, 3]}, 4, Need(MACHINE, 2)),
        ({"accelerator": "gpu", "devices": "1,3"}, 4, Need(MACHINE, 2)),
        ({"accelerator": "gpu", "devices": "2,"}, 4, Need(MACHINE, 1)),
        # ... or asks for what is not there, or not shared out: the job itself will say so.
        ({"accelerator": "gpu", "devices": 1}, 0, Need(MACHINE, 1)),
        ({"accelerator": "mps", "devices": 1}, 4, Need(MACHINE, 1)),
        ({"accelerator": "cpu", "devices": 0}, 4, Need(MACHINE, 1)),
        ({"accelerator": "gpu", "devices": -2}, 4, Need(MACHINE, 1)),
        ({"accelerator": "cpu", "devices": None}, 4, Need(MACHINE, 1)),
        ({"accelerator": "gpu", "devices": []}, 4, Need(MACHINE, 1)),
    ],
)
def test_need_of__trainer__is_what_lightning_would_take(trainer, n_gpus, need):
    assert need_of(trainer, n_gpus) == need


def test_need_of__several_machines__is_refused():
    with pytest.raises(ValueError, match=r"num_nodes is 2\. Choose hydra/launcher=submitit_slurm"):
        need_of({"num_nodes": 2}, 0)


@pytest.mark.parametrize(
    ("need", "n_jobs", "n_gpus", "n_cores", "at_once", "slots"),
    [
        (Need(CORES, 1), 9, 0, 4, None, [Slot(None, 1)] * 4),
        (Need(CORES, 1), 2, 0, 8, None, [Slot(None, 4)] * 2),
        (Need(CORES, 1), 9, 0, 8, 3, [Slot(None, 2)] * 3),
        (Need(CORES, 2), 9, 4, 4, None, [Slot(None, 1)] * 2),
        (Need(CORES, 4), 9, 0, 2, None, [Slot(None, 1)]),
        (Need(CORES, 1), 9, 0, 2, 4, [Slot(None, 1), Slot(None, 1)] * 2),
        (Need(GPUS, 1), 9, 2, 8, None, [Slot([0], 4), Slot([1], 4)]),
        (Need(GPUS, 2), 9, 5, 8, None, [Slot([0, 1], 2), Slot([2, 3], 2)]),
        (Need(GPUS, 1), 9, 2, 8, 4, [Slot([0], 2), Slot([1], 2)] * 2),
        # All GPUs, or more than there are: as it is configured.
        (Need(GPUS, 1), 9, 1, 8, None, [Slot(None, 8)]),
        (Need(GPUS, 2), 9, 2, 8, None, [Slot(None, 4)]),
        (Need(GPUS, 4), 9, 2, 8, None, [Slot(None, 2)]),
        (Need(MACHINE, 2), 9, 4, 8, None, [Slot(None, 4)]),
        (Need(MACHINE, 2), 9, 4, 8, 2, [Slot(None, 2)] * 2),
    ],
)
def test_slots_for__machine__is_shared_out(need, n_jobs, n_gpus, n_cores, at_once, slots):
    found = slots_for(need, n_jobs=n_jobs, n_gpus=n_gpus, n_cores=n_cores, at_once=at_once)

    assert found == slots


@given(
    need=st.builds(Need, st.sampled_from(Resource), st.integers(1, 5)),
    n_jobs=st.integers(1, 20),
    n_gpus=st.integers(0, 9),
    n_cores=st.integers(1, 20),
)
@settings(derandomize=True, deadline=None)
def test_slots_for__any_machine__nothing_is_given_twice(need, n_jobs, n_gpus, n_cores):
    slots = slots_for(need, n_jobs=n_jobs, n_gpus=n_gpus, n_cores=n_cores)

    assert 1 <= len(slots) <= n_jobs
    gpus = [gpu for slot in slots for gpu in slot.gpus or ()]
    assert len(set(gpus)) == len(gpus)
    assert all(0 <= gpu < n_gpus for gpu in gpus)
    assert {len(slot.gpus) for slot in slots if slot.gpus} <= {need.n_processes}
    n_threads = sum(slot.threads for slot in slots) * need.n_processes
    assert n_threads <= n_cores or {slot.threads for slot in slots} == {1}


def test_slots_for__no_slot__is_refused():
    with pytest.raises(ValueError, match=r"slots must be a number of jobs from 1, .* got 0"):
        slots_for(Need(CORES, 1), n_jobs=1, n_gpus=0, n_cores=1, at_once=0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_usable_cores__process_bound_to_one__is_one():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)


@pytest.fixture
def job(monkeypatch):
    """Makes a job of a sweep Hydra's current one, on a machine with GPUs."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def make(*overrides, number=0, n_gpus=0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        register_config()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", list(overrides), return_hydra_config=True)
        with open_dict(config.hydra):
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        return config

    return make


@pytest.mark.parametrize(
    ("launcher", "devices"),
    [
        ("basic", [2]),
        ("joblib", [2]),
        ("submitit_local", [2]),
        ("submitit_slurm", 1),  # those that SLURM gives the job are all that it sees
        ("processes", 1),  # which, the launcher says
    ],
)
def test_gpu_for__job_of_a_sweep__gets_its_own(job, launcher, devices):
    sweep = ("trainer=gpu", f"hydra/launcher={launcher}", "hydra.mode=MULTIRUN")

    assert job(*sweep, number=5, n_gpus=3).trainer.devices == devices
    assert job(*sweep, number=5, n_gpus=0).trainer.devices == 1
    all_gpus = job(*sweep, "trainer=ddp", number=5, n_gpus=3)
    assert all_gpus.trainer.devices == -1


def test_gpu_for__number_of_gpus_given__deals_those(job):
    sweep = ("hydra/launcher=joblib", "hydra.mode=MULTIRUN")

    config = job(*sweep, "trainer.devices='${gpu_for:2}'", number=5, n_gpus=3)

    assert config.trainer.devices == [1]


def test_gpu_for__single_run__is_any_one(job):
    assert job("trainer=gpu", "hydra/launcher=joblib", number=2, n_gpus=4).trainer.devices == 1


def test_gpu_for__outside_hydra__is_any_one(monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    assert gpu_for() == 1


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        (("hydra/launcher=joblib",), 1),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=3"), 2),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=-6"), 2),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=99"), 1),
        (("hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=5"), 5),
        (("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=5"), 5),
        (("hydra/launcher=submitit_slurm",), 1),
        (("hydra/launcher=basic",), None),
        (("hydra/launcher=processes",), None),
    ],
)
def test_thread_share__launcher__divides_the_cores(job, monkeypatch, overrides, share):
    monkeypatch.setattr("mil_anchor.sweep.slots.usable_cores", lambda: 8)

    job(*overrides, "hydra.mode=MULTIRUN")
    assert thread_share() == share

    job(*overrides)  # alone
    assert thread_share() is None
