import pickle
import time

import pytest
from filelock import FileLock
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mil_anchor.sweep.jobs import State, SweepTable
from mil_anchor.sweep.progress import SweepProgress, count_jobs, time_left
from tests.composing import ROOT, composed
from tests.sweep.jobs_of_sweeps import TINY, composed_job, row

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def _sweep(*task, out="out", launcher="Processes", **sweeper):
    sweeper = {"_target_": BASIC_SWEEPER, "params": None} | sweeper
    overrides = {"task": list(task)}
    launcher = {"_target_": f"some.where.{launcher}Launcher"}
    hydra = {"sweeper": sweeper, "overrides": overrides, "launcher": launcher}
    return OmegaConf.create({"hydra": hydra | {"sweep": {"dir": str(out)}}})


def _started(config):
    progress = SweepProgress("now")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        progress.on_multirun_start(config)
    return progress


def _shown(capsys, *, until):
    shown = ""
    deadline = time.monotonic() + 30
    while until not in shown:
        assert time.monotonic() < deadline, shown
        time.sleep(0.05)
        shown += capsys.readouterr().out
    return shown


@pytest.mark.parametrize(
    ("task", "params", "n_jobs"),
    [
        ((), {}, 1),
        (("seed=1",), {}, 1),
        (("model=abmil,clam_sb", "seed=range(5)", "data.fold=0"), {}, 10),
        (("seed=0,1",), {"seed": "0,1,2", "plugin": "none,anchor"}, 4),  # the command line wins
        (("model='abmil,x'", "+tags=[a,b]"), {}, 1),
        (("model=glob(torchmil_*)",), {}, len(list((ROOT / "conf/model").glob("torchmil_*")))),
    ],
)
def test_count_jobs__grid__is_the_number_of_combinations(task, params, n_jobs):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert count_jobs(_sweep(*task, params=params)) == n_jobs


def test_count_jobs__other_sweepers__is_the_trials_or_unknown():
    assert count_jobs(_sweep("seed=0,1", _target_="an.Optuna", n_trials=7)) == 7
    assert count_jobs(_sweep("seed=0,1", _target_="some.Sweeper")) is None


@given(
    n_jobs=st.integers(1, 30),
    n_slots=st.integers(1, 5),
    duration=st.floats(1, 1000),
    share=st.floats(0, 0.99),
    n_rounds=st.integers(1, 6),
)
@settings(derandomize=True, deadline=None)
def test_time_left__jobs_of_equal_length__is_exact_while_slots_are_full(
    n_jobs, n_slots, duration, share, n_rounds
):
    n_done = n_rounds * n_slots
    jobs = [row(str(i), State.DONE, seconds=duration) for i in range(n_done)]
    jobs += [row(f"r{i}", State.RUNNING) for i in range(n_slots)]
    jobs += [row(f"s{i}", State.SKIPPED, seconds=0.0) for i in range(3)]  # say nothing of the rest
    n_all = 3 + n_done + n_slots * n_jobs  # whole rounds to come

    left = time_left(jobs, n_all, running_s=[share * duration] * n_slots, n_slots=n_slots)

    assert left == pytest.approx((n_jobs - share) * duration)


def test_time_left__nothing_known__is_none_and_late_jobs_never_make_it_negative():
    assert time_left([row("a", State.SKIPPED)], 5, running_s=[], n_slots=2) is None
    assert time_left([row("a", State.DONE)], None, running_s=[], n_slots=2) is None
    jobs = [row("a", State.DONE, seconds=1.0), row("b", State.RUNNING)]
    assert time_left(jobs, 2, running_s=[100.0], n_slots=1) == 0


