"""Labels and splits of public cohorts, by the rules of their names and folders."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from mil_anchor.data.labels import LabelTable, part_name, slide_name, table_of_rows
from mil_anchor.data.tables import read_cells, read_rows, require_columns

_CAMELYON16_ID = re.compile(r"(normal|tumor|test)_\d{3}", re.IGNORECASE)
_CAMELYON16_CLASSES = {
    "normal": "normal",
    "tumor": "tumor",
    "Normal": "normal",
    "Tumor": "tumor",
    "0": "normal",
    "1": "tumor",
    "normal_tissue": "normal",
    "tumor_tissue": "tumor",
}
_CAMELYON17_ID = re.compile(r"(patient_(0\d\d))_node_\d", re.IGNORECASE)
_CAMELYON17_CLASSES = ("negative", "itc", "micro", "macro")
_CAMELYON17_TEST_CENTRES = (3, 4)
_BRACS_CLASSES = {
    "N": "benign",
    "PB": "benign",
    "UDH": "benign",
    "FEA": "atypical",
    "ADH": "atypical",
    "DCIS": "malignant",
    "IC": "malignant",
}
_BRACS_TYPE_FOLDER = re.compile(
    rf"(?:type[_ -]?|\d_)?(?P<name>{'|'.join(_BRACS_CLASSES)})", re.IGNORECASE
)
_PART_FOLDER = re.compile(r"(?P<name>train(ing)?|val(id|idation)?|test(ing)?)", re.IGNORECASE)

# Files of slides by id (None where a store does not know one), and the table of labels.
CohortRule = Callable[[Mapping[str, Path | None], Path | None], LabelTable]


def camelyon16(slide_files: Mapping[str, Path | None], labels: Path | None) -> LabelTable:
    """Labels and parts of CAMELYON16 slides: two classes, normal and tumor.

    ``normal_001`` and ``tumor_001`` say their label; ``test_001`` is in the test part, and its
    label is looked up. The others are for training, from which `split_by_parts` draws validation.
    Every slide is its own case.

    Args:
        slide_files: Files of the slides by id.
        labels: The official ``reference.csv`` (rows like ``test_001,Tumor,...`` without header), or
            a table with the columns slide_id and label (normal, tumor, 0, 1 or CLAM's
            normal_tissue, tumor_tissue). Its rows of other slides are passed over; without test
            slides it is not needed.

    Returns:
        The table.

    Raises:
        ValueError: If a slide has another kind of name, or a test slide has no label.

    Source:
        Ehteshami Bejnordi et al., JAMA 2017; validation as in ASMIL (arXiv 2603.06658), App. B:
        243 and 27 of 270 slides with val_fraction 0.1.
    """
    kinds = {
        slide_id: match.group(1).lower()
        for slide_id, match in _matches(
            slide_files, _CAMELYON16_ID, example="normal_001, tumor_001 or test_001"
        ).items()
    }
    rows = [
        {"slide_id": slide_id, "label": kind, "split": "train"}
        for slide_id, kind in kinds.items()
        if kind != "test"
    ]
    tests = [slide_id for slide_id, kind in kinds.items() if kind == "test"]
    if tests:
        path = _required(labels, what="The test slides of CAMELYON16")
        rows += [
            {"slide_id": row["slide_id"], "label": row["label"], "split": "test"}
            for row in _rows_of_slides(tests, _camelyon16_rows(path), source=path)
        ]
    return table_of_rows(rows, labels or "their names", classes=_CAMELYON16_CLASSES)


def camelyon17(slide_files: Mapping[str, Path | None], labels: Path | None) -> LabelTable:
    """Labels and parts of CAMELYON17 slides: negative, itc, micro and macro.

    ``patient_020_node_0`` is of patient 20, who is of centre 20 // 20 = 1. The patient is the case;
    centres 3 and 4 are the test part, which training has not seen, and centres 0 to 2 are for
    training, from which `split_by_parts` draws patients for validation.

    Args:
        slide_files: Files of the slides by id.
        labels: The official table of stages (columns patient and stage; its rows of whole patients
            are passed over), or a table with the columns slide_id and label.

    Returns:
        The table.

    Raises:
        ValueError: If a slide has another kind of name or no label.

    Source:
        Bandi et al., IEEE TMI 2019; parts as in ASMIL (arXiv 2603.06658), App. B: 270, 30 and 200
        of 500 slides with val_fraction 0.1.
    """
    kinds = _matches(
        slide_files, _CAMELYON17_ID, example="patient_000_node_0 to patient_099_node_4"
    )
    path = _required(labels, what="The slides of CAMELYON17")
    rows = read_rows(path)
    if "patient" in rows[0]:
        require_columns(rows, ("patient", "stage"), source=path)
        rows = [{"slide_id": row["patient"], "label": row["stage"]} for row in rows]
    table = table_of_rows(
        _rows_of_slides(kinds, rows, source=path), path, classes=_CAMELYON17_CLASSES
    )
    matches = [kinds[slide_id] for slide_id in table.slide_ids]
    centres = [int(match.group(2)) // 20 for match in matches]
    return replace(
        table,
        cases=[match.group(1).lower() for match in matches],
        parts=["test" if centre in _CAMELYON17_TEST_CENTRES else "train" for centre in centres],
    )


def bracs(
    slide_files: Mapping[str, Path | None],
    labels: Path | None,
    *,
    n_classes: Literal[3, 7] = 3,
) -> LabelTable:
    """Labels and parts of BRACS slides: benign, atypical and malignant, or the seven types.

    Types N, PB and UDH are benign, FEA and ADH atypical, DCIS and IC malignant. Without a table,
    label and part are those of the official folders, ``train/Group_AT/Type_ADH/BRACS_1486.h5``; the
    nearest folder of a kind counts, in any case, ``Type_`` and the middle folder may be left out.

    Names do not tell patients. Without a table of cases every slide is its own case: keep to the
    official parts then, for patients would leak between parts drawn anew, and nothing can tell.

    Args:
        slide_files: Files of the slides by id.
        labels: A table with the columns slide_id, label (the type, or with three classes also the
            class) and, where known, split and case_id. Without a split column the parts are those
            of the folders.
        n_classes: 3 or 7.

    Returns:
        The table, without parts if neither the table nor any folder tells one: a split file has to.

    Raises:
        ValueError: If a label can be told from neither the table nor the folders, or the folders
            tell the part of some slides only.

    Source:
        Brancati et al., Database 2022 (395, 65 and 87 slides); three classes as in ASMIL (arXiv
        2603.06658), App. B.
    """
    class_of = _BRACS_CLASSES if n_classes == 3 else {name: name for name in _BRACS_CLASSES}
    if labels is None:
        types = _folder_names(slide_files, _BRACS_TYPE_FOLDER, what="a type such as Type_ADH")
        rows = [{"slide_id": name, "label": kind.upper()} for name, kind in types.items()]
        table = table_of_rows(rows, "their folders", classes=class_of)
    else:
        found = _rows_of_slides(slide_files, read_rows(labels), source=labels)
        names = {name: name for name in class_of.values()}
        table = table_of_rows(found, labels, classes=class_of | names)
    if not any(table.parts) and _named_folders(slide_files, _PART_FOLDER):
        parts = _folder_names(slide_files, _PART_FOLDER, what="a part: train, val or test")
        table = replace(table, parts=[part_name(parts[name]) for name in table.slide_ids])
    return table


COHORTS: Mapping[str, CohortRule] = MappingProxyType(
    {
        "camelyon16": camelyon16,
        "camelyon17": camelyon17,
        "bracs": bracs,
        "bracs7": partial(bracs, n_classes=7),
    }
)


def _matches(
    slide_ids: Iterable[str], pattern: re.Pattern[str], *, example: str
) -> dict[str, re.Match[str]]:
    found = {slide_id: pattern.fullmatch(slide_id) for slide_id in slide_ids}
    others = [slide_id for slide_id, match in found.items() if match is None]
    if others:
        raise ValueError(
            f"The slides of this cohort must be named {example}, but {len(others)} are not: "
            f"{others[:10]}. Take their files out of the folder, or use data=folder with a table."
        )
    return {slide_id: match for slide_id, match in found.items() if match is not None}


def _required(labels: Path | None, *, what: str) -> Path:
    if labels is None:
        raise ValueError(
            f"{what} need a table of labels, but none came. Give the official one as data.labels."
        )
    return labels


def _camelyon16_rows(path: Path) -> list[dict[str, str]]:
    lines = read_cells(path)
    # The official table has no header, so that its first row is one of a slide.
    if lines and _CAMELYON16_ID.fullmatch(slide_name(lines[0][0])):
        return [{"slide_id": line[0], "label": "".join(line[1:2])} for line in lines]
    return read_rows(path)


def _rows_of_slides(
    slide_ids: Iterable[str], rows: Sequence[Mapping[str, str]], *, source: Path
) -> list[Mapping[str, str]]:
    require_columns(rows, ("slide_id", "label"), source=source)
    # Releases differ in the case of their names: test_001 and Test_001.
    rows_of: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        rows_of.setdefault(slide_name(row["slide_id"]).lower(), []).append(row)
    missing = [slide_id for slide_id in slide_ids if slide_id.lower() not in rows_of]
    if missing:
        raise ValueError(
            f"Every slide needs a label, but {source} lacks {len(missing)} slides: {missing[:10]}. "
            "Add them to the table, or take their files out of the folder."
        )
    return [
        {**row, "slide_id": slide_id} for slide_id in slide_ids for row in rows_of[slide_id.lower()]
    ]


def _folder_names(
    slide_files: Mapping[str, Path | None], pattern: re.Pattern[str], *, what: str
) -> dict[str, str]:
    found = _named_folders(slide_files, pattern)
    missing = [str(slide_files[name] or name) for name in slide_files if name not in found]
    if missing:
        raise ValueError(
            f"Every slide must lie in a folder named after {what}, but {len(missing)} do not: "
            f"{missing[:10]}. Keep the official folders, or give a table as data.labels."
        )
    return found


def _named_folders(
    slide_files: Mapping[str, Path | None], pattern: re.Pattern[str]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for slide_id, path in slide_files.items():
        folders = reversed(path.parent.parts) if path is not None else ()
        matches = (pattern.fullmatch(folder) for folder in folders)
        nearest = next((match for match in matches if match is not None), None)
        if nearest is not None:
            found[slide_id] = nearest["name"]
    return found
