import io
import json

import pytest
from rich.console import Console

from mil_anchor.__main__ import main
from mil_anchor.callbacks.monitor import AttentionRow
from mil_anchor.figures import jsd_figure
from mil_anchor.results import (
    attention_summary,
    by_cell,
    read_runs,
    results_markdown,
    results_tables,
)


def _write_run(root, plugin, fold, f1, *, jsd=0.1):
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
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = ["epoch,bag_id,jsd,entropy", "0,a,,0.5", f"1,a,{jsd},0.5", f"2,a,{jsd / 2},0.5"]
    (folder / "attention.csv").write_text("\n".join(rows) + "\n")


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


def test_results__attention_summary__is_mean_jsd_and_last_entropy():
    rows = [
        AttentionRow(0, "a", None, 0.9),
        AttentionRow(1, "a", 0.2, 0.6),
        AttentionRow(1, "b", 0.4, 0.8),
    ]

    assert attention_summary(rows) == pytest.approx(
        {"attention/jsd": 0.3, "attention/entropy": 0.7}
    )
    assert attention_summary(rows[:1]) == {"attention/entropy": 0.9}
    assert attention_summary([]) == {}


def test_results__folder_without_runs__is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold complete runs, but there is no metrics\.json"):
        read_runs(tmp_path)


def test_figures__jsd__draws_a_line_for_each_plugin(root, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, dpi: drawn.append(self))

    jsd_figure(read_runs(root), root / "jsd.png")

    (axis,) = drawn[0].axes
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines) == ["none", "anchor_nsf"]
    assert list(lines["anchor_nsf"].get_xdata()) == [1, 2]
    assert list(lines["anchor_nsf"].get_ydata()) == pytest.approx([0.015, 0.0075])
    assert axis.get_yscale() == "log"
    assert "nats" in axis.get_ylabel()


def test_command_line__report_and_figures__work_on_a_folder(root, capsys):
    assert main(["report", str(root)]) == 0
    assert "transmil" in capsys.readouterr().out
    assert (root / "results.md").read_text() == results_markdown(read_runs(root))
    assert main(["figures", str(root)]) == 0
    assert (root / "jsd.png").read_bytes().startswith(b"\x89PNG")


def test_command_line__wrong_folder__says_so_and_exits_with_1(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "must hold complete runs" in capsys.readouterr().err
