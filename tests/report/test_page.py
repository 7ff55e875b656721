import json
import logging
import re
import sys
from html import unescape

import pytest

from mil_anchor.figures.style import COLORS
from mil_anchor.report import write_report
from mil_anchor.results import Unfinished, read_runs, read_unfinished
from mil_anchor.tables import Cell, Column, ResultTable
from tests.report.run_folders import write_predictions, write_run

HOSTILE = "</script><u>&'\"$data"
TABLE = ResultTable("results", "Results", [Column("data", False)], [[Cell("synthetic")]])


def _page(root, **settings):
    file = root / "report.html"
    settings = {"tables": [TABLE], "unfinished": read_unfinished(root), **settings}
    write_report(file, read_runs(root), **settings)
    return file.read_text(encoding="utf-8")


def _data(page):
    (text,) = re.findall(r'<script type="application/json" id="report-data">(.*?)</script>', page)
    return json.loads(text)


def test_write_report__run_that_was_begun__is_not_counted_as_missing(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, seed=seed)
    write_run(tmp_path, plugin="anchor")
    begun = Unfinished(tmp_path / "begun", "abmil", "anchor", "synthetic", 1, 0, "interrupted")

    page = _page(tmp_path, unfinished=[begun])

    assert '<li class="unfinished"><b>1</b> unfinished</li>' in page
    assert '<li class="missing zero"><b>0</b> missing</li>' in page


def test_write_report__runs__are_counted_and_named(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, seed=1)
    write_run(tmp_path, plugin="anchor")
    gone = Unfinished(tmp_path / "gone", "abmil", "aem", "synthetic", None, 0, "interrupted")

    page = _page(tmp_path, unfinished=[gone])

    for count in ("complete", "unfinished", "missing"):
        n = {"complete": 3, "unfinished": 1, "missing": 1}[count]
        assert f'<li class="{count}"><b>{n}</b> {count}</li>' in page
    assert "<dt>plug-ins</dt><dd>none, anchor</dd>" in page
    assert "by mil_anchor" in page
    assert "<option>none</option><option>anchor</option></select>" in page


def test_write_report__data__has_what_every_run_kept(tmp_path):
    write_run(tmp_path, plugin="anchor")
    write_run(tmp_path, keeps=())

    data = _data(_page(tmp_path))

    bare, full = data["runs"]
    assert (bare["plugin"], full["plugin"]) == ("none", "anchor")
    assert (bare["attention"], bare["learning"], bare["reliability"]) == ({}, {}, None)
    assert full["attention"]["jsd"] == [None, 0.05, 0.025, 0.0125]
    assert full["draw"] == "seed 0, fold 0"
    assert len(data["slides"]) == 1
    assert data["colors"]["light"] == list(COLORS)
    assert len(data["colors"]["dark"]) == len(COLORS)
    assert data["plugins"]["none"] == {"color": 0, "dash": "solid"}


def test_write_report__one_run_that_kept_nothing__is_a_page(tmp_path):
    write_run(tmp_path, keeps=())

    data = _data(_page(tmp_path, tables=[]))

    assert len(data["runs"]) == 1
    assert data["slides"] == []


def test_write_report__hostile_names__neither_end_a_script_nor_become_markup(tmp_path):
    folder = write_run(tmp_path, slides=[HOSTILE], weights=HOSTILE)
    metrics = json.loads((folder / "metrics.json").read_text())
    names = dict.fromkeys(("model", "data", "plugin"), HOSTILE)
    (folder / "metrics.json").write_text(json.dumps(metrics | names))
    table = ResultTable("results", HOSTILE, [Column("data", False)], [[Cell(HOSTILE)]])
    failed = Unfinished(tmp_path, HOSTILE, HOSTILE, HOSTILE, 0, 0, HOSTILE)

    page = _page(tmp_path, tables=[table], unfinished=[failed])

    assert HOSTILE not in page
    assert "<u>&" not in page
    assert _data(page)["runs"][0]["model"] == HOSTILE
    assert _data(page)["slides"][0]["bag"] == HOSTILE
    assert f"<option>{HOSTILE}</option>" in unescape(page)


def test_write_report__names_that_are_no_text__are_written_all_the_same(tmp_path):
    folder = write_run(tmp_path, data="cafe")
    file = folder / "metrics.json"
    file.write_text(file.read_text().replace("cafe", "caf\\udce9"))

    assert "caf?" in _page(tmp_path, unfinished=[])


def test_write_report__numbers_that_are_none__leave_valid_json(tmp_path):
    folder = write_run(tmp_path)
    file = folder / "attention.csv"
    file.write_text(file.read_text().replace("0.05", "nan"))

    data = _data(_page(tmp_path))

    assert data["runs"][0]["attention"]["jsd"] == [None, None, 0.025, 0.0125]


def test_write_report__files_that_cannot_be_read__cost_their_part_only(tmp_path, caplog):
    folder = write_run(tmp_path)
    write_predictions(folder, [0.5, float("nan")])
    (folder / "attention.csv").write_text("epoch,bag_id\n")

    with caplog.at_level(logging.WARNING):
        (run,) = _data(_page(tmp_path))["runs"]

    assert (run["attention"], run["reliability"]) == (None, None)
    assert run["learning"]
    assert "must have the columns of attention.csv" in caplog.text


def test_write_report__page__names_no_other_place(tmp_path):
    write_run(tmp_path)

    page = _page(tmp_path)

    # Our own part: plotly.js names its web pages, but the policy lets no request out.
    own = re.sub(r"<script>/\*\*\s+\* plotly.js.*?</script>", "", page, flags=re.S)
    assert len(own) < len(page) / 4
    assert set(re.findall(r"\bhttps?://[^\s\"'<>]+", own)) == {"http://www.w3.org/2000/svg"}
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy
    assert re.search(r"script-src ('sha256-[^']+' ?){4}$", policy)


def test_write_report__again__replaces_the_page_and_leaves_nothing_else(tmp_path):
    root = tmp_path / "runs"
    write_run(root)
    (tmp_path / "report.html").write_text("old")
    write_report(tmp_path / "report.html", read_runs(root), tables=[])

    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "runs"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") != "old"


def test_write_report__many_runs__stays_small(tmp_path):
    for seed in range(40):
        write_run(tmp_path, seed=seed, keeps=("attention", "logs", "predictions", "environment"))

    # plotly.js has 4.8 MB.
    assert len(_page(tmp_path)) < 5.2e6


def test_write_report__no_run__is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one complete run, but none came"):
        write_report(tmp_path / "report.html", [], tables=[])


def test_report__without_plotly__says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mil_anchor.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)

    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[report\]'"):
        __import__("mil_anchor.report")
