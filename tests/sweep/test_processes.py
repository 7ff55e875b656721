import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from mil_anchor.experiment import register_config, run
from mil_anchor.sweep.jobs import State, SweepTable
from mil_anchor.sweep.plan import PlannedJob
from mil_anchor.sweep.processes import run_jobs
from tests.composing import ROOT, composed
from tests.sweep.same import assert_same_result

TINY = ("model=abmil", "data=musk1", "trainer.max_epochs=2", "hidden=8", "maps=0")
# Stands for run.py: writes what a run writes, but trains nothing. Folds tell it what to do.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

given = dict(part.split("=", 1) for part in sys.argv[1:])
folder = Path(given["hydra.run.dir"].strip('"'))
fold, seed = int(given.get("data.fold", 0)), int(given.get("seed", 0))
begun = time.time()
if fold == 1:
    raise RuntimeError("this fold fails")
if fold == 2:
    os.kill(os.getpid(), 9)
if fold == 3:
    sys.exit(0)
if fold in (4, 5):
    if fold == 5:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("up", flush=True)
    time.sleep(60)
time.sleep(0.3)
(folder / "metrics.json").write_text(json.dumps({"val/selection": seed / 10}))
(folder / "told.json").write_text(json.dumps([begun, time.time(), sys.argv[1:]]))
"""


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Runs the jobs of a sweep whose program is the stand-in: what came of them, their rows."""
    (tmp_path / "run.py").write_text(STAND_IN)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "run.py"), "-m"])
    monkeypatch.setattr("mil_anchor.sweep.processes.usable_cores", lambda: 2)
    register_config()

    def sweep(*jobs, of_sweep=(), at_once=None):
        own = [*TINY, f"out={tmp_path}/out", *of_sweep]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            config = loader.load_configuration("config", own, run_mode=RunMode.MULTIRUN)
            overrides = [[*own[: len(TINY) + 1], *job] for job in jobs]
            returns = run_jobs(loader, config, overrides=overrides, first=5, at_once=at_once)
        return returns, SweepTable(tmp_path / "out").jobs()

    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield sweep
    root.handlers, root.level = before  # Hydra sets its own


def _noted(method, name, events):
    def noted(*args, **options):
        events.append(name)
        return method(*args, **options)

    return noted


def _told(rows, out):
    """Begin, end and arguments of the jobs that ran to their end."""
    return [json.loads((out / row.folder / "told.json").read_text()) for row in rows]


def test_run_jobs__some_fail__the_others_are_done(tmp_path, swept):
    returns, rows = swept(*([f"data.fold={fold}", "seed=3"] for fold in (0, 1, 2, 3, 10)))

    rows = sorted(rows, key=lambda row: row.fold)
    assert [row.state.value for row in rows] == ["done", "failed", "failed", "failed", "done"]
    assert [row.error for row in rows] == [
        "",
        "exit code 1: RuntimeError: this fold fails",
        "killed by signal 9 (SIGKILL)",
        "it ended without metrics.json",
        "",
    ]
    assert all(0 < row.seconds < 60 for row in rows)
    assert len({row.sweep for row in rows}) == 1
    # Hydra's own sweeper looks at each of them, and would stop at an exception.
    assert [returned.return_value for returned in returns] == [0.3, None, None, None, 0.3]


def test_run_jobs__two_cores__are_divided_between_two_at_once(tmp_path, swept):
    _, rows = swept(*([f"seed={seed}"] for seed in range(3)))

    (first, second, third) = sorted(_told(rows, tmp_path / "out"))
    assert second[0] < first[1]
    assert third[0] > min(first[1], second[1])
    numbers = [f"hydra.job.num={number}" for number in (5, 6, 7)]
    assert (
        sorted(part for told in (first, second, third) for part in told[2] if "num" in part)
        == numbers
    )
    for _, _, arguments in (first, second, third):
        assert {"++trainer.enable_progress_bar=false", "hydra.mode=RUN"} <= set(arguments)
        # This data set's own; without, the job's share.
        assert not any(part.startswith(("threads", "++trainer.devices")) for part in arguments)


def test_run_jobs__more_jobs_than_slots__the_first_start_before_all_are_composed(
    swept, monkeypatch
):
    events = []
    for name in ("__init__", "start"):
        monkeypatch.setattr(PlannedJob, name, _noted(getattr(PlannedJob, name), name, events))
    returned, _ = swept(*([f"seed={seed}"] for seed in range(5)))
    assert [one.status for one in returned] == [JobStatus.COMPLETED] * 5
    assert events[:5] == ["__init__", "__init__", "start", "start", "__init__"]
    assert sorted(events) == ["__init__"] * 5 + ["start"] * 5


