"""Parallel folders of arrays, as torchmil uses."""

from pathlib import Path

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from jaxtyping import Shaped
from typing_extensions import override

from mil_anchor.data.stores.base import BagShape, FileStore, StoredBag
from mil_anchor.data.stores.hdf5 import reading
from mil_anchor.data.stores.tiles import RawCoords, bag_shape, checked_bag, label_text


class TorchmilStore(FileStore):
    """Folders ``features``, ``labels``, ``inst_labels`` and ``coords`` with one array per slide.

    The arrays are ``<slide>.npy``, or ``<slide>.h5`` with a data set named as its folder. Only the
    features are needed.

    Args:
        path: The folder that holds the folders.
        files: The file of features of every slide.
    """

    layout = "one array per slide in parallel folders (torchmil)"

    @override
    def shape(self, slide_id: str) -> BagShape:
        path = self.file(slide_id)
        if path.suffix == ".npy":
            shape = _load_npy(path, slide_id, memory_map=True).shape
        else:
            with reading(path, slide_id), h5py.File(path, "r") as file:
                shape = file["features"].shape
        return bag_shape(shape, slide_id, source=str(path))

    @override
    def read_stored(self, slide_id: str) -> StoredBag:
        path = self.file(slide_id)
        features = _load(path, slide_id, name="features")
        coords = self._beside("coords", slide_id)
        instance_label = self._beside("inst_labels", slide_id)
        return checked_bag(
            slide_id,
            torch.from_numpy(features.astype(features.dtype.newbyteorder("="), copy=False)),
            coords=None if coords is None else RawCoords(coords),
            annotation={} if instance_label is None else {"instance_label": instance_label},
            source=str(path),
        )

    @override
    def label(self, slide_id: str) -> str | None:
        stored = self._beside("labels", slide_id)
        return None if stored is None else label_text(stored)

    def _beside(self, name: str, slide_id: str) -> Shaped[np.ndarray, "..."] | None:
        features = self.file(slide_id)
        path = features.parent.parent / name / features.name
        return _load(path, slide_id, name=name) if path.exists() else None


def _load(path: Path, slide_id: str, *, name: str) -> Shaped[np.ndarray, "..."]:
    if path.suffix == ".npy":
        loaded = _load_npy(path, slide_id, memory_map=False)
    else:
        with reading(path, slide_id), h5py.File(path, "r") as file:
            loaded = np.asarray(file[name][()])
    if loaded.dtype.kind not in "biuf":
        raise ValueError(
            f"Arrays must hold numbers, but slide {slide_id!r} has {loaded.dtype} in {path}. "
            "Store its numbers."
        )
    return loaded


def _load_npy(path: Path, slide_id: str, *, memory_map: bool) -> Shaped[np.ndarray, "..."]:
    try:
        loaded = np.load(path, mmap_mode="r" if memory_map else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"Arrays must be readable by numpy without pickle, but slide {slide_id!r} in {path} "
            f"is not: {error}. Copy or extract it again."
        ) from error
    return np.asarray(loaded)
