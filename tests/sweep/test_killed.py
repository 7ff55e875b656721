import csv
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mil_anchor.sweep.jobs import State, SweepTable
from tests.composing import ROOT
from tests.sweep.same import assert_same_result

pytestmark = pytest.mark.slow

N_EPOCHS = 10
JOBS = ("model=abmil", "data=musk1", "hidden=8", f"trainer.max_epochs={N_EPOCHS}", "data.fold=0,1")
# In each of them a random state, an anchor and a schedule are to be continued.
ONE_PROCESS = ("plugin=anchor_nsf", "hydra.launcher.slots=2")
TWO_PROCESSES = (
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
    "hydra.launcher.slots=1",
)


def _started(out, *overrides):
    command = [sys.executable, "run.py", "-m", *JOBS, *overrides, f"out={out}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _folders(out):
    return {row.fold: out / row.folder for row in SweepTable(out).jobs()}


def _states(out):
    return {row.fold: row.state for row in SweepTable(out).jobs()}


def _wait_for(condition, sweep=None):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        assert sweep is None or sweep.poll() is None, sweep.stdout.read()
        time.sleep(0.02)


def _wait_for_checkpoints(sweep, out, n_jobs):
    _wait_for(lambda: len(list(out.rglob("last.ckpt"))) >= n_jobs, sweep)


def _processes(sweep):
    """All that the sweep has started: by folder of the run, its leader first."""
    found = {}
    for process in psutil.Process(sweep.pid).children(recursive=True):
        for part in process.cmdline():
            if part.startswith("hydra.run.dir="):
                folder = part.partition("=")[2].strip('"')
        if "run.py" in " ".join(process.cmdline()):
            found.setdefault(folder, []).append(process)
    return found


def _are_gone(processes):
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        for own in processes.values()
        for process in own
    )


def _trained_epochs(folder):
    """Epochs that each attempt of a run has trained."""
    attempts = []
    for file in sorted(folder.glob("logs/version_*/metrics.csv")):
        with file.open() as stream:
            rows = list(csv.DictReader(stream))
        attempts.append([int(row["epoch"]) for row in rows if row["train/loss"]])
    return attempts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folders of a sweep that nobody stops."""
    out = tmp_path_factory.mktemp("whole")
    sweep = _started(out, *ONE_PROCESS)
    output = sweep.communicate()[0]
    assert sweep.returncode == 0, output
    return _folders(out)


@pytest.mark.parametrize("way", ["kill_9_of_a_job", "kill_9_of_the_sweep", "ctrl_c"])
def test_sweep__stopped__goes_on_and_ends_as_if_it_had_not_been(tmp_path, whole, way):
    broken = _started(tmp_path, *ONE_PROCESS)
    _wait_for_checkpoints(broken, tmp_path, 2)
    processes = _processes(broken)
    folders = _folders(tmp_path)
    assert set(processes) == {str(folder) for folder in folders.values()}
    if way == "kill_9_of_a_job":
        processes[str(folders[0])][0].kill()
    else:
        os.kill(broken.pid, signal.SIGKILL if way == "kill_9_of_the_sweep" else signal.SIGINT)
    output = broken.communicate()[0]

    _wait_for(lambda: _are_gone(processes))
    code, states = {
        "kill_9_of_a_job": (1, {0: State.FAILED, 1: State.DONE}),
        "kill_9_of_the_sweep": (-9, {0: State.RUNNING, 1: State.RUNNING}),
        "ctrl_c": (130, {0: State.INTERRUPTED, 1: State.INTERRUPTED}),
    }[way]
    assert broken.returncode == code, output
    assert _states(tmp_path) == states, output
    if way == "kill_9_of_a_job":
        (killed,) = (row for row in SweepTable(tmp_path).jobs() if row.fold == 0)
        assert killed.error == "killed by signal 9 (SIGKILL)"
    if way == "ctrl_c":
        assert "The same command goes on" in output
        for folder in folders.values():  # in good order
            assert "The same command continues" in (folder / "output.log").read_text()

    again = _started(tmp_path, *ONE_PROCESS)
    output = again.communicate()[0]

    assert again.returncode == 0, output
    was_whole = {fold for fold, state in states.items() if state is State.DONE}
    expected = {fold: State.SKIPPED if fold in was_whole else State.DONE for fold in (0, 1)}
    assert _states(tmp_path) == expected, output
    for fold, folder in folders.items():
        assert_same_result(folder, whole[fold])
        attempts = _trained_epochs(folder)
        trained = [epoch for epochs in attempts for epoch in epochs]
        assert sorted(set(trained)) == list(range(N_EPOCHS))
        if fold in was_whole:
            assert len(attempts) == 1
        else:
            # At most the one that was running, where its numbers were written before its state.
            assert len(attempts) == 2
            assert attempts[1][0] in (attempts[0][-1], attempts[0][-1] + 1)


@pytest.mark.parametrize("way", ["kill_9_of_a_job", "kill_9_of_the_sweep", "ctrl_c"])
def test_sweep__stopped_in_a_job_of_two_processes__leaves_none_behind(tmp_path, way):
    sweep = _started(tmp_path, *TWO_PROCESSES, "plugin=none")
    _wait_for_checkpoints(sweep, tmp_path, 1)
    processes = _processes(sweep)
    (ranks,) = processes.values()
    assert len(ranks) == 2

    if way == "kill_9_of_a_job":
        ranks[0].kill()
    else:
        os.kill(sweep.pid, signal.SIGKILL if way == "kill_9_of_the_sweep" else signal.SIGINT)

    _wait_for(lambda: _are_gone(processes))
    if way == "kill_9_of_a_job":
        sweep.send_signal(signal.SIGINT)  # it has gone on with the next job
    output = sweep.communicate()[0]
    assert sweep.returncode == (-9 if way == "kill_9_of_the_sweep" else 130), output
