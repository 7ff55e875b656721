"""One torch file per slide, as CLAM and slideflow write them."""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor
from typing_extensions import override

from mil_anchor.data.stores.base import BagShape, FileStore, StoredBag
from mil_anchor.data.stores.hdf5 import read_coords, reading
from mil_anchor.data.stores.tiles import RawCoords, bag_shape, checked_bag

# What torch.load raises for a broken file depends on the byte at which it gives up.
_BROKEN = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


class TensorStore(FileStore):
    """One ``.pt`` file per slide that holds a bare tensor.

    Coordinates come from ``<slide>.index.npz`` beside it (slideflow: tile centres in level-0
    pixels), else from ``h5_files/<slide>.h5`` or ``patches/<slide>.h5`` beside the folder (CLAM).
    Slideflow's tiles are taken to touch each other, which turns centres into corners.

    Args:
        path: The folder.
        files: The file of every slide.
    """

    layout = "one pt file per slide"

    def __init__(self, path: Path, files: Mapping[str, Path]) -> None:
        super().__init__(path, files)
        roots = (path, path.parent)
        folders = [root / name for root in roots for name in ("h5_files", "patches")]
        self._coords_folders = [folder for folder in folders if folder.is_dir()]

    @override
    def shape(self, slide_id: str) -> BagShape:
        path = self.file(slide_id)
        # A memory map leaves the features on the disk, but only zip files, torch's own since
        # version 1.6, have it.
        features = _load(path, slide_id, memory_map=zipfile.is_zipfile(path))
        return bag_shape(tuple(features.shape), slide_id, source=str(path))

    @override
    def read_stored(self, slide_id: str) -> StoredBag:
        path = self.file(slide_id)
        return checked_bag(
            slide_id,
            _load(path, slide_id, memory_map=False),
            coords=self._coords(path, slide_id),
            source=str(path),
        )

    def _coords(self, path: Path, slide_id: str) -> RawCoords | None:
        index = path.with_name(f"{slide_id}.index.npz")
        if index.exists():
            return _slideflow_coords(index, slide_id)
        for folder in self._coords_folders:
            for name in (f"{slide_id}.h5", f"{slide_id}_patches.h5"):
                beside = folder / name
                if beside.exists():
                    with reading(beside, slide_id), h5py.File(beside, "r") as file:
                        return read_coords(file, source=str(beside))
        return None


def _load(path: Path, slide_id: str, *, memory_map: bool) -> Num[Tensor, "..."]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=memory_map)
    except _BROKEN as error:
        # Torch adds advice to its first sentence, in colours of a terminal.
        reason = (str(error) or type(error).__name__).partition(". ")[0].splitlines()[0]
        raise ValueError(
            f"Feature files must be readable by torch.load with weights_only=True, but slide "
            f"{slide_id!r} in {path} is not: {reason}. Copy or extract it again."
        ) from error
    if not isinstance(loaded, Tensor):
        raise ValueError(
            f"A .pt file of features must hold one tensor, but slide {slide_id!r} holds a "
            f"{type(loaded).__name__} in {path}. Save the (tiles, width) tensor alone."
        )
    return loaded.detach()


def _slideflow_coords(index: Path, slide_id: str) -> RawCoords:
    try:
        # numpy leaves a broken file open that it was given by name.
        with index.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return RawCoords(arrays["arr_0"], centred=True)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Coordinates must be array 'arr_0' of an npz file, but those of slide {slide_id!r} "
            f"in {index} cannot be read: {error}. Copy or extract it again."
        ) from error
