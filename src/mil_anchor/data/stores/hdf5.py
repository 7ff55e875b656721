"""HDF5 files with the features of one slide each."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor
from typing_extensions import override

from mil_anchor.data.stores.base import BagShape, FileStore, StoredBag
from mil_anchor.data.stores.packed import FORMAT
from mil_anchor.data.stores.tiles import (
    FEATURE_KEYS,
    RawCoords,
    bag_shape,
    checked_bag,
    label_text,
)

# What files call the annotation of tiles; the first is torchmil's name.
_ANNOTATIONS = {
    "inst_labels": "instance_label",
    "instance_label": "instance_label",
    "lesion": "lesion",
    "coverage": "coverage",
}


class Hdf5Store(FileStore):
    """One HDF5 file per slide: CLAM, TRIDENT, UNI2-h, STAMP, torchmil.

    A file is open only while a slide is read, so no handle lives through a fork.

    Args:
        path: The folder.
        files: The file of every slide.
    """

    layout = "one HDF5 file per slide"

    @override
    def shape(self, slide_id: str) -> BagShape:
        path = self.file(slide_id)
        with reading(path, slide_id), h5py.File(path, "r") as file:
            return entry_shape(file, slide_id, source=str(path))

    @override
    def read_stored(self, slide_id: str) -> StoredBag:
        path = self.file(slide_id)
        with reading(path, slide_id), h5py.File(path, "r") as file:
            return read_entry(file, slide_id, source=str(path))

    @override
    def label(self, slide_id: str) -> str | None:
        path = self.file(slide_id)
        with reading(path, slide_id), h5py.File(path, "r") as file:
            return label_text(file["labels"][()]) if "labels" in file else None


class ProcessFile:
    """An HDF5 file that every process opens for itself, at its first use.

    A handle must live neither through a fork nor through pickling: a forked process would share the
    position in the file with its parent.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: h5py.File | None = None
        self._process_id = 0

    def handle(self) -> h5py.File:
        """The file, open for reading in this process.

        Raises:
            OSError: If it cannot be opened.
        """
        if self._process_id != os.getpid():
            # Opening it a second time would give this process the inherited descriptor again.
            if self._file is not None:
                self._file.close()
            self._file = h5py.File(self._path, "r")
            self._process_id = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path, "_file": None, "_process_id": 0}


@contextmanager
def reading(path: Path, slide_id: str | None = None) -> Iterator[None]:
    """Say which file, and which slide, HDF5 could not read.

    Args:
        path: The file.
        slide_id: The slide.

    Raises:
        ValueError: If anything inside fails for the file's sake.
    """
    try:
        yield
    # A broken object inside a file is a KeyError or a RuntimeError.
    except (OSError, KeyError, RuntimeError) as error:
        owner = "" if slide_id is None else f"slide {slide_id!r} in "
        raise ValueError(
            f"Feature files must be readable HDF5, but {owner}{path} is not: {error}. "
            "Copy or extract it again."
        ) from error


def contents(path: Path) -> Literal["bag", "slide embedding", "coords", "groups", "unknown"]:
    """Tell by the entries of an HDF5 file what it is.

    Args:
        path: The file.

    Returns:
        Its kind: a bag, an embedding of a whole slide, coordinates without features, or one group
        per slide.

    Raises:
        ValueError: If it cannot be read.
    """
    with reading(path), h5py.File(path, "r") as file:
        name = _feature_key(file)
        if name is not None:
            is_vector = file[name].ndim == 1 and file[name].size > 0
            return "slide embedding" if is_vector else "bag"
        if "coords" in file:
            return "coords"
        if any(isinstance(item, h5py.Group) and _feature_key(item) for item in file.values()):
            return "groups"
        return "unknown"


def entry_shape(group: h5py.Group, slide_id: str, *, source: str) -> BagShape:
    """Size of the features in a file or group.

    Args:
        group: The file or group.
        slide_id: The slide, for errors.
        source: The file, for errors.

    Returns:
        Number of tiles and feature width.

    Raises:
        ValueError: If there are none, or they are no bag.
    """
    return bag_shape(_features(group, slide_id, source).shape, slide_id, source=source)


