import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mil_anchor.results import read_runs
from mil_anchor.sweep.jobs import State, SweepTable
from tests.composing import ROOT
from tests.sweep.jobs_of_sweeps import TINY
from tests.sweep.test_ranks import TWO_PROCESSES

pytestmark = pytest.mark.slow
FOLDER = "abmil/none/musk1/seed={},fold=0,hidden=8,trainer.max_epochs=1"
SLURM = Path(__file__).parent / "slurm"


def _started(out, *overrides, **environment):
    # Options come before the configuration.
    arguments = sorted([*TINY, *overrides, f"out={out}"], key=lambda argument: argument != "-m")
    return subprocess.Popen(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def _run(out, *overrides, code=0, **environment):
    process = _started(out, *overrides, **environment)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == code, output
    return output


def _states(out):
    return {job.folder: job.state for job in SweepTable(out).jobs()}


def _results(out):
    """By folder, what does not depend on how long it took or where it ran."""
    return {
        str(run.folder.relative_to(out)): {
            key: value
            for key, value in run.metrics.items()
            if not key.startswith(("time/", "cost/"))
        }
        for run in read_runs(out)
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Results of the two jobs that every launcher is given, each run alone."""
    out = tmp_path_factory.mktemp("alone")
    for seed in (0, 1):
        _run(out, f"seed={seed}")
    return _results(out)


def test_basic__job_that_fails__stops_no_other_and_is_tried_again(tmp_path, alone):
    sweep = ("-m", "hydra/launcher=basic", "seed=0,1", "data.fold=x,0")

    first = _run(tmp_path, *sweep, code=1)
    expected = {
        FOLDER.format(0).replace("fold=0", "fold=x"): State.FAILED,
        FOLDER.format(0): State.DONE,
        FOLDER.format(1).replace("fold=0", "fold=x"): State.FAILED,
        FOLDER.format(1): State.DONE,
    }
    assert _states(tmp_path) == expected
    assert "4 jobs: 2 failed, 2 done. Table: " in first
    assert "'data.fold' must be a whole number, but got 'x'." in first
    assert _results(tmp_path) == alone

    again = _run(tmp_path, *sweep, code=1)
    assert "4 jobs: 2 failed, 2 skipped." in again


def test_basic__killed__goes_on_with_the_job_that_was_running(tmp_path):
    sweep = ("-m", "hydra/launcher=basic", "seed=0,1", "trainer.max_epochs=20")
    killed = _started(tmp_path, *sweep)
    second = FOLDER.format(1).replace("epochs=1", "epochs=20")
    checkpoint = tmp_path / second / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 200
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert _states(tmp_path)[second] is State.RUNNING

    output = _run(tmp_path, *sweep)

    assert sorted(_states(tmp_path).values()) == [State.DONE, State.SKIPPED]
    assert "Continuing from" in output
    epochs = []
    for file in (tmp_path / second / "logs").rglob("metrics.csv"):
        rows = csv.DictReader(file.read_text().splitlines())
        epochs += [row["epoch"] for row in rows if row["val/selection"] and row["step"] != "0"]
    # The epoch that was killed is the only one that may be there twice.
    assert len(set(epochs)) >= 20
    assert len(epochs) <= 23


@pytest.fixture
def two_cores():
    """At most two of this machine's cores, for what a test starts."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("two_cores")
def test_joblib__two_workers__share_the_cores(tmp_path, alone):
    sweep = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", "threads=null")

    _run(tmp_path, *sweep, OMP_NUM_THREADS="2")

    assert _states(tmp_path) == dict.fromkeys(alone, State.DONE)
    assert _results(tmp_path) == alone
    for run in read_runs(tmp_path):
        assert json.loads((run.folder / "environment.json").read_text())["n_threads"] == 1


def test_submitit_local__two_jobs__are_run_and_then_skipped(tmp_path, alone):
    sweep = ("-m", "hydra/launcher=submitit_local", "seed=0,1")

    _run(tmp_path, *sweep)
    assert _states(tmp_path) == dict.fromkeys(alone, State.DONE)
    assert _results(tmp_path) == alone

    _run(tmp_path, *sweep)
    assert _states(tmp_path) == dict.fromkeys(alone, State.SKIPPED)


def _run_on_slurm(tmp_path, *overrides, code=0):
    jobs = tmp_path / "slurm"
    jobs.mkdir()
    path = f"{SLURM}:{os.environ['PATH']}"
    sweep = ("-m", "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "seed=0,1")
    return _run(
        tmp_path / "out", *sweep, *overrides, code=code, PATH=path, STAND_IN_SLURM_JOBS=str(jobs)
    )


def test_submitit_slurm__two_jobs__are_an_array(tmp_path, alone):
    _run_on_slurm(tmp_path)

    assert _states(tmp_path / "out") == dict.fromkeys(alone, State.DONE)
    assert _results(tmp_path / "out") == alone


def test_submitit_slurm__two_tasks__are_the_two_ranks_of_each_job(tmp_path):
    single = tmp_path / "single"
    _run(single, *TWO_PROCESSES, "seed=1")

    _run_on_slurm(tmp_path, *TWO_PROCESSES, "hydra.launcher.tasks_per_node=2")

    out = tmp_path / "out"
    assert list(_states(out).values()) == [State.DONE] * 2
    (of_single,) = _results(single).items()
    assert of_single in _results(out).items()
    for run in read_runs(out):
        with (run.folder / "predictions.csv").open() as file:
            ids = [row["bag_id"] for row in csv.DictReader(file)]
        assert len(ids) == len(set(ids))  # each bag once, although two ranks evaluate


def test_submitit_slurm__fewer_tasks_than_devices__is_refused(tmp_path):
    output = _run_on_slurm(tmp_path, *TWO_PROCESSES, code=1)

    assert "hydra.launcher starts 1 and the trainer asks for 2" in output
    assert set(_states(tmp_path / "out").values()) == {State.FAILED}
    assert not list((tmp_path / "out").rglob("*.ckpt"))
