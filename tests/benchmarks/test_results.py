import json

import pytest

from benchmarks.goals import judge, read_measured
from benchmarks.record import FOLDER
from benchmarks.results import PAGE, page, speed, summary

MACHINE = {
    "processor": "An abacus",
    "n_cores": 2,
    "torch": "2.13.0",
    "torchmil": "1.0.2",
    "commit": "0123456789abcdef",
    "changed": True,
    "date": "2030-01-31",
}
KEY = "ABMIL 1024-512-128 / torchmil ABMIL 1024-512-128, 10000"


@pytest.fixture
def measured():
    row = {"ratio": 0.5, "control": 1.01, "milliseconds": 21.0, "reference_milliseconds": 42.0}
    other = {"ratio": 0.875, "control": None, "megabytes": 12.25}
    return {
        "peers": {"machine": MACHINE, "rounds": 7, "ratios": {KEY: row}},
        "memory": {"machine": MACHINE, "rounds": 1, "ratios": {"a / b": other}},
    }


def test_page__two_scripts_of_one_machine__names_it_once(measured):
    text = page(measured)
    row = "| peers, memory | An abacus | 2 | torch 2.13.0, torchmil 1.0.2 | "
    assert row + "0123456789 and changes | 2030-01-31 |" in text


def test_page__measured_ratio__stands_among_goals_and_in_its_table(measured):
    text = page(measured)
    assert "| 0.500 | 0.750 | 1.010 | met |" in text
    assert f"| {KEY} | 21.0 | 42.0 | 0.500 | 1.010 |" in text


def test_page__row_without_a_control__leaves_the_cell_empty(measured):
    assert "| a / b | 12.2 | 0.875 |  |" in page(measured)


def test_page__measured_on_a_gpu__has_a_table_but_meets_no_goal(measured):
    content = measured["peers"] | {"machine": MACHINE | {"gpu": "A loom"}}
    text = page({"peers_cuda": content})
    assert "| peers_cuda | A loom | 2 |" in text
    assert "`python -m benchmarks.peers --device cuda`, rounds: 7." in text
    assert "met: 0" in text


def test_summary__one_met__counts_the_rest(measured):
    verdicts = judge(measured)
    assert summary(verdicts) == f"Goals met: 1, missed: 0, not measured: {len(verdicts) - 1}"


def test_speed__folder__shows_what_is_conclusive(measured, tmp_path):
    (tmp_path / "peers.json").write_text(json.dumps(measured["peers"]))
    text = speed(tmp_path)
    assert "| gated ABMIL + plug-in / torchmil's, bare | 21 | 42 | 0.50 |" in text
    measured["peers"]["ratios"][KEY]["control"] = 1.1
    (tmp_path / "peers.json").write_text(json.dumps(measured["peers"]))
    assert "torchmil's, bare" not in speed(tmp_path)


def test_page__committed__is_what_the_committed_figures_give():
    assert (FOLDER / PAGE).read_text() == page(read_measured(FOLDER))


def test_judge__committed_figures__hold_every_goal():
    unmeasured = [v.goal.key for v in judge(read_measured(FOLDER)) if v.verdict == "not measured"]
    assert unmeasured == []
