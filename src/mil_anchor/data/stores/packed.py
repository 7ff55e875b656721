"""The repacked file: one contiguous HDF5 file for a whole cohort."""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mil_anchor.data.bags import UNITS
from mil_anchor.data.stores.base import BagShape, Store, StoredBag, unknown_slide

FORMAT = "mil_anchor"
VERSION = 1

# Entries beside the features -> dtype in the file, wide enough for every dtype of a source.
ENTRIES = {
    "coords": np.dtype("float64"),
    "instance_label": np.dtype("int64"),
    "lesion": np.dtype("int64"),
    "coverage": np.dtype("float64"),
}

# Of numpy's own memory. Some products round otherwise elsewhere, and a bag must give the same
# result whether it is kept in memory or read from the file.
_ALIGNMENT = 16

INDEX = np.dtype(
    [
        ("start", "i8"),
        ("n_instances", "i8"),
        ("state", "u1"),
        ("checksum", "S64"),
        ("unit", "S2"),
        ("pitch", "f8"),
        *((name, "S8") for name in ENTRIES),  # dtype in the source, empty where a slide has none
    ]
)


class State(IntEnum):
    """How far a slide of the file is."""

    PENDING = 0
    WRITTEN = 1
    VERIFIED = 2
    LEFT_OUT = 3


@dataclass(frozen=True, eq=False)
class PackedIndex:
    """What a packed file holds and where; it reads slides of unfinished files too.

    Args:
        path: The file.
        source: Path of the store that it was made from.
        slide_ids: All slides that the file has a place for.
        labels: Label text of every slide, empty where the source holds none.
        slides: A record of ``INDEX`` for every slide.
        dtype: dtype of the features.
        width: Feature width.
        offsets: First byte of every dataset that is in the file.
    """

    path: Path
    source: str
    slide_ids: list[str]
    labels: list[str]
    slides: NDArray[Any]
    dtype: np.dtype[Any]
    width: int
    offsets: dict[str, int]

    def positions(self, *states: State) -> list[int]:
        """Positions of the slides in one of the states."""
        return [int(p) for p in np.flatnonzero(np.isin(self.slides["state"], states))]

    def read(self, position: int, *, dtype: str | None = None, mapped: bool = False) -> StoredBag:
        """The slide at a position.

        Args:
            position: Of the slide.
            dtype: Of the features; None for the file's own.
            mapped: Leave features of that dtype in the file, from where the system brings a page
                when it is looked at. Writing to them changes a private copy.
        """
        record = self.slides[position]
        features = self._features(record, dtype=np.dtype(dtype or self.dtype), mapped=mapped)
        entries = {
            name: torch.from_numpy(
                self._rows(name, stored_as, record, *_columns(name)).astype(record[name].decode())
            )
            for name, stored_as in ENTRIES.items()
            if record[name]
        }
        coords = entries.pop("coords", None)
        kind = UNITS.get(record["unit"].decode())
        return StoredBag(
            self.slide_ids[position],
            features,
            coords=kind(coords, float(record["pitch"])) if kind and coords is not None else None,
            **entries,
        )

    def read_verified(self, position: int) -> StoredBag:
        """The slide at a position, compared with the checksum of what was written.

        Raises:
            ValueError: If they differ.
        """
        stored = self.read(position)
        if checksum(stored) != self.slides[position]["checksum"].decode():
            raise ValueError(
                f"Slide {stored.slide_id!r} must be what was written to {self.path}, but its "
                "checksum differs: the file is damaged. Delete it and repack the source again."
            )
        return stored

    def _features(self, record: np.void, *, dtype: np.dtype[Any], mapped: bool) -> Tensor:
        # Mapped anew for every read: nothing to share between processes, nothing that stays.
        rows = self._rows("features", self.dtype, record, self.width)
        if mapped and dtype == self.dtype and rows.ctypes.data % _ALIGNMENT == 0:
            return torch.from_numpy(rows)
        # numpy asks the system for huge pages and torch does not: most of the time goes to faults.
        features = torch.from_numpy(np.empty(rows.shape, dtype))
        return features.copy_(torch.from_numpy(rows))

    def _rows(
        self, name: str, dtype: np.dtype[Any], record: np.void, *columns: int
    ) -> NDArray[Any]:
        shape = (int(record["n_instances"]), *columns)
        row_bytes = dtype.itemsize * int(np.prod(columns, dtype=np.int64))
        offset = self.offsets[name] + int(record["start"]) * row_bytes
        # Copy on write, because torch warns of arrays that it must not write to.
        return np.memmap(self.path, dtype, mode="c", offset=offset, shape=shape)


