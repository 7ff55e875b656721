"""Split files on disk: CLAM's, Patho-Bench's, ACMIL's, torchmil's and ours."""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mil_anchor.data.labels import PARTS, LabelTable, part_name, slide_name
from mil_anchor.data.splits import Split, check_split, split_by_parts
from mil_anchor.data.tables import read_rows

Layout = Literal["plain", "clam"]
_Named = list[tuple[str, str | None]]  # slides as a file names them, and their parts

# What a folder holds for one fold, by layout.
_CLAM_FILE = "splits_{fold}.csv"
_PLAIN_FILE = "fold_{fold}.csv"
_FOLD_FILES = (_CLAM_FILE, _PLAIN_FILE, "split_{fold}.json")
_SHARED_FILES = ("k=all.tsv", "splits.csv")
_FOLD_COLUMN = re.compile(r"fold_\d+")


def read_split(
    path: Path, table: LabelTable, *, fold: int = 0, val_fraction: float, seed: int
) -> Split:
    """Read one fold of a split that lies on disk.

    Known are, by what the file holds: CLAM's ``splits_<fold>.csv`` (columns train, val and test),
    Patho-Bench's ``k=all.tsv`` (columns fold_0, fold_1, ...), ACMIL's ``split_<fold>.json``
    (train_names, val_names and test_names), torchmil's ``splits.csv`` (columns bag_name and split)
    and tables with the columns slide_id and split, among them ours, ``fold_<fold>.csv``. Names may
    carry the suffix of a slide or feature file.

    Args:
        path: The file, or the folder that holds it under the name above.
        table: The slides.
        fold: The fold; in a folder of ACMIL's files, the number in the file's name.
        val_fraction: Share of the training slides that is drawn for validation if the file names no
            slide for it.
        seed: Seed of that draw.

    Returns:
        The split, its indices sorted. Slides that the file does not name are left out, with a
        warning.

    Raises:
        ValueError: If the file cannot be found or read, it names a slide that is not in the table
            or names one twice, it does not hold the fold, and as `check_split`.

    Source:
        The files that Patho-Bench, CLAM, ACMIL and torchmil write, from their descriptions.
    """
    path = _find(path, fold=fold)
    if path.suffix.lower() == ".json":
        _check_fold(path, fold=fold)
        named = _named_in_json(path)
    else:
        named = _named_in_table(path, fold=fold)
    parts = _part_of_slides(named, table, path=path)
    own = [parts.get(slide_id) for slide_id in table.slide_ids]
    return split_by_parts(replace(table, parts=own), val_fraction=val_fraction, seed=seed)


def write_split(
    split: Split, table: LabelTable, *, folder: Path, fold: int = 0, layout: Layout = "plain"
) -> Path:
    """Write a split so that `read_split` gives it back.

    Args:
        split: The split.
        table: The slides that its indices count.
        folder: Folder of the file; it is made if it is not there.
        fold: Number of the fold in the file's name.
        layout: ``plain`` for ``fold_<fold>.csv`` with the columns slide_id, case_id, label and
            split, which is a label table, too; or ``clam`` for ``splits_<fold>.csv`` with the
            columns train, val and test.

    Returns:
        The file.

    Raises:
        ValueError: As `check_split`.
    """
    check_split(split, table)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "clam":
        path = folder / _CLAM_FILE.format(fold=fold)
        columns = [[table.slide_ids[index] for index in split.parts[part]] for part in PARTS]
        length = max(len(column) for column in columns)
        padded = [column + [""] * (length - len(column)) for column in columns]
        _write_rows(path, ["", *PARTS], zip(range(length), *padded, strict=True))
        return path
    path = folder / _PLAIN_FILE.format(fold=fold)
    part_of = {index: part for part, indices in split.parts.items() for index in indices}
    rows = zip(
        table.slide_ids,
        table.cases,
        [table.classes[label] for label in table.labels],
        [part_of.get(index, "") for index in range(len(table.slide_ids))],
        strict=True,
    )
    _write_rows(path, ["slide_id", "case_id", "label", "split"], rows)
    return path


