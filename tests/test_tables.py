import csv
import io
import re

import pytest
from rich.console import Console

from mil_anchor.tables import (
    Cell,
    Column,
    ResultTable,
    as_csv,
    as_latex,
    as_markdown,
    as_rich,
    mean_cell,
    number_cell,
    split_by,
    write_tables,
)

TABLE = ResultTable(
    "results",
    "Results & more",
    [
        Column("data", is_number=False),
        Column("plug-in", is_number=False),
        Column("F1", is_number=True),
    ],
    [
        [Cell("musk1"), Cell("anchor_nsf (a=[x|y], 50 %)"), Cell(".700±.100", 2 / 3)],
        [Cell("musk2"), Cell("[bold]none[/bold]"), Cell("-")],
    ],
    note="Mean±sd.",
)


def _printed(renderable, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_as_rich__brackets_in_names__are_no_markup():
    text = _printed(as_rich(TABLE))

    assert "[bold]none[/bold]" in text
    assert text.startswith("Results & more\n")
    assert text.rstrip().endswith("Mean±sd.")


def test_as_rich__too_narrow__folds_names_and_keeps_numbers_whole():
    text = _printed(as_rich(TABLE), width=34)

    assert ".700±.100" in text
    assert max(map(len, text.splitlines())) <= 34


def test_as_markdown__bars_in_names__do_not_make_columns():
    head, _, titles, rule, first, second, _, note = as_markdown(TABLE).splitlines()

    assert head == "## Results & more"
    assert titles == "| data | plug-in | F1 |"
    assert rule == "| --- | --- | ---: |"
    assert first == "| musk1 | anchor_nsf (a=[x\\|y], 50 %) | .700±.100 |"
    assert second == "| musk2 | [bold]none[/bold] | - |"
    assert note == "Mean±sd."


def test_as_markdown__less_than_before_a_letter__begins_no_element():
    why = Cell("ValueError: <class 'int'> is < 3 and <.001")

    text = as_markdown(ResultTable("unfinished", "Failed", [Column("why", False)], [[why]]))

    assert "| ValueError: \\<class 'int'> is < 3 and <.001 |" in text


def test_as_markdown__no_rows__says_none():
    assert "None." in as_markdown(TABLE._replace(rows=[]))


def test_as_csv__read_back__has_full_precision_and_what_is_shown():
    first, second = csv.DictReader(io.StringIO(as_csv(TABLE)))

    assert float(first["F1"]) == 2 / 3
    assert first["F1 (shown)"] == ".700±.100"
    assert first["plug-in"] == "anchor_nsf (a=[x|y], 50 %)"
    assert second["F1"] == ""


def test_as_csv__numbers_shown_alone__stand_in_one_column():
    table = TABLE._replace(columns=[Column("p", is_number=True)], rows=[[Cell(".062", 0.0625)]])

    assert as_csv(table) == "p\n0.0625\n"


def test_as_latex__special_characters__are_escaped_and_environments_balanced():
    rows = [[Cell("a_b"), Cell(r"50 % & #1 {x} ~ ^ \ $ < > |"), Cell("-.100±.2", -0.1)]]
    text = as_latex(TABLE._replace(rows=rows))

    assert re.findall(r"\\begin\{(\w+)\}", text) == ["table", "tabular"]
    assert re.findall(r"\\end\{(\w+)\}", text) == ["tabular", "table"]
    assert [rule for rule in ("toprule", "midrule", "bottomrule") if text.count(rule) == 1] == [
        "toprule",
        "midrule",
        "bottomrule",
    ]
    (row,) = [line for line in text.splitlines() if line.startswith("a")]
    assert row == (
        r"a\_b & 50 \% \& \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$ "
        r"\textless{} \textgreater{} \textbar{} & $-$.100$\pm$.2 \\"
    )
    assert r"\caption{Results \& more. Mean$\pm$sd.}" in text
    assert r"\begin{tabular}{llr}" in text


def test_as_latex__row_that_begins_with_a_bracket__is_no_argument_of_the_line_before():
    text = as_latex(TABLE._replace(rows=[[Cell("[x]"), Cell("-"), Cell("-")]]))

    assert r"{[x]} & - & - \\" in text


def test_split_by__column__goes_into_titles_and_note_to_the_last():
    first, second = split_by(TABLE, "data")

    assert first.title == "Results & more: musk1"
    assert [column.title for column in first.columns] == ["plug-in", "F1"]
    assert first.rows == [TABLE.rows[0][1:]]
    assert (first.note, second.note) == ("", "Mean±sd.")


def test_split_by__other_column__is_refused():
    with pytest.raises(ValueError, match=r"must be one of \['data', 'plug-in', 'F1'\], but 'seed'"):
        split_by(TABLE, "seed")


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [
        (0.5, "", ".500"),
        (-0.5, "", "-.500"),
        (0.5, "+", "+.500"),
        (10.25, "+", "+10.250"),
        (0.99999, "", "1.000"),
        (-1e-9, "+", ".000"),
        (0.0, "+", ".000"),
        (None, "+", "-"),
        (float("nan"), "", "-"),
        (float("-inf"), "", "-"),
    ],
)
def test_number_cell__value__is_short_and_keeps_its_precision(value, sign, text):
    cell = number_cell(value, sign=sign)

    assert cell.text == text
    assert cell.value == (None if text == "-" else value)


def test_mean_cell__values__have_the_sample_sd():
    assert mean_cell([0.8, 0.6]) == Cell(".700±.141", 0.7)
    assert mean_cell([0.8]) == Cell(".800", 0.8)
    assert mean_cell([2, 4], 1) == Cell("3.0±1.4", 3)
    assert mean_cell([]) == Cell("-")


def test_write_tables__folder__has_all_forms(tmp_path):
    other = TABLE._replace(name="cost", title="Cost", rows=[])
    file = write_tables([TABLE, other], tmp_path / "out")

    assert file == tmp_path / "out" / "results.md"
    text = file.read_text(encoding="utf-8")
    assert text.index("# Results\n") < text.index("## Results & more") < text.index("## Cost")
    assert {path.name for path in (tmp_path / "out" / "tables").iterdir()} == {
        "results.csv",
        "results.tex",
        "cost.csv",
        "cost.tex",
    }
