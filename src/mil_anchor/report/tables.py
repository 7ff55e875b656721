"""Result tables as HTML that sorts and filters."""

from collections.abc import Sequence
from html import escape

from mil_anchor.tables import Cell, Column, ResultTable

# Columns that the page's drop-downs choose rows by, and the names of these choices.
_CHOICES = {"data": "data", "model": "model", "plug-in": "plugin"}
# Characters that have room in half of a card, heading and content together.
_HALF_CARD = 20


def table_html(table: ResultTable, *, is_open: bool) -> str:
    """One table under its title, which opens and closes it.

    Each heading of a column is a button; a row carries its data set, model and plug-in for the
    page's drop-downs, and each number its full precision, to be sorted by. Roles are spelled out,
    for a narrow screen lays a row out as a card, and that takes away the meaning of the elements.
    """
    name = escape(table.name)
    heads = "".join(map(_head, table.columns))
    kinds = [_kinds(table, place) for place in range(len(table.columns))]
    rows = "".join(_row(table.columns, row, kinds) for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    n_rows = f"{len(table.rows)} row{'s' * (len(table.rows) != 1)}"
    return (
        f'<details class="table"{" open" * is_open}>'
        f'<summary><h3 id="table-{name}">{escape(table.title)}</h3> '
        f'<span class="aside">{n_rows}</span></summary>'
        f'<div class="scroll" role="region" aria-labelledby="table-{name}" tabindex="0">'
        f'<table role="table" aria-labelledby="table-{name}">'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{rows}</tbody></table></div>'
        f'<p class="none" hidden>No row of this table is left by the filters.</p>{note}</details>'
    )


def _head(column: Column) -> str:
    kind = ' class="number"' if column.is_number else ""
    return (
        f'<th scope="col" role="columnheader" aria-sort="none"{kind}>'
        f'<button type="button">{escape(column.title)}</button></th>'
    )


def _kinds(table: ResultTable, place: int) -> str:
    """Classes of a column's cells."""
    column = table.columns[place]
    longest = max((len(row[place].text) for row in table.rows), default=0)
    is_wide = len(column.title) + longest > _HALF_CARD
    return " ".join(["number"] * column.is_number + ["wide"] * is_wide)


def _row(columns: Sequence[Column], row: Sequence[Cell], kinds: Sequence[str]) -> str:
    chosen = "".join(
        f' data-{_CHOICES[column.title]}="{escape(cell.text)}"'
        for column, cell in zip(columns, row, strict=True)
        if column.title in _CHOICES
    )
    cells = "".join(map(_cell, columns, row, kinds))
    return f'<tr role="row"{chosen}>{cells}</tr>'


def _cell(column: Column, cell: Cell, kinds: str) -> str:
    kind = f' class="{kinds}"' if kinds else ""
    value = f' data-value="{cell.value!r}"' if cell.value == cell.value is not None else ""
    title = escape(column.title)
    return f'<td role="cell" data-title="{title}"{kind}{value}>{escape(cell.text)}</td>'