class PackedStore(Store):
    """A file written by `mil_anchor.data.repack.repack`.

    Datasets, none of them chunked: ``features (total, width)`` float16 or float32, slide after
    slide; ``coords (total, 2)``, ``instance_label``, ``lesion`` and ``coverage (total,)`` where at
    least one slide has them; ``slide_id``, ``label`` and ``index`` with one row per slide: where it
    starts, its size, state, SHA-256, unit and pitch of its coords, and which entries it has.

    Features are checked when they are written, so they are not checked again when they are read.
    What `read` gives of a float32 file is the file itself, mapped into memory: nothing is copied,
    and a slide that is read stays as it was where the file is replaced or deleted. `read_stored` is
    always a copy, for what is to be kept in memory. Do not overwrite a file in place, which a copy
    over it does: a process that looks at a mapped page beyond its end is killed.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is not a packed one, or not finished.
    """

    layout = "packed"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._index = read_index(path)
        unfinished = self._index.positions(State.PENDING, State.WRITTEN)
        if unfinished:
            raise ValueError(
                f"{path} must be finished before it is read, but {len(unfinished)} of its "
                f"{len(self._index.slide_ids)} slides are not written or not verified yet. Run "
                f"'{_command(self._index)}', which goes on where it was stopped."
            )
        self._positions = {
            self._index.slide_ids[position]: position
            for position in self._index.positions(State.VERIFIED)
        }

    @property
    @override
    def slide_ids(self) -> list[str]:
        return sorted(self._positions)

    @override
    def shape(self, slide_id: str) -> BagShape:
        record = self._index.slides[self._position(slide_id)]
        return BagShape(int(record["n_instances"]), self._index.width)

    @override
    def read_stored(self, slide_id: str) -> StoredBag:
        return self._index.read(self._position(slide_id))

    @override
    def read(self, slide_id: str) -> StoredBag:
        # Straight from the mapped file to float32: one pass instead of two, and of float32 none.
        return self._index.read(self._position(slide_id), dtype="float32", mapped=True)

    def read_verified(self, slide_id: str) -> StoredBag:
        """As `read_stored`, and compares the slide with its checksum.

        Raises:
            ValueError: As `read_stored`, or if the checksum differs.
        """
        return self._index.read_verified(self._position(slide_id))

    @override
    def label(self, slide_id: str) -> str | None:
        return self._index.labels[self._position(slide_id)] or None

    def _position(self, slide_id: str) -> int:
        if slide_id not in self._positions:
            raise unknown_slide(slide_id, self)
        return self._positions[slide_id]


def is_packed(path: Path) -> bool:
    """Whether a path is a packed file, finished or not.

    Raises:
        ValueError: If it is an HDF5 file that cannot be opened.
    """
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    with open_packed(path, mode="r") as file:
        return bool(file.attrs.get("format") == FORMAT)


def open_packed(path: Path, *, mode: str) -> h5py.File:
    """Open the file with h5py; the caller closes it.

    Raises:
        ValueError: If that fails.
    """
    try:
        # Mapped datasets must start where their numbers may stand in memory.
        return h5py.File(path, mode, alignment_threshold=1, alignment_interval=64)
    except OSError as error:
        raise ValueError(
            f"{path} must be an HDF5 file that can be opened, but it cannot: {error}. Check its "
            "permissions and that no repack is writing it; if it is damaged, repack again."
        ) from error


def read_index(path: Path) -> PackedIndex:
    """What a packed file holds; the file is closed again.

    Raises:
        ValueError: If it is not a packed file, or one of another version.
    """
    if not is_packed(path):
        raise ValueError(
            f"{path} must be a packed file, but it is none (or is missing). Write one with "
            "'python -m mil_anchor repack SRC DST'."
        )
    with open_packed(path, mode="r") as file:
        if file.attrs["version"] != VERSION:
            raise ValueError(
                f"{path} must have version {VERSION}, but has {file.attrs['version']}. Install "
                "the mil_anchor that wrote it, or repack its source again."
            )
        features = file["features"]
        return PackedIndex(
            path,
            source=str(file.attrs["source"]),
            slide_ids=_texts(file["slide_id"]),
            labels=_texts(file["label"]),
            slides=file["index"][:],
            dtype=features.dtype,
            width=features.shape[1],
            offsets={n: file[n].id.get_offset() for n in ("features", *ENTRIES) if n in file},
        )


def entries_of(stored: StoredBag) -> dict[str, Tensor]:
    """The entries beside the features that a slide has, by their names in the file."""
    entries = {
        "coords": None if stored.coords is None else stored.coords.xy,
        "instance_label": stored.instance_label,
        "lesion": stored.lesion,
        "coverage": stored.coverage,
    }
    return {name: entry for name, entry in entries.items() if entry is not None}


def checksum(stored: StoredBag) -> str:
    """SHA-256 of everything that is kept of a slide, its name, dtypes and shapes included."""
    grid = None if stored.coords is None else (stored.coords.unit, float(stored.coords.pitch))
    digest = hashlib.sha256(f"{stored.slide_id!r} {grid}".encode())
    for name, entry in {"features": stored.features, **entries_of(stored)}.items():
        digest.update(f"{name} {entry.dtype} {tuple(entry.shape)}".encode())
        digest.update(np.ascontiguousarray(entry.numpy()).data)
    return digest.hexdigest()


def _columns(name: str) -> Sequence[int]:
    return (2,) if name == "coords" else ()


def _command(index: PackedIndex) -> str:
    words = ["python", "-m", "mil_anchor", "repack", index.source, str(index.path)]
    return shlex.join([*words, "--dtype", index.dtype.name])


def _texts(dataset: h5py.Dataset) -> list[str]:
    return [str(text) for text in dataset.asstr(errors="surrogateescape")[:]]
