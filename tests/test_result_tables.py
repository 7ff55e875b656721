import csv
import io

import pytest
from rich.console import Console

from mil_anchor.result_tables import all_tables
from mil_anchor.results import read_runs, read_unfinished
from mil_anchor.tables import as_csv, as_latex, as_markdown, as_rich, split_by
from tests.run_folders import write_run

NAMES = [
    *("results", "differences", "tests", "stability", "concentration", "localization", "cost"),
    *("flops", "calibration", "reproduction", "unfinished", "missing"),
]
SLIDES = [("a", 0, 0.25), ("b", 1, 0.25), ("c", 0, 0.25), ("d", 1, 0.75)]


@pytest.fixture
def sweep(tmp_path):
    """Two plug-ins on three seeds with known numbers; one run failed and one was never begun."""
    for seed, f1 in enumerate((0.4, 0.5, 0.6)):
        for plugin, better, factor in (("none", 0.0, 1.0), ("anchor", 0.1, 2.0)):
            write_run(
                tmp_path,
                plugin,
                seed,
                predictions=SLIDES,
                environment={"processor": "x"},
                f1=f1 + better * (seed + 1),
                auroc=0.75,
                loss=0.5,
                attention__jsd_first_two_thirds=0.01 / factor,
                attention__jsd_last_third=0.001,
                attention__entropy=0.9,
                localization__auroc=0.8,
                time__epoch_s=0.5 * factor,
                cost__flops_step=int(3e9 * factor),
                cost__flops_inference=1_000_000_000,
                cost__peak_memory_mb=100,
            )
    failed = write_run(tmp_path, "slow", 0, complete=False)
    (failed / "error.txt").write_text("ValueError: no slow weights")
    write_run(tmp_path, "slow", 1, f1=0.4, weights="slow")
    return tmp_path


@pytest.fixture
def tables(sweep):
    found = all_tables(read_runs(sweep), read_unfinished(sweep))
    assert [table.name for table in found] == NAMES
    return {table.name: table for table in found}


def _column(table, title):
    place = [column.title for column in table.columns].index(title)
    return [row[place].text for row in table.rows]


def test_all_tables__results__are_means_with_none_first(tables):
    table = tables["results"]

    assert table.title == "Results on test bags"
    assert _column(table, "plug-in") == ["none", "anchor", "slow"]
    assert _column(table, "n") == ["3", "3", "1"]
    assert _column(table, "F1") == [".500±.100", ".700±.200", ".400"]
    assert _column(table, "accuracy") == ["-", "-", "-"]
    assert _column(table, "weights") == ["online", "online", "slow"]


def test_all_tables__differences__are_paired(tables):
    table = tables["differences"]

    names = [[cell.text for cell in row[2:5]] for row in table.rows]
    assert names == [["anchor", "F1", "3"], ["anchor", "AUROC", "3"], ["slow", "F1", "1"]]
    # .1, .2, .3: mean .2, sd .1; t(.975, 2) = 4.3027; of 8 flips +++ and --- are as extreme.
    assert [cell.text for cell in table.rows[0][5:]] == ["+.200", "-.048", "+.448", ".250", ".250"]
    assert [cell.text for cell in table.rows[1][5:]] == [".000", ".000", ".000", "1.000", "1.000"]
    assert [cell.text for cell in table.rows[2][5:]] == ["-.100", "-", "-", "-", "-"]


def test_all_tables__tests__have_effect_and_p_values_over_slides(tables):
    table = tables["tests"]

    # Hedges' g of .2 / .1 with two degrees of freedom: J = Γ(1) / Γ(1/2).
    assert _column(table, "effect")[0] == "+1.13"
    assert _column(table, "Wilcoxon p") == [".250", "1.000", "-"]
    assert _column(table, "slides p")[:2] == ["1.000", "1.000"]  # the same predictions


def test_all_tables__stability__has_ratios_to_none(tables):
    table = tables["stability"]

    assert _column(table, "early") == ["10.000±.000", "5.000±.000"]
    assert _column(table, "early ratio") == ["-", ".50"]
    assert _column(table, "late ratio") == ["-", "1.00"]
    assert _column(tables["concentration"], "entropy") == [".900±.000"] * 2
    assert _column(tables["localization"], "AUROC") == [".800±.000"] * 2


