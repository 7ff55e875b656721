"""Tables that say which label, case and part every slide has."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mil_anchor.data.tables import check_once, read_rows, require_columns

PARTS = ("train", "val", "test")

_PART_OF_NAME = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SLIDE_SUFFIX = re.compile(
    r"\.(svs|tiff?|ndpi|mrxs|scn|svslide|bif|vms|vmu|czi|dcm|h5|hdf5|pt|npy)$", re.IGNORECASE
)
_TCGA_BARCODE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?=-|$)")
_INTEGER = re.compile(r"(-?)0*(\d+)(?:\.0*)?")

# What may stand for a class: a name, or a number where a YAML file writes one.
Classes = Sequence[str | int] | Mapping[str, str | int] | Mapping[int, str | int]


@dataclass(frozen=True)
class LabelTable:
    """What is known of every slide, checked on construction.

    Args:
        slide_ids: Name of every slide.
        labels: Class index of every slide.
        classes: Name of every class.
        cases: The case of every slide, usually a patient. A case stays in one part of a split.
        parts: The part (one of ``PARTS``) that every slide is meant for; None where nothing says.

    Raises:
        ValueError: If the lists differ in length or are empty, a slide or a class comes twice, a
            name is empty or begins or ends with a space, or a label or a part is unknown.
    """

    slide_ids: list[str]
    labels: list[int]
    classes: list[str]
    cases: list[str]
    parts: list[str | None]

    def __post_init__(self) -> None:
        """Refuse what would only spoil a split later."""
        lengths = {
            name: len(getattr(self, name)) for name in ("slide_ids", "labels", "cases", "parts")
        }
        if len(set(lengths.values())) > 1 or not self.slide_ids:
            raise ValueError(
                "A label table must hold slides, with one entry per slide in every list, but the "
                f"lengths {lengths} came. Give every slide a label, a case and a part (or None)."
            )
        for name in [*self.slide_ids, *self.classes, *self.cases]:
            if not name or name != name.strip():
                raise ValueError(
                    "The name of a slide, class or case must neither be empty nor begin or end "
                    f"with a space, but {name!r} came. Strip the names."
                )
        check_once(self.classes, what="class")
        for slide_id, label, part in zip(self.slide_ids, self.labels, self.parts, strict=True):
            if not 0 <= label < len(self.classes):
                raise ValueError(
                    f"A label must lie in 0..{len(self.classes) - 1}, but slide {slide_id!r} has "
                    f"{label}. Name all classes in classes."
                )
            if part is not None and part not in PARTS:
                raise ValueError(
                    f"A part must be one of {PARTS} or None, but slide {slide_id!r} has {part!r}. "
                    "Normalise it with part_name."
                )
        self._check_slides_once()

    def _check_slides_once(self) -> None:
        names: dict[str, list[str]] = {}
        for slide_id, label in zip(self.slide_ids, self.labels, strict=True):
            names.setdefault(slide_id, []).append(self.classes[label])
        repeated = {slide_id: found for slide_id, found in names.items() if len(found) > 1}
        if repeated:
            listed = ", ".join(
                f"{slide_id!r} {len(found)} times with label {' and '.join(dict.fromkeys(found))}"
                for slide_id, found in list(repeated.items())[:5]
            )
            raise ValueError(
                f"Every slide must come once, but {len(repeated)} come more often: {listed}. "
                "Keep one row per slide."
            )


def read_labels(
    path: Path, *, label: str | None = None, classes: Classes | None = None
) -> LabelTable:
    r"""Read a table of labels: ours, CLAM's or Patho-Bench's.

    Columns are ``slide_id``, a label and, where known, ``case_id`` and ``split``; others are passed
    over. Ids are text (``001`` stays ``001``), and the suffix of a slide or feature file is cut
    from them (``a.svs`` is ``a``). A slide without a case is its own case; one with a name of
    The Cancer Genome Atlas (TCGA) has its patient as case.

    Args:
        path: A file with commas, or with tabs if it ends in ``.tsv``.
        label: Column of the labels. By default ``label`` or, where there is no such column, the
            ``task_col`` of a ``config.yaml`` in the same folder (Patho-Bench).
        classes: Names of the classes in the order of their indices; or, for every label, the name
            or the index of its class, which may join labels. By default the labels themselves,
            sorted: by value if all are integers, so that 0, 1, 2 keep their value.

    Returns:
        The table, in the order of the file.

    Raises:
        ValueError: If the file cannot be read, a column is missing, a label is empty or not among
            the classes, a slide comes twice or a part is unknown.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels.csv"
        >>> _ = path.write_text("case_id,slide_id,label\np7,001,tumor\np8,002.svs,normal\n")
        >>> read_labels(path)  # doctest: +NORMALIZE_WHITESPACE
        LabelTable(slide_ids=['001', '002'], labels=[1, 0], classes=['normal', 'tumor'],
                   cases=['p7', 'p8'], parts=[None, None])
    """
    rows = read_rows(path)
    require_columns(rows, ("slide_id",), source=path)
    rows = [{**row, "slide_id": slide_name(row["slide_id"])} for row in rows]
    if label is None:
        label = "label" if "label" in rows[0] else _patho_bench_task(path) or "label"
    return table_of_rows(rows, path, label=label, classes=classes)


def table_of_rows(
    rows: Sequence[Mapping[str, str]],
    source: Path | str,
    *,
    label: str = "label",
    classes: Classes | None = None,
) -> LabelTable:
    """Make a label table of rows, their ids as they are.

    Args:
        rows: The rows, at least one.
        source: The file, or where else the rows are from, for errors.
        label: Column of the labels.
        classes: As in `read_labels`.

    Returns:
        The table, in the order of the rows.

    Raises:
        ValueError: As `read_labels`.
    """
    require_columns(rows, ("slide_id", label), source=source)
    slide_ids = [row["slide_id"] for row in rows]
    texts = [_canonical(row[label]) for row in rows]
    # pandas writes a missing value that it has turned into text as nan.
    unlabelled = [
        name for name, text in zip(slide_ids, texts, strict=True) if text.lower() in ("", "nan")
    ]
    if unlabelled:
        raise ValueError(
            f"Every slide needs a label, but column {label!r} of {source} is empty for "
            f"{len(unlabelled)} slides: {unlabelled[:10]}. Fill the cells or drop the rows."
        )
    index_of, names = _number_classes(texts, classes)
    unknown = {
        text: name for name, text in zip(slide_ids, texts, strict=True) if text not in index_of
    }
    if unknown:
        listed = ", ".join(
            f"{text!r} (slide {name!r})" for text, name in list(unknown.items())[:10]
        )
        raise ValueError(
            f"Every label must be one of {list(index_of)}, but column {label!r} of {source} also "
            f"holds {listed}. Add them to the classes, or drop the rows."
        )
    fallback = [tcga_patient(name) or name for name in slide_ids]
    return LabelTable(
        slide_ids=slide_ids,
        labels=[index_of[text] for text in texts],
        classes=names,
        cases=[row.get("case_id") or case for row, case in zip(rows, fallback, strict=True)],
        parts=[
            part_name(row.get("split", ""), where=f" for slide {name!r} in {source}")
            for row, name in zip(rows, slide_ids, strict=True)
        ],
    )


def slide_name(text: str) -> str:
    """The id of a slide: its name without the suffix of a slide or feature file.

    Args:
        text: An id or a file name. What else follows a dot is part of the id.

    Returns:
        The id.

    Example:
        >>> slide_name("a.b.SVS"), slide_name("TCGA-A1-A0SB-01Z-00-DX1.9f2c")
        ('a.b', 'TCGA-A1-A0SB-01Z-00-DX1.9f2c')
    """
    return _SLIDE_SUFFIX.sub("", text)


def part_name(text: str, *, where: str = "") -> str | None:
    """The part of a split that a word means.

    Args:
        text: A word such as ``training``, ``valid`` or ``Test``; empty for no part.
        where: Where it stands, for errors.

    Returns:
        One of ``PARTS``, or None.

    Raises:
        ValueError: If the word is unknown.
    """
    if not text:
        return None
    if text.lower() not in _PART_OF_NAME:
        raise ValueError(
            f"The part of a slide must be one of {list(_PART_OF_NAME)} or empty, but {text!r} "
            f"came{where}. Rename it."
        )
    return _PART_OF_NAME[text.lower()]


def tcga_patient(slide_id: str) -> str | None:
    """The patient of a slide of The Cancer Genome Atlas: the first three fields of its barcode.

    Args:
        slide_id: Name of a slide.

    Returns:
        The patient, or None if the name is no TCGA barcode.

    Example:
        >>> tcga_patient("TCGA-A1-A0SB-01Z-00-DX1.9f2c"), tcga_patient("tumor_001")
        ('TCGA-A1-A0SB', None)

    Source:
        TCGA barcodes: project, tissue source site and participant, then sample and slide.
    """
    match = _TCGA_BARCODE.match(slide_id)
    return match.group() if match else None


def _patho_bench_task(path: Path) -> str | None:
    config_path = path.parent / "config.yaml"
    config = OmegaConf.load(config_path) if config_path.is_file() else None
    task = config.get("task_col") if isinstance(config, DictConfig) else None
    return None if task is None else str(task)


def _canonical(text: str) -> str:
    # pandas writes an integer column with gaps as 0.0, 1.0.
    match = _INTEGER.fullmatch(text)
    return match.group(1) + match.group(2) if match else text


def _number_classes(
    texts: Sequence[str], classes: Classes | None
) -> tuple[dict[str, int], list[str]]:
    if classes is None:
        found = set(texts)
        if all(_INTEGER.fullmatch(text) for text in found):
            names = sorted(found, key=int)
        else:
            names = sorted(found)
        return {name: index for index, name in enumerate(names)}, names
    if not isinstance(classes, Mapping):
        names = [_canonical(str(name)) for name in classes]
        check_once(names, what="class")
        return {name: index for index, name in enumerate(names)}, names
    target_of = {_canonical(str(text)): target for text, target in classes.items()}
    targets = list(dict.fromkeys(target_of.values()))
    if all(isinstance(target, str) for target in targets):
        names = [str(target) for target in targets]
        return {text: names.index(str(target)) for text, target in target_of.items()}, names
    if set(targets) != set(range(len(targets))):
        raise ValueError(
            "Labels must map to names of classes or to the indices 0, 1, ... of all classes, but "
            f"{targets} came. Number the classes from 0 without a gap."
        )
    joined: list[list[str]] = [[] for _ in targets]
    index_of = {text: int(target) for text, target in target_of.items()}
    for text, index in index_of.items():
        joined[index].append(text)
    return index_of, ["+".join(members) for members in joined]
