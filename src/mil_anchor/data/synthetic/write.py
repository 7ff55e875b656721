"""Writes a synthetic cohort as users have theirs: features, a table of labels and a split."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import track

from mil_anchor.data.labels import LabelTable
from mil_anchor.data.repack import repack
from mil_anchor.data.split_files import write_split
from mil_anchor.data.stores.base import StoredBag
from mil_anchor.data.synthetic.cohort import SyntheticCohort, SyntheticStore

_CHUNK = 32  # tiles, as CLAM


def write_cohort(
    cohort: SyntheticCohort,
    folder: Path,
    *,
    layout: str = "clam",
    progress: bool = True,
) -> Path:
    """Write a cohort's features, ``labels.csv`` and ``splits_0.csv``.

    A run that was stopped goes on with the slides that are missing. ``labels.csv`` has the labels
    that slides are given (see `SyntheticCohort.labels`) and ``splits_0.csv`` CLAM's columns train,
    val and test. ``cohort.json`` says how to make the cohort again.

    Args:
        cohort: The cohort.
        folder: Where to write; new, empty, or with a part of the same cohort.
        layout: "clam" for ``h5_files/<slide>.h5`` as CLAM writes them, and in the same files what
            CLAM does not know: ``instance_label``, ``lesion`` and ``coverage``. CLAM's second copy
            of the features, ``pt_files``, is left out. "packed" for one float16 file
            ``features.h5``.
        progress: Show a progress bar on standard error.

    Returns:
        What `open_store` opens: the folder or the packed file.

    Raises:
        ValueError: If the layout is unknown, the folder holds something else, or the cohort is too
            small for every class in training and validation.
    """
    if layout not in ("clam", "packed"):
        raise ValueError(f"layout must be 'clam' or 'packed', but {layout!r} came. Use 'clam'.")
    _claim(folder, cohort)
    _write_labels(folder / "labels.csv", cohort.table)
    write_split(cohort.parts, cohort.table, folder=folder, layout="clam")
    if layout == "packed":
        packed = folder / "features.h5"
        repack(SyntheticStore(cohort), packed, progress=progress)
        return packed
    h5_files = folder / "h5_files"
    h5_files.mkdir(exist_ok=True)
    files = [h5_files / f"{slide_id}.h5" for slide_id in cohort.bag_ids]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    for index in track(
        missing, "writing slides", console=Console(stderr=True), disable=not progress
    ):
        with _whole(files[index]) as partial:
            _write_slide(partial, cohort.read_stored(index))
    return folder


def _claim(folder: Path, cohort: SyntheticCohort) -> None:
    """Refuse a folder of anything else: a cohort mixed of two would look sound."""
    note = folder / "cohort.json"
    recipe = json.dumps(cohort.recipe, indent=2) + "\n"
    if note.exists():
        if note.read_text(encoding="utf-8") != recipe:
            raise ValueError(
                f"{folder} must hold a part of the same cohort, but {note} describes another one. "
                "Give another folder, or delete this one."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    # What a run left that was killed before its first file was whole does not count.
    found = sorted(path.name for path in folder.iterdir() if path.suffix != ".partial")
    if found:
        raise ValueError(
            f"{folder} must be new, empty or hold a part of the same cohort, but it holds "
            f"{found[:3]}. Give another folder."
        )
    with _whole(note) as partial:
        partial.write_text(recipe, encoding="utf-8")


def _write_labels(file: Path, table: LabelTable) -> None:
    with _whole(file) as partial, partial.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["case_id", "slide_id", "label"])
        names = [table.classes[label] for label in table.labels]
        writer.writerows(zip(table.cases, table.slide_ids, names, strict=True))


def _write_slide(file: Path, stored: StoredBag) -> None:
    width = stored.features.shape[1]
    with h5py.File(file, "w") as opened:
        for name, values, chunks in (
            ("features", stored.features, (_CHUNK, width)),
            ("coords", stored.coords.xy if stored.coords is not None else None, (_CHUNK, 2)),
            ("instance_label", stored.instance_label, (_CHUNK,)),
            ("lesion", stored.lesion, (_CHUNK,)),
            ("coverage", stored.coverage, (_CHUNK,)),
        ):
            if values is not None:
                opened.create_dataset(
                    name, data=values.numpy(), chunks=chunks, maxshape=(None, *values.shape[1:])
                )


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """Another name to write to, so that under its own name a file is there whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    yield partial
    partial.replace(file)