def test_all_tables__cost__has_time_memory_and_flops(tables):
    assert _column(tables["cost"], "s/epoch") == [".50±.00", "1.00±.00"]
    assert _column(tables["cost"], "s/epoch ratio") == ["-", "2.00"]
    assert _column(tables["cost"], "MB") == ["100.0±.0"] * 2
    assert _column(tables["cost"], "MB ratio") == ["-", "1.00"]
    assert _column(tables["flops"], "training step") == ["3000.0±.0", "6000.0±.0"]
    assert _column(tables["flops"], "training step ratio") == ["-", "2.00"]
    assert _column(tables["flops"], "inference ratio") == ["-", "1.00"]


def test_all_tables__pair_on_two_machines__has_no_ratio_of_time(tmp_path):
    for plugin in ("none", "anchor"):
        measured = {"time__epoch_s": 1.0, "cost__flops_step": 10**9}
        write_run(tmp_path, plugin, environment={"processor": plugin}, **measured)

    tables = {table.name: table for table in all_tables(read_runs(tmp_path), [])}

    assert _column(tables["cost"], "s/epoch ratio") == ["-", "-"]
    assert _column(tables["flops"], "training step ratio") == ["-", "1.00"]


def test_all_tables__run_without_a_metric__is_not_counted_for_it(tmp_path):
    write_run(tmp_path, seed=0, f1=0.5, auroc=0.75)
    write_run(tmp_path, seed=1, f1=0.7, auroc=float("nan"))  # test bags of one class

    (table, *_) = all_tables(read_runs(tmp_path), [])

    assert _column(table, "n") == ["2"]
    assert _column(table, "F1") == [".600±.141"]
    assert _column(table, "AUROC") == [".750 (n=1)"]


def test_all_tables__calibration__comes_from_predictions(tables):
    # Confidence .75 on all four, of which three are right.
    assert _column(tables["calibration"], "ECE") == [".000±.000"] * 2
    assert _column(tables["calibration"], "log loss") == [".500±.000"] * 2
    assert _column(tables["calibration"], "difference") == ["-", ".000"]


def test_all_tables__run_without_predictions__is_not_counted_for_its_calibration(tmp_path):
    write_run(tmp_path, seed=0, f1=0.5, loss=0.5, predictions=SLIDES)
    write_run(tmp_path, seed=1, f1=0.7, loss=0.5)

    tables = {table.name: table for table in all_tables(read_runs(tmp_path), [])}

    assert _column(tables["calibration"], "ECE") == [".000 (n=1)"]
    assert _column(tables["calibration"], "log loss") == [".500±.000"]


def test_all_tables__what_is_not_there__is_named(tables):
    assert _column(tables["unfinished"], "why") == ["ValueError: no slow weights"]
    # Seed 0 has begun, so it is not missing.
    assert [cell.text for cell in tables["missing"].rows[0]] == [
        "musk1",
        "abmil",
        "slow",
        "1",
        "2/0",
    ]


def test_all_tables__runs_without_test__speak_of_validation(tmp_path):
    write_run(tmp_path, val__f1=0.5)

    (table, *_) = all_tables(read_runs(tmp_path), [])

    assert table.title == "Results on validation bags"
    assert _column(table, "F1") == [".500"]


def test_all_tables__one_run_and_nothing_missing__leaves_the_others_empty(tmp_path):
    write_run(tmp_path, f1=0.5)

    filled = [table.name for table in all_tables(read_runs(tmp_path), []) if table.rows]

    assert filled == ["results", "reproduction"]


def test_all_tables__no_progress_asked__all_forms_can_be_made(tables):
    console = Console(width=80, file=io.StringIO())
    for table in tables.values():
        titles = [column.title for column in table.columns]
        assert len(titles) == len(set(titles))
        assert all(len(row) == len(titles) for row in table.rows)
        assert len(list(csv.reader(io.StringIO(as_csv(table))))) == len(table.rows) + 1
        assert as_latex(table).count(r" \\") == len(table.rows) + 1
        assert as_markdown(table).startswith("## ")
        if table.rows and table.name != "reproduction":
            console.print(*map(as_rich, split_by(table, "data")))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]


def test_all_tables__progress__is_given_the_compared_cells(sweep):
    seen = []

    all_tables(read_runs(sweep), [], progress=lambda cells: seen.extend(cells) or cells)

    assert seen == [("musk1", "abmil", "anchor"), ("musk1", "abmil", "slow")]