def read_entry(group: h5py.Group, slide_id: str, *, source: str) -> StoredBag:
    """Read the slide in a file or group.

    Args:
        group: The file or group, with features under one of ``FEATURE_KEYS``, and where known
            ``coords``, ``instance_label`` (torchmil: ``inst_labels``), ``lesion``, ``coverage``.
        slide_id: The slide.
        source: The file, for errors.

    Returns:
        The checked bag.

    Raises:
        ValueError: As `checked_bag`, or if there are no features.
    """
    return checked_bag(
        slide_id,
        read_features(group, slide_id, source=source),
        coords=read_coords(group, source=source),
        annotation={ours: group[name][()] for name, ours in _ANNOTATIONS.items() if name in group},
        source=source,
    )


def read_features(
    group: h5py.Group, slide_id: str, *, source: str
) -> Num[Tensor, "instance width"]:
    """Read the features in a file or group, float16 as float16 and all others as float32.

    Args:
        group: The file or group.
        slide_id: The slide, for errors.
        source: The file, for errors.

    Returns:
        The features, not yet checked for NaN.

    Raises:
        ValueError: If there are none, they are no bag or no floating point numbers.
    """
    dataset = _features(group, slide_id, source)
    shape = bag_shape(dataset.shape, slide_id, source=source)
    if dataset.dtype.kind != "f":
        raise ValueError(
            f"Features must be floating point numbers, but slide {slide_id!r} has "
            f"{dataset.dtype} in {source}. Store float16 or float32."
        )
    dtype = torch.float16 if dataset.dtype.itemsize == 2 else torch.float32
    features = torch.empty(dataset.shape, dtype=dtype)
    # HDF5 writes into the tensor's own memory, and turns bytes round and float64 into float32.
    dataset.read_direct(features.numpy())
    return features.reshape(shape)


def read_coords(group: h5py.Group, *, source: str) -> RawCoords | None:
    """Read the coordinates in a file or group.

    Coordinates are level-0 pixels, unless attribute ``unit`` says micrometres. Older files of STAMP
    (features under ``feats``) have no unit and mean pixels of an enlarged or reduced slide, so
    they are left out, with a warning.

    Args:
        group: The file or group.
        source: The file, for errors.

    Returns:
        The coordinates; None if there are none.

    Raises:
        ValueError: If the unit is unknown.
    """
    if "coords" not in group:
        return None
    dataset = group["coords"]
    attributes: Mapping[str, object] = {**group.attrs, **dataset.attrs}
    unit = attributes.get("unit")
    if unit is None and _feature_key(group) == "feats":
        warnings.warn(
            "Coordinates beside 'feats' (STAMP) must have a file attribute unit='um', but in "
            f"{Path(source).parent} it is missing. Features are used without coordinates; set the "
            "attribute if you know that they are micrometres.",
            stacklevel=2,
        )
        return None
    if unit not in {None, "um", "px"}:
        raise ValueError(
            f"Attribute unit of coordinates must be 'um' or 'px', but it is {unit!r} in {source}. "
            "Correct the attribute."
        )
    return RawCoords(
        np.asarray(dataset[()]), attributes=attributes, unit="um" if unit == "um" else "px"
    )


def _feature_key(group: h5py.Group) -> str | None:
    names = (name for name in FEATURE_KEYS if isinstance(group.get(name), h5py.Dataset))
    return next(names, None)


def _features(group: h5py.Group, slide_id: str, source: str) -> h5py.Dataset:
    if str(group.attrs.get("format")) == FORMAT:
        raise ValueError(
            f"A file among files of slides must hold one slide, but {source} is a repacked file of "
            "many. Move it out of the folder."
        )
    name = _feature_key(group)
    if name is None:
        raise ValueError(
            f"A slide must have features under one of {list(FEATURE_KEYS)}, but slide "
            f"{slide_id!r} has {sorted(group)[:10]} in {source}. Extract it again."
        )
    return group[name]
