from html.parser import HTMLParser

import pytest

from mil_anchor.report.tables import table_html
from mil_anchor.tables import Cell, Column, ResultTable

COLUMNS = [Column("data", False), Column("plug-in", False), Column("F1 [95 %]", True)]


def _html(table):
    return table_html(table, is_open=True)


class _Rows(HTMLParser):
    """Attributes of the rows, and attributes and texts of their cells."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.cells, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append(dict(attrs))
        if tag == "td":
            self.cells.append([dict(attrs), ""])

    def handle_data(self, data):
        if self.cells:
            self.cells[-1][1] += data

    def handle_endtag(self, tag):
        if tag == "tr" and self.cells:
            self.cells.append([{}, ""])


def test_table_html__rows__carry_their_choices_and_full_numbers():
    rows = [
        [Cell("musk1"), Cell("none"), Cell(".70", 0.70123)],
        [Cell("musk1"), Cell("aem"), Cell("-")],
    ]
    read = _Rows(_html(ResultTable("results", "Results", COLUMNS, rows)))

    head, *body = read.rows
    assert "data-data" not in head
    assert [(row["data-data"], row["data-plugin"]) for row in body] == [
        ("musk1", "none"),
        ("musk1", "aem"),
    ]
    numbers = [cell for cell, _ in read.cells if cell.get("data-title") == "F1 [95 %]"]
    assert [cell.get("data-value") for cell in numbers] == ["0.70123", None]
    assert [cell["class"] for cell in numbers] == ["number", "number"]


@pytest.mark.parametrize("value", [float("nan"), None])
def test_table_html__no_number__has_nothing_to_sort_by(value):
    html = _html(ResultTable("t", "T", [Column("F1", True)], [[Cell("-", value)]]))

    assert "data-value" not in html


def test_table_html__hostile_names__stay_text():
    name = "</td><script>alert(1)</script>\" onclick='x'"
    table = ResultTable('"n', name, [Column(name, False)], [[Cell(name)]], name)
    read = _Rows(_html(table))

    assert "script" not in read.tags
    assert read.cells[0] == [
        {"role": "cell", "data-title": name, "class": "wide"},
        name,
    ]


def test_table_html__without_rows__has_headings_and_note():
    html = _html(ResultTable("t", "T", COLUMNS, [], "Nothing & nobody."))

    assert html.count("<th ") == 3
    assert "Nothing &amp; nobody." in html


def test_table_html__closed__says_how_many_rows_it_has():
    table = ResultTable("t", "T", COLUMNS, [[Cell("a"), Cell("b"), Cell("c")]])

    assert table_html(table, is_open=False).startswith('<details class="table"><summary>')
    assert table_html(table, is_open=True).startswith('<details class="table" open><summary>')
    assert ">1 row</span>" in table_html(table, is_open=False)
