import subprocess
import sys
from collections import Counter
from threading import Thread

import pytest
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.sweep.jobs import Job, State, SweepTable, begun_job
from tests.composing import ROOT
from tests.sweep.jobs_of_sweeps import composed_job, row

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
JOBS = st.builds(
    Job,
    folder=st.sampled_from("abcde"),
    model=TEXT,
    plugin=TEXT,
    data=TEXT,
    seed=st.integers(0, 10**9),
    fold=st.integers(-1, 99) | st.sampled_from(["x", "", "-", "1.5"]),
    state=st.sampled_from(State),
    seconds=st.integers(0, 10**6).map(lambda tenths: tenths / 10),
    error=TEXT,
    sweep=st.sampled_from(["2026-11-21T10:00:00", "2026-11-22T10:00:00"]),
)


@given(jobs=st.lists(JOBS, max_size=12))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_sweep_table__any_rows__are_read_as_the_last_written_for_each_folder(
    tmp_path_factory, jobs
):
    out = tmp_path_factory.mktemp("out")
    for job in jobs:
        SweepTable(out).record(job)

    last = {job.folder: job for job in jobs}
    assert SweepTable(out).jobs() == list(last.values())
    for sweep in {job.sweep for job in jobs}:
        of_sweep = [job for job in last.values() if job.sweep == sweep]
        assert SweepTable(out).jobs(sweep) == of_sweep


def test_sweep_table__no_sweep_yet__has_no_rows_and_makes_no_file(tmp_path):
    table = SweepTable(tmp_path / "out")

    table.settle()

    assert table.jobs() == []
    assert not (tmp_path / "out").exists()


def test_sweep_table__writers_at_once__lose_no_row(tmp_path):
    def write(writer):
        for state in (State.RUNNING, State.DONE):
            for number in range(6):
                SweepTable(tmp_path).record(row(f"{writer}/{number}", state, sweep=writer))

    threads = [Thread(target=write, args=(writer,)) for writer in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        SweepTable(tmp_path).jobs()  # readers never see half a file
    for thread in threads:
        thread.join()

    jobs = SweepTable(tmp_path).jobs()
    assert Counter(job.sweep for job in jobs) == dict.fromkeys("abcd", 6)
    assert {job.state for job in jobs} == {State.DONE}


WRITER = """
import sys
from pathlib import Path
from mil_anchor.sweep.jobs import State, SweepTable
from tests.sweep.jobs_of_sweeps import row
out, name = sys.argv[1:]
for number in range(40):
    SweepTable(Path(out)).record(row(f"{name}/{number}", State.DONE, sweep=name))
"""


@pytest.mark.slow
def test_sweep_table__sweeps_in_several_processes__lose_no_row(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, name], cwd=ROOT) for name in "abc"
    ]

    assert [process.wait(timeout=200) for process in processes] == [0, 0, 0]
    counts = Counter(job.sweep for job in SweepTable(tmp_path).jobs())
    assert counts == dict.fromkeys("abc", 40)


def test_sweep_table__settled__calls_interrupted_what_nobody_runs(tmp_path):
    table = SweepTable(tmp_path)
    rows = {
        "killed": State.RUNNING,
        "never_begun": State.RUNNING,
        "held": State.RUNNING,
        "done": State.DONE,
        "failed": State.FAILED,
    }
    for folder, state in rows.items():
        table.record(row(folder, state))
    for folder in ("killed", "held", "done"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".lock").touch()

    with FileLock(tmp_path / "held" / ".lock"):
        table.settle()

    assert {job.folder: job.state for job in table.jobs()} == rows | {
        "killed": State.INTERRUPTED,
        "never_begun": State.INTERRUPTED,
    }
    FileLock(tmp_path / "killed" / ".lock").acquire(timeout=0).lock.release()


def test_begun_job__of_a_configuration__names_its_folder_and_cell(tmp_path):
    config = composed_job(tmp_path, "plugin=anchor", "seed=3", "data.fold=2", "module.lr=0.1")

    job = begun_job(config, HydraConfig.get())

    assert job._replace(sweep="") == Job(
        folder="abmil/anchor/musk1/seed=3,fold=2,hidden=8,module.lr=0.1,trainer.max_epochs=1",
        model="abmil",
        plugin="anchor",
        data="musk1",
        seed=3,
        fold=2,
        state=State.RUNNING,
        seconds=0.0,
        error="",
        sweep="",
    )
    assert HydraConfig.get().callbacks["sweep"].started == job.sweep