@pytest.mark.parametrize(("n_jobs", "share"), [(1, "threads=2"), (3, "threads=1")])
def test_run_jobs__threads_left_open__are_the_share_of_a_job(tmp_path, swept, n_jobs, share):
    _, rows = swept(*([f"seed={seed}", "threads=null"] for seed in range(n_jobs)))

    assert all(share in told[2] for told in _told(rows, tmp_path / "out"))


def test_run_jobs__gpus__each_job_has_its_own(tmp_path, swept, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    _, rows = swept(*(["trainer=gpu", f"seed={seed}"] for seed in range(2)))

    devices = {part for told in _told(rows, tmp_path / "out") for part in told[2] if "dev" in part}
    assert devices == {"++trainer.devices=[0]", "++trainer.devices=[1]"}


def test_run_jobs__jobs_of_different_needs__do_not_meet(tmp_path, swept):
    jobs = [["trainer.devices=2", "trainer.strategy=ddp", "seed=0"], ["seed=1"], ["seed=2"]]

    _, rows = swept(*jobs)

    wide, *others = sorted(_told(rows, tmp_path / "out"))
    assert all(other[0] > wide[1] for other in others)


def test_run_jobs__the_same_run_twice__is_run_once(tmp_path, swept):
    folder = tmp_path / "out/abmil/none/musk1/seed=1,fold=0,hidden=8,maps=0,trainer.max_epochs=2"
    folder.mkdir(parents=True)
    config = composed(*TINY, f"out={tmp_path}/out", "seed=1", folder=folder)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))

    returns, _ = swept(["seed=1"], ["seed=1"])

    assert (folder / "output.log").read_text().count("$ ") == 1
    assert [returned.return_value for returned in returns] == [0.1, 0.1]


@pytest.mark.parametrize("resume", ["true", "false"])
def test_run_jobs__other_configuration_in_the_folder_of_another_job__is_refused(swept, resume):
    jobs = [[f"names.data={name}", f"resume={resume}"] for name in "ab"]
    in_one_folder = [*jobs, [*jobs[0], "+data.root=elsewhere"]]

    returns, rows = swept(*in_one_folder)

    assert [returned.return_value for returned in returns] == [0.0, 0.0, None]
    refused, *others = sorted(rows, key=lambda row: row.state is State.DONE)
    assert refused.state is State.FAILED
    assert "+data.root=elsewhere" in refused.folder
    assert "another one runs in" in refused.error
    assert "these differ: ['data.root']. Start a sweep for each" in refused.error
    assert [row.state for row in others] == [State.DONE, State.DONE]


def test_run_jobs__combination_that_is_refused__fails_alone(swept):
    search = ("hydra/sweeper=optuna",)

    returns, rows = swept(
        ["model.no_such=1"], ["seed=1"], ["+trainer.num_nodes=2"], of_sweep=search
    )

    by_state = {row.state: row for row in rows}
    assert {row.state for row in rows} == {State.DONE, State.FAILED}
    errors = sorted(row.error for row in rows if row.error)
    assert errors[0].startswith("Could not override 'model.no_such'")
    assert errors[1].startswith("Jobs of hydra/launcher=processes run on one machine")
    assert by_state[State.DONE].seed == 1
    # A search counts failed trials, by exceptions.
    states = [returned.status for returned in returns]
    assert states == [JobStatus.FAILED, JobStatus.COMPLETED, JobStatus.FAILED]
    with pytest.raises(Exception, match=r"Could not override 'model\.no_such'"):
        returns[0].return_value  # noqa: B018


def test_run_jobs__failed_trial_of_a_search__is_an_exception(swept):
    returns, _ = swept(["data.fold=1"], of_sweep=("hydra/sweeper=optuna",))

    with pytest.raises(RuntimeError, match="this fold fails"):
        returns[0].return_value  # noqa: B018


