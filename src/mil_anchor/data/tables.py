"""Tables of text on disk."""

import csv
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a table with a header.

    Args:
        path: As in `read_cells`. A row may be shorter than the header.

    Returns:
        At least one row, as a mapping from column to cell.

    Raises:
        ValueError: As `read_cells`, and if there is no row, a row is longer than the header, or two
            columns have one name.
    """
    lines = read_cells(path)
    if len(lines) < 2:
        raise ValueError(
            f"A table needs a header and a row, but {path} has {len(lines)} lines. Fill it."
        )
    header, *cells = lines
    check_once([column for column in header if column], what=f"column of {path}")
    for line in cells:
        if any(line[len(header) :]):
            raise ValueError(
                f"A row must not be longer than the header, but {path} has the row {line} under "
                f"{header}. Put cells that hold a separator in quotes."
            )
    return [
        dict(zip(header, line + [""] * (len(header) - len(line)), strict=False)) for line in cells
    ]


def read_cells(path: Path) -> list[list[str]]:
    """Read a table without spaces around its cells and without its empty lines.

    Args:
        path: A file with commas, or with tabs if it ends in ``.tsv``.

    Returns:
        The cells of every line.

    Raises:
        ValueError: If there is no such file, or it is no text in UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"A table must be a file, but {path} is none. Check the path.")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        # Excel begins a file with a byte order mark, which "utf-8-sig" drops.
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [
                [cell.strip() for cell in line] for line in csv.reader(file, delimiter=delimiter)
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"A table must be text in UTF-8, but {path} is not ({error}). Save it as CSV UTF-8."
        ) from error
    return [line for line in lines if any(line)]


def require_columns(
    rows: Sequence[Mapping[str, str]], columns: Collection[str], *, source: Path | str
) -> None:
    """Refuse a table without certain columns.

    Args:
        rows: The rows, at least one.
        columns: The columns that must be there.
        source: The file, or where else the rows are from, for the error.

    Raises:
        ValueError: If one is missing.
    """
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise ValueError(
            f"A table must have the columns {list(columns)}, but {source} lacks {missing} and has "
            f"{list(rows[0])}. Rename a column or name another one; cells are separated by commas, "
            "in .tsv files by tabs."
        )


def check_once(names: Sequence[str], *, what: str) -> None:
    """Refuse a name that comes twice.

    Args:
        names: The names.
        what: What they name, for the error.

    Raises:
        ValueError: If a name comes twice.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"Every {what} must come once, but {repeated} come twice. Rename one.")
