import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.sweep.job_process import JobProcess

SLEEPS = "import time\nprint('up', flush=True)\ntime.sleep(60)\n"
STARTS_ANOTHER = """
import subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print("other", other.pid, flush=True)
time.sleep({})
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts a script as the program of this process; ends what a test leaves."""
    processes = []

    def start(script, *overrides, arguments=(), folder=tmp_path / "run"):
        (tmp_path / "script.py").write_text(script)
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py"), *arguments])
        processes.append(JobProcess(overrides, folder=folder, threads=3))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def _wait_for(condition):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def _printed(folder):
    return (folder / "output.log").read_text().split("\n")[1:-1]


def _exists(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_job_process__run__is_this_program_as_a_single_run(tmp_path, started, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("OTHER", "kept")
    tells = "import json, os, sys; print(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]))"
    given_here = ["-m", "seed=0,1", "-cn", "other", "--config-dir=more", "-cp", "conf"]

    process = started(tells, "seed=1", arguments=given_here)
    _wait_for(process.has_ended)

    assert process.error() is None
    argv, cwd, environment = json.loads(_printed(tmp_path / "run")[0])
    config = ["--config-path=conf", "--config-name=other", "--config-dir=more"]
    own = ["hydra.mode=RUN", f'hydra.run.dir="{tmp_path}/run"']
    assert argv == [str(tmp_path / "script.py"), *config, "seed=1", *own]
    assert Path(cwd) == Path.cwd()
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OTHER"] == "kept"
    assert "7" not in environment.values()


def test_job_process__second_attempt__adds_to_the_log_and_forgets_the_error(tmp_path, started):
    folder = tmp_path / "run"
    _wait_for(started("print('first'); raise KeyError('old')").has_ended)
    (folder / "error.txt").write_text("Traceback (most recent call last):\n  File\nOSError: old")

    second = started("raise SystemExit('second')")
    _wait_for(second.has_ended)

    assert "first" in _printed(folder)
    assert second.error() == "exit code 1: second"


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("raise SystemExit(3)", "exit code 3: "),
        ("print('a')\nprint('b')\nraise SystemExit(3)", "exit code 3: b"),
        ("def f():\n  raise OSError('no\\n  disk')\nf()", "exit code 1: OSError: no disk"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9 (SIGKILL)"),
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11 (SIGSEGV)"),
    ],
)
def test_job_process__ended_badly__says_why_in_one_line(started, script, error):
    process = started(script)
    _wait_for(process.has_ended)

    found = process.error()

    if error.endswith(": "):  # the script has printed nothing
        assert found.startswith(error)
    else:
        assert found == error


def test_job_process__run_left_an_error__says_that_one(tmp_path, started):
    error = "Traceback (most recent call last):\n  File 'a.py'\n    f()\nValueError: seed"
    script = f"open({str(tmp_path / 'run/error.txt')!r}, 'w').write({error!r}); raise SystemExit(1)"
    process = started(script)
    _wait_for(process.has_ended)

    assert process.error() == "ValueError: seed"


@pytest.mark.parametrize("way", ["its_end", "kill", "kill_9_of_its_leader"])
def test_job_process__ended__leaves_nothing_that_it_started(tmp_path, started, way):
    process = started(STARTS_ANOTHER.format(1 if way == "its_end" else 120))
    (line,) = _wait_for(lambda: _printed(tmp_path / "run"))
    other = int(line.split()[1])
    assert _exists(other)

    if way == "kill":
        process.kill()
    if way == "kill_9_of_its_leader":
        os.kill(os.getpgid(other), signal.SIGKILL)
    _wait_for(process.has_ended)

    _wait_for(lambda: not _exists(other))


def test_job_process__interrupted__stops_as_after_ctrl_c(tmp_path, started):
    process = started(SLEEPS)
    _wait_for(lambda: _printed(tmp_path / "run"))

    process.interrupt()
    _wait_for(process.has_ended)

    assert process.error() == "killed by signal 2 (SIGINT)"
    assert "KeyboardInterrupt" in _printed(tmp_path / "run")


@pytest.mark.slow
def test_job_process__its_sweep_is_killed__ends_with_all_that_it_started(tmp_path):
    (tmp_path / "script.py").write_text(STARTS_ANOTHER.format(120))
    sweep = f"""
import sys, time
from pathlib import Path
from mil_anchor.sweep.job_process import JobProcess
sys.argv = [{str(tmp_path / "script.py")!r}]
JobProcess([], folder=Path({str(tmp_path)!r}), threads=1)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", sweep])
    (line,) = _wait_for(lambda: (tmp_path / "output.log").exists() and _printed(tmp_path))
    other = int(line.split()[1])
    leader = os.getpgid(other)

    parent.kill()
    parent.wait()

    _wait_for(lambda: not _exists(other))
    _wait_for(lambda: not _exists(leader))


@given(name=st.text(alphabet="ab\\\"' =,{}[]()$:", min_size=1))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_job_process__odd_folder__is_the_one_that_hydra_reads(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("odd") / name
    before = sys.argv
    sys.argv = [str(folder.parent / "script.py")]
    (folder.parent / "script.py").write_text("import sys; print(sys.argv[-1])")
    try:
        process = JobProcess([], folder=folder, threads=1)
        _wait_for(process.has_ended)
    finally:
        sys.argv = before

    (override,) = OverridesParser.create().parse_overrides(_printed(folder))
    assert override.value() == str(folder)