def test_sweep_progress__jobs__are_said_once_each_and_summed_up(tmp_path, capsys):
    table = SweepTable(tmp_path)
    table.record(row("of/another", State.FAILED, sweep="before"))
    table.record(row("of/a_killed", State.RUNNING, sweep="before"))
    for number in (0, 1):
        table.record(row(f"m/seed={number}", State.SKIPPED, seconds=0.0))
    table.record(row("m/seed=2", State.DONE, seconds=150.0))
    table.record(row("m/seed=3", State.FAILED, error="ValueError: [bold] too bad"))
    table.record(row("m/seed=4", State.RUNNING))
    (tmp_path / "m/seed=4").mkdir(parents=True)
    with FileLock(tmp_path / "m/seed=4" / ".lock"):
        progress = _started(_sweep("seed=0,1,2,3,4,5", out=tmp_path))
    assert table.jobs("before")[1].state is State.INTERRUPTED
    live = _shown(capsys, until="too bad").splitlines()
    time.sleep(1.2)  # it looks once a second
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="1"):
        progress.on_multirun_end(_sweep())
    end = capsys.readouterr().out.splitlines()

    assert live == [
        "[2/6] 2 jobs complete already",
        "[3/6, 1 failed, 1 running, about 5 min left] done m/seed=2 in 2 min",
        "[4/6, 1 failed, 1 running, about 5 min left] failed m/seed=3: ValueError: [bold] too bad",
    ]
    assert end == [
        "skipped     m/seed=0",
        "skipped     m/seed=1",
        "done        m/seed=2 in 2 min",
        "failed      m/seed=3: ValueError: [bold] too bad",
        "running     m/seed=4",
        "5 jobs: 2 skipped, 1 done, 1 failed, 1 running, 1 not started. "
        f"Table: {tmp_path / 'sweep.csv'}",
    ]


@pytest.mark.parametrize("launcher", ["Processes", "Basic", "Joblib"])
def test_sweep_progress__terminal__has_a_bar_where_jobs_write_elsewhere(
    tmp_path, capsys, monkeypatch, launcher
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    SweepTable(tmp_path).record(row("a", State.DONE, seconds=5000.0))
    SweepTable(tmp_path).record(row("b", State.RUNNING))
    (tmp_path / "b").mkdir()
    with FileLock(tmp_path / "b" / ".lock"):
        progress = _started(_sweep("seed=0,1", out=tmp_path, launcher=launcher))
    live = _shown(capsys, until="left")
    progress.on_multirun_end(_sweep())
    end = capsys.readouterr().out

    assert ("━" in live) == (launcher == "Processes")
    assert "1/2" in live
    assert "1 running, about 83 min left" in live
    assert ("done a" in live) == (launcher != "Processes")
    assert "2 jobs: 1 done, 1 running" in end


def test_sweep_progress__no_job_failed__lets_the_process_end_well(tmp_path, capsys):
    progress = _started(_sweep("seed=0", out=tmp_path))
    SweepTable(tmp_path).record(row("a", State.DONE))

    progress.on_multirun_end(_sweep())

    assert "1 job: 1 done." in capsys.readouterr().out


def test_sweep_progress__sent_to_a_worker__stays_where_it_follows(tmp_path, capsys):
    progress = _started(_sweep("seed=0", out=tmp_path))

    copy = pickle.loads(pickle.dumps(progress))
    copy.on_multirun_end(_sweep())
    assert capsys.readouterr().out == ""
    assert copy.started == "now"
    progress.on_multirun_end(_sweep())


def test_sweep_progress__other_ranks__show_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    progress = _started(_sweep("seed=0", out=tmp_path))
    SweepTable(tmp_path).record(row("a", State.FAILED))

    progress.on_multirun_end(_sweep())

    assert capsys.readouterr().out == ""


def test_sweep_progress__failed_job__ends_no_grid_but_is_told_to_a_search(tmp_path):
    error = ValueError("too bad")

    def after(config):
        returned = JobReturn(status=JobStatus.FAILED)
        returned.return_value = error
        SweepProgress("now").on_job_end(config, returned)
        return returned

    composed_job(tmp_path)
    assert HydraConfig.get().sweeper._target_ == BASIC_SWEEPER
    assert after(_sweep()).return_value is None
    assert after(_sweep(_target_="an.Optuna", n_trials=2)).status is JobStatus.FAILED
    composed(*TINY)
    assert after(_sweep()).status is JobStatus.FAILED
