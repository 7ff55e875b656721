"""Writes packed files so that a process that is killed leaves a sound one."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py  # type: ignore[import-untyped]
import numpy as np

from mil_anchor.data.stores.base import StoredBag
from mil_anchor.data.stores.packed import (
    ENTRIES,
    FORMAT,
    INDEX,
    VERSION,
    PackedIndex,
    State,
    checksum,
    entries_of,
    open_packed,
)


def lay_out(
    destination: Path,
    slide_ids: Sequence[str],
    *,
    sizes: Sequence[int],
    labels: Sequence[str],
    width: int,
    dtype: str,
    source: Path,
    finished: PackedIndex | None,
) -> None:
    """Make a packed file with a place for every slide; all are pending.

    The features are reserved here as a hole in the file. Later only values are written (and once
    per optional entry its dataset is added), so HDF5's own structures hardly ever change.

    Args:
        destination: The file; its folder must exist.
        slide_ids: Slides in their order in the file.
        sizes: Tiles of every slide; 0 where it is not known yet.
        labels: Label text of every slide, empty for none.
        width: Feature width.
        dtype: dtype of the features.
        source: The store, named in the file.
        finished: A file for the same slides. What is in it keeps its size and is taken over.

    Raises:
        ValueError: If the file cannot be opened for writing.
        RuntimeError: If the disk is full.
    """
    done = () if finished is None else finished.positions(State.WRITTEN, State.VERIFIED)
    slides = np.zeros(len(slide_ids), INDEX)
    slides["n_instances"] = sizes
    slides["start"] = np.cumsum(sizes) - sizes
    total = sum(sizes)
    _check_space(destination, total * width * np.dtype(dtype).itemsize)
    # Under another name until it is laid out: a killed run leaves no half of a file here.
    new = destination.with_name(destination.name + ".new")
    with writing(new), open_packed(new, mode="w") as file:
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.attrs["source"] = str(source.resolve())
        file.create_dataset("slide_id", data=list(slide_ids), dtype=h5py.string_dtype())
        file.create_dataset("label", data=list(labels), dtype=h5py.string_dtype())
        file.create_dataset("index", data=slides)
        _reserve(file, "features", (total, width), dtype)
        for position in done:
            if finished is not None:
                write_slide(file, position, finished.read(position))
    new.replace(destination)


def write_slide(file: h5py.File, position: int, stored: StoredBag) -> None:
    """Write a slide to its place, and only then that it is there.

    Args:
        file: The packed file, open for writing.
        position: The slide's position in it.
        stored: The slide, of the size and dtype that its place has.
    """
    record = file["index"][position]
    rows = slice(record["start"], record["start"] + record["n_instances"])
    file["features"][rows] = stored.features.numpy()
    entries = {name: entry.numpy() for name, entry in entries_of(stored).items()}
    for name, stored_as in ENTRIES.items():
        record[name] = entries[name].dtype.name if name in entries else ""
        if name not in entries:
            continue
        if name not in file:
            total = len(file["features"])
            _reserve(file, name, (total, *entries[name].shape[1:]), stored_as.name)
        file[name][rows] = entries[name]
    record["unit"] = stored.coords.unit if stored.coords is not None else ""
    record["pitch"] = stored.coords.pitch if stored.coords is not None else 0.0
    record["checksum"] = checksum(stored)
    record["state"] = State.WRITTEN
    # The values must be in the file before it says so.
    file.flush()
    file["index"][position] = record
    file.flush()


def set_state(path: Path, positions: Iterable[int], *, state: State) -> None:
    """Say of slides of a packed file how far they are.

    Raises:
        ValueError: If the file cannot be opened for writing.
        RuntimeError: If the disk is full.
    """
    with writing(path), open_packed(path, mode="r+") as file:
        slides = file["index"][:]
        slides["state"][list(positions)] = state
        file["index"][:] = slides


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do when writing a file fails.

    Raises:
        RuntimeError: If it does.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{path} must be writable to its end, but writing failed: {error}. Make room on its "
            "disk and run the same command again: it goes on after the last finished slide."
        ) from error


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    dataset = file.create_dataset(name, shape, dtype)
    dataset[-1] = 0  # HDF5 gives a contiguous dataset its place with its first value
    file.flush()


def _check_space(destination: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(destination.parent).free
    if n_bytes > free:
        raise RuntimeError(
            f"{destination} needs {n_bytes / 1e9:.3g} GB, but its disk has {free / 1e9:.3g} GB "
            "free. Make room, or use another disk."
        )