@pytest.mark.parametrize(
    ("fold", "times"), [(4, 1), (5, 2)], ids=["once", "twice_as_the_job_does_not_listen"]
)
def test_run_jobs__ctrl_c__stops_its_jobs_and_says_how_to_go_on(
    swept, tmp_path, capsys, fold, times
):
    def interrupt():
        while not any("up" in log.read_text() for log in tmp_path.rglob("output.log")):
            time.sleep(0.05)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        swept([f"data.fold={fold}"], [f"data.fold={fold}", "seed=1"], at_once=1)
    thread.join()

    assert stopped.value.code == 130
    assert "Interrupted. The same command goes on" in capsys.readouterr().out
    (row,) = SweepTable(tmp_path / "out").jobs()
    assert row.state is State.INTERRUPTED
    assert row.seconds < 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_run_jobs__no_slot__is_refused(swept):
    with pytest.raises(ValueError, match=r"hydra\.launcher\.slots must be a number of jobs from 1"):
        swept(["seed=0"], at_once=0)


def test_run_jobs__one_of_several_processes__is_refused(swept, monkeypatch):
    monkeypatch.setattr("mil_anchor.sweep.processes.rank_zero_only.rank", 1)
    with pytest.raises(ValueError, match=r"must be started as one process, .* this is process 1"):
        swept(["seed=0"])


def test_launcher__imported_by_every_hydra_program__is_light():
    module = "hydra_plugins.mil_anchor_processes.launcher"
    command = f"import {module}, sys; print(sorted({{'torch', 'mil_anchor'}} & sys.modules.keys()))"

    printed = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )

    assert printed.stdout == "[]\n"


def _sweep(out, *overrides):
    """``python run.py -m ...`` with real jobs."""
    command = [sys.executable, "run.py", "-m", *TINY, f"out={out}", *overrides]
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


REAL = ("plugin=anchor_nsf", "data.fold=0,1,99", "hydra.launcher.slots=3")


@pytest.fixture(scope="module")
def real_sweep(tmp_path_factory):
    """Three jobs side by side, of which the last cannot run."""
    out = tmp_path_factory.mktemp("sweep")
    return out, _sweep(out, *REAL)


@pytest.mark.slow
def test_sweep__jobs_side_by_side__equal_single_runs(real_sweep, tmp_path):
    out, ended = real_sweep

    rows = {row.fold: row for row in SweepTable(out).jobs()}
    assert ended.returncode == 1, ended.stdout  # a job has failed
    assert [rows[fold].state.value for fold in (0, 1, 99)] == ["done", "done", "failed"]
    assert rows[99].error.startswith("ValueError: ")
    assert "99" in rows[99].error
    began = {fold: (out / rows[fold].folder / "config.yaml").stat().st_mtime for fold in (0, 1)}
    ended_at = {fold: (out / rows[fold].folder / "metrics.json").stat().st_mtime for fold in (0, 1)}
    assert max(began.values()) < min(ended_at.values())
    for fold in (0, 1):
        alone = tmp_path / str(fold)
        run(
            composed(
                *TINY,
                "plugin=anchor_nsf",
                f"data.fold={fold}",
                "trainer.enable_progress_bar=false",
                folder=alone,
            )
        )
        assert_same_result(out / rows[fold].folder, alone)


@pytest.mark.slow
def test_sweep__started_again__starts_nothing_that_is_complete(real_sweep):
    out, _ = real_sweep
    rows = {row.fold: row for row in SweepTable(out).jobs()}
    logs = {fold: out / rows[fold].folder / "output.log" for fold in rows}
    before = {fold: log.read_text() for fold, log in logs.items()}

    ended = _sweep(out, *REAL)

    rows = {row.fold: row.state for row in SweepTable(out).jobs()}
    assert rows == {0: State.SKIPPED, 1: State.SKIPPED, 99: State.FAILED}, ended.stdout
    grown = {fold for fold, log in logs.items() if log.read_text() != before[fold]}
    assert grown == {99}


@pytest.mark.slow
def test_sweep__jobs_of_two_processes__are_each_one_run(tmp_path, monkeypatch):
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "seed=3")
    # What torchrun would have told the sweep.
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "7", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    ended = _sweep(tmp_path / "sweep", *two, "data.fold=0,1")
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name)
    command = [sys.executable, "run.py", *TINY, f"out={tmp_path}/alone", *two, "data.fold=1"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)

    assert ended.returncode == 0, ended.stdout
    folders = {
        row.fold: tmp_path / "sweep" / row.folder for row in SweepTable(tmp_path / "sweep").jobs()
    }
    assert len(list((tmp_path / "sweep").rglob("metrics.json"))) == 2
    (alone,) = (file.parent for file in (tmp_path / "alone").rglob("metrics.json"))
    assert_same_result(folders[1], alone)
