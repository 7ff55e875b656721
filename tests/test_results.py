import io
import json

import pytest
from rich.console import Console

from mil_anchor.__main__ import main
from mil_anchor.callbacks.monitor import AttentionRow
from mil_anchor.results import (
    attention_summary,
    by_cell,
    read_runs,
    results_markdown,
    results_tables,
)


def _write_run(root, plugin, fold, f1, *, jsd=0.1, weights="online"):
    folder = root / plugin / f"fold={fold}"
    folder.mkdir(parents=True)
    metrics = {
        "model": "transmil",
        "plugin": plugin,
        "data": "musk1",
        "seed": 0,
        "fold": fold,
        "test/f1": f1,
        "test/auroc": 0.5,
        "test/accuracy": 0.25,
        "attention/jsd": jsd,
        "weights": weights,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def root(tmp_path):
    _write_run(tmp_path, "anchor_nsf", 0, 0.8, jsd=0.01)
    _write_run(tmp_path, "anchor_nsf", 1, 0.6, jsd=0.02)
    _write_run(tmp_path, "none", 0, 0.7)
    (tmp_path / "interrupted").mkdir()
    return tmp_path


def _text(table):
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_results__table__has_mean_and_sd_over_runs_and_none_first(root):
    (table,) = results_tables(read_runs(root))
    text = _text(table)
    none, anchor = (
        next(line for line in text.splitlines() if f" {p} " in line) for p in ("none", "anchor_nsf")
    )

    assert text.index(none) < text.index(anchor)
    assert ".700±.141" in anchor  # of .8 and .6
    assert "15.00±7.07" in anchor
    assert " .700 " in none
    assert "±" not in none
    assert none.rstrip().endswith("-")  # no entropy
    assert max(map(len, text.splitlines())) <= 80


def test_results__markdown__holds_the_same_numbers(root):
    head, rule, none, anchor = results_markdown(read_runs(root)).splitlines()

    assert head.startswith("| data | model | plug-in | runs | F1 |")
    assert rule.count("---") == head.count("|") - 1
    assert none.startswith("| musk1 | transmil | none | 1 | .700 | .500 | .250 | 100.00 |")
    assert anchor.startswith("| musk1 | transmil | anchor_nsf | 2 | .700±.141 |")


def test_results__cells__are_sorted_with_none_first(root):
    assert [cell[2] for cell in by_cell(read_runs(root))] == ["none", "anchor_nsf"]


def _row(epoch, bag_id, jsd=None, *, entropy=0.5, correlation=None, auroc=None):
    return AttentionRow(epoch, bag_id, "online", jsd, correlation, entropy, 0.1, 0.2, auroc)


def test_results__attention_summary__is_mean_jsd_and_the_other_measures_of_the_last_epoch():
    rows = [
        _row(0, "a", entropy=0.9, auroc=0.1),
        _row(1, "a", 0.2, entropy=0.6, correlation=0.5, auroc=0.7),
        _row(1, "b", 0.4, entropy=0.8, correlation=0.7),
    ]

    of_last = {"attention/top1pct": 0.1, "attention/top10": 0.2}
    assert attention_summary(rows) == pytest.approx(
        {
            "attention/jsd": 0.3,
            "attention/jsd_last_third": 0.3,
            "attention/rank_correlation": 0.6,
            "attention/entropy": 0.7,
            "attention/auroc": 0.7,
            **of_last,
        }
    )
    assert attention_summary(rows[:1]) == {
        "attention/entropy": 0.9,
        "attention/auroc": 0.1,
        **of_last,
    }
    assert attention_summary([]) == {}


@pytest.mark.parametrize(("n_epochs", "first"), [(2, 1), (3, 2), (4, 2), (50, 33)])
def test_results__last_third__is_rounded_up_to_whole_epochs(n_epochs, first):
    rows = [_row(epoch, "a", epoch if epoch else None) for epoch in range(n_epochs)]

    expected = sum(range(first, n_epochs)) / (n_epochs - first)
    assert attention_summary(rows)["attention/jsd_last_third"] == pytest.approx(expected)


def test_results__folder_without_runs__is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold complete runs, but there is no metrics\.json"):
        read_runs(tmp_path)


def test_results__weights__say_what_the_runs_were_evaluated_with(tmp_path):
    for fold, weights in enumerate(("slow", "online")):
        _write_run(tmp_path, "anchor", fold, 0.5, weights=weights)
    _write_run(tmp_path, "slow_anchor_nsf", 0, 0.5, weights="slow")
    runs = read_runs(tmp_path)

    lines = results_markdown(runs).splitlines()
    (mixed,), (alike,) = results_tables(runs), results_tables(runs[-1:])

    assert [line.split(" | ")[-1] for line in (lines[0], *lines[2:])] == [
        "weights |",
        "online, slow |",
        "slow |",
    ]
    assert list(mixed.columns[-1].cells) == ["online, slow", "slow"]
    assert mixed.title == "musk1: mean±sd over n runs"
    assert alike.title == "musk1: mean±sd over n runs, slow weights"
    assert len(alike.columns) == len(mixed.columns) - 1


def test_command_line__report__works_on_a_folder(root, capsys):
    assert main(["report", str(root)]) == 0
    assert "transmil" in capsys.readouterr().out
    assert (root / "results.md").read_text() == results_markdown(read_runs(root))


def test_command_line__wrong_folder__says_so_and_exits_with_1(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "must hold complete runs" in capsys.readouterr().err
