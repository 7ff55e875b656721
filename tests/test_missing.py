from mil_anchor.missing import Missing, missing_runs
from mil_anchor.results import read_runs, read_unfinished
from tests.run_folders import write_run


def test_missing_runs__begun__are_not_missing(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "none", seed)
    write_run(tmp_path, "anchor", 0)
    write_run(tmp_path, "anchor", 1, complete=False)

    unfinished = read_unfinished(tmp_path)

    assert missing_runs(read_runs(tmp_path), unfinished=unfinished) == []


def test_missing_runs__begun_with_a_setting__is_not_missing_in_its_cell_only(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, "anchor", seed, settings={"plugin.weight": 0.1})
    write_run(tmp_path, "anchor", 0, settings={"plugin.weight": 0.3})
    write_run(tmp_path, "anchor", 1, settings={"plugin.weight": 0.3}, complete=False)

    missing = missing_runs(read_runs(tmp_path), unfinished=read_unfinished(tmp_path))

    assert missing == [Missing("musk1", "abmil", "anchor (plugin.weight=0.3)", 2, 0)]


def test_missing_runs__partial_sweep__names_what_other_cells_have(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "none", seed)
    write_run(tmp_path, "anchor", 1)
    write_run(tmp_path, "none", 0, model="dsmil")
    write_run(tmp_path, "none", 7, data="musk2")

    assert missing_runs(read_runs(tmp_path)) == [
        Missing("musk1", "abmil", "anchor", 0, 0),
        Missing("musk1", "dsmil", "none", 1, 0),
        Missing("musk1", "dsmil", "anchor", 0, 0),
        Missing("musk1", "dsmil", "anchor", 1, 0),
    ]


def test_missing_runs__settings_of_one_model__are_not_demanded_of_others(tmp_path):
    for weight in (0.1, 0.3):
        write_run(tmp_path, "anchor", settings={"plugin.weight": weight})
    write_run(tmp_path, "anchor", model="dsmil")

    assert missing_runs(read_runs(tmp_path)) == []
