"""Tables of results: made once, shown in a terminal, as Markdown, CSV and LaTeX."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "_%&#${}"},
    "±": r"$\pm$",
    "\u00d7": r"$\times$",
    "·": r"$\cdot$",
    "Δ": r"$\Delta$",
    "≤": r"$\leq$",
    "\n": " ",
}


class Cell(NamedTuple):
    """What a table shows in one place.

    Args:
        text: As it is shown.
        value: What it is sorted by and what a CSV file gets, in full precision; None in a text,
            and where there is no number.
    """

    text: str
    value: float | None = None


class Column(NamedTuple):
    """A column: its title, and whether it holds numbers (aligned right) or text."""

    title: str
    is_number: bool


class ResultTable(NamedTuple):
    """A table that does not yet know how it is shown.

    Args:
        name: Stem of its files.
        title: What it shows, in a few words.
        columns: From left to right.
        rows: Each with a cell per column.
        note: How to read it, below it.

    Example:
        >>> table = ResultTable(
        ...     "results",
        ...     "Test metrics",
        ...     [Column("plug-in", False), Column("F1", True)],
        ...     [[Cell("none"), Cell(".700±.100", 0.7)]],
        ... )
        >>> print(as_markdown(table))
        ## Test metrics
        <BLANKLINE>
        | plug-in | F1 |
        | --- | ---: |
        | none | .700±.100 |
        <BLANKLINE>
        >>> print(as_csv(table))
        plug-in,F1,F1 (shown)
        none,0.7,.700±.100
        <BLANKLINE>
    """

    name: str
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    note: str = ""


def number_cell(value: float | int | None, digits: int = 3, *, sign: str = "") -> Cell:
    """A number without its leading zero, as in the papers' tables: that saves width.

    Args:
        value: None, NaN and infinity are no number to show.
        digits: After the point.
        sign: ``"+"``: show the sign of positive numbers, too.
    """
    if value is None or not math.isfinite(value):
        return Cell("-")
    return Cell(_digits(value, digits, sign), value)


def mean_cell(values: Sequence[float | int], digits: int = 3) -> Cell:
    """``mean±sd`` of the values; the mean alone of a single one."""
    if not values:
        return Cell("-")
    shown = [fmean(values), *([stdev(values)] if len(values) > 1 else [])]
    return Cell("±".join(_digits(number, digits, "") for number in shown), shown[0])


def split_by(table: ResultTable, title: str) -> list[ResultTable]:
    """A table for each text of a column, which moves into the titles; the last has the note.

    Raises:
        ValueError: The table has no such column.
    """
    titles = [column.title for column in table.columns]
    if title not in titles:
        raise ValueError(f"The column must be one of {titles}, but {title!r} came.")
    place = titles.index(title)
    parts: dict[str, list[list[Cell]]] = {}
    for row in table.rows:
        parts.setdefault(row[place].text, []).append(row[:place] + row[place + 1 :])
    columns = table.columns[:place] + table.columns[place + 1 :]
    split = [
        ResultTable(table.name, f"{table.title}: {text}", columns, rows)
        for text, rows in parts.items()
    ]
    return [*split[:-1], *(part._replace(note=table.note) for part in split[-1:])]


def as_rich(table: ResultTable) -> Group:
    """The table for a terminal, with its title above and its note below."""
    rich = Table(box=None, pad_edge=False)
    for column in table.columns:
        rich.add_column(
            Text(column.title),
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="fold",
        )
    for row in table.rows:
        rich.add_row(*(Text(cell.text) for cell in row))
    note = [Text(table.note, style="italic")] if table.note else []
    return Group(Text(table.title, style="bold"), rich, *note)


def as_markdown(table: ResultTable) -> str:
    """The table with its title as a heading, and its note."""
    lines = [
        [column.title for column in table.columns],
        ["---:" if column.is_number else "---" for column in table.columns],
        *([cell.text for cell in row] for row in table.rows),
    ]
    # A "<" before a letter would begin an element of HTML, which is not shown.
    cells = (
        [re.sub(r"\||<(?=[a-zA-Z/!?])", r"\\\g<0>", cell).replace("\n", " ") for cell in line]
        for line in lines
    )
    drawn = "".join(f"| {' | '.join(line)} |\n" for line in cells)
    note = f"\n{table.note}\n" if table.note else ""
    return f"## {table.title}\n\n{drawn if table.rows else 'None.'}{note}"


def as_csv(table: ResultTable) -> str:
    """The numbers in full precision, and beside them what is shown where that is more."""
    more = [
        column.is_number and any(_shows_more(row[place]) for row in table.rows)
        for place, column in enumerate(table.columns)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    titles = (
        [column.title, f"{column.title} (shown)"] if is_more else [column.title]
        for column, is_more in zip(table.columns, more, strict=True)
    )
    writer.writerow([title for own in titles for title in own])
    for row in table.rows:
        line: list[str | float | None] = []
        for cell, column, is_more in zip(row, table.columns, more, strict=True):
            line += [cell.value if column.is_number else cell.text]
            line += [cell.text] if is_more else []
        writer.writerow(line)
    return text.getvalue()


def as_latex(table: ResultTable) -> str:
    r"""The table as a float for a paper; it needs ``\usepackage{booktabs}``.

    Source:
        The rules of the package booktabs (S. Fear): no vertical lines, three horizontal ones.
    """
    kinds = "".join("r" if column.is_number else "l" for column in table.columns)
    caption = f"{table.title}. {table.note}" if table.note else table.title
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(caption)}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\toprule",
            _latex_line([column.title for column in table.columns]),
            r"\midrule",
            *(_latex_line([cell.text for cell in row]) for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def write_tables(tables: Sequence[ResultTable], folder: Path) -> Path:
    """Write ``results.md`` with all tables, and ``tables/NAME.csv`` and ``.tex`` for each.

    Returns:
        The Markdown file.
    """
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for table in tables:
        (folder / "tables" / f"{table.name}.csv").write_text(as_csv(table), encoding="utf-8")
        (folder / "tables" / f"{table.name}.tex").write_text(as_latex(table), encoding="utf-8")
    file = folder / "results.md"
    text = "\n".join(["# Results\n", *map(as_markdown, tables)])
    file.write_text(text, encoding="utf-8")
    return file


def _shows_more(cell: Cell) -> bool:
    """Whether the text has more in it than the value's digits."""
    try:
        float(cell.text)
    except ValueError:
        return cell.value is not None
    return False


def _escaped(text: str) -> str:
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return f"$-${escaped[1:]}" if re.match(r"-[.\d]", escaped) else escaped  # a minus, no hyphen


def _latex_line(texts: Sequence[str]) -> str:
    # A line that begins with [ would be taken for the argument of the \\ before it.
    cells = [f"{{{own}}}" if own.startswith("[") else own for own in map(_escaped, texts)]
    return f"{' & '.join(cells)} \\\\"


def _digits(number: float | int, digits: int, sign: str) -> str:
    text = f"{number:{sign}.{digits}f}"
    if float(text) == 0:  # neither sign says anything
        text = text.lstrip("+-")
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text