def _find(path: Path, *, fold: int) -> Path:
    if not path.exists():
        raise ValueError(f"A split must lie in a file or folder, but {path} is none. Check it.")
    if path.is_file():
        return path
    names = [*(name.format(fold=fold) for name in _FOLD_FILES), *_SHARED_FILES]
    found = [path / name for name in names if (path / name).is_file()]
    if len(found) != 1:
        there = sorted(file.name for file in path.iterdir())[:10]
        raise ValueError(
            f"A folder of splits must hold one of {names}, but {path} holds "
            f"{[file.name for file in found] or there}. Give the file, or another fold."
        )
    return found[0]


def _named_in_json(path: Path) -> _Named:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"A split file must be JSON in UTF-8, but {path} is not ({error}). Write it again."
        ) from error
    keys = {f"{part}_names": part for part in PARTS}
    lists = {key: content[key] for key in keys if isinstance(content, dict) and key in content}
    if not lists or not all(isinstance(names, list) for names in lists.values()):
        raise ValueError(
            f"A split in JSON must have the lists {list(keys)}, but {path} begins with "
            f"{str(content)[:80]!r}. Name its lists like that."
        )
    return [(str(name), keys[key]) for key, names in lists.items() for name in names]


def _named_in_table(path: Path, *, fold: int) -> _Named:
    rows = read_rows(path)
    columns = rows[0].keys()
    folds = [column for column in columns if _FOLD_COLUMN.fullmatch(column)]
    if folds and "slide_id" in columns:
        if f"fold_{fold}" not in folds:
            raise ValueError(
                f"A split file must hold the fold that is asked for, but {path} has {folds} and "
                f"fold {fold} came. Choose one of them."
            )
        return _pairs(rows, "slide_id", f"fold_{fold}", path=path)
    _check_fold(path, fold=fold)
    for name in ("slide_id", "bag_name"):
        if {name, "split"} <= columns:
            return _pairs(rows, name, "split", path=path)
    if not set(PARTS) <= columns:
        raise ValueError(
            "A split table must have the columns train, val and test; slide_id and fold_0, ...; "
            f"slide_id and split; or bag_name and split. But {path} has {list(columns)}. Rename "
            "its columns."
        )
    named: _Named = [(row[part], part) for part in PARTS for row in rows if row[part]]
    if {name.lower() for name, _ in named} <= {"true", "false"}:
        raise ValueError(
            f"A split file of CLAM must list slides, but {path} holds True and False. Give the "
            "file without _bool in its name, which lies beside it."
        )
    return named


def _check_fold(path: Path, *, fold: int) -> None:
    # A file of one split would serve every fold alike: a sweep over folds would repeat one run.
    number = re.search(r"_(\d+)$", path.stem)
    if fold and (number is None or int(number.group(1)) != fold):
        raise ValueError(
            f"A split file must hold the fold that is asked for, but {path} holds one split and "
            f"fold {fold} came. Leave fold at 0, or give a folder with a file per fold."
        )


def _pairs(rows: Sequence[Mapping[str, str]], name: str, part: str, *, path: Path) -> _Named:
    return [
        (row[name], part_name(row[part], where=f" for slide {row[name]!r} in {path}"))
        for row in rows
    ]


def _part_of_slides(named: _Named, table: LabelTable, *, path: Path) -> dict[str, str | None]:
    known = set(table.slide_ids)
    parts_of: dict[str, list[str | None]] = {}
    for name, part in named:
        slide_id = name if name in known else slide_name(name)
        parts_of.setdefault(slide_id, []).append(part)
    unknown = [slide_id for slide_id in parts_of if slide_id not in known]
    if unknown:
        raise ValueError(
            f"A split must name slides of the label table only, but {path} names {len(unknown)} "
            f"others: {unknown[:10]}. Add them to the table, or take them out of the split; the "
            f"table has {table.slide_ids[:3]}, ..."
        )
    repeated = [
        f"{slide_id!r} in {' and '.join(part or 'no part' for part in parts)}"
        for slide_id, parts in parts_of.items()
        if len(parts) > 1
    ]
    if repeated:
        raise ValueError(
            f"A split must name a slide once, but {path} names {len(repeated)} more often: "
            f"{', '.join(repeated[:5])}. Keep every slide in one part."
        )
    return {slide_id: parts[0] for slide_id, parts in parts_of.items()}


def _write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
