"""One HDF5 file with a group per slide, as ACMIL, AEM and ASMIL use."""

from pathlib import Path

import h5py  # type: ignore[import-untyped]
from typing_extensions import override

from mil_anchor.data.stores.base import BagShape, Store, StoredBag, unknown_slide
from mil_anchor.data.stores.hdf5 import ProcessFile, entry_shape, read_entry, reading
from mil_anchor.data.stores.tiles import label_text


class GroupedStore(Store):
    """One HDF5 file; group ``<slide>`` holds ``feat``, ``coords`` and attribute ``label``.

    Args:
        path: The file.

    Raises:
        ValueError: If the file cannot be read.
    """

    layout = "one HDF5 file with a group per slide"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = ProcessFile(path)
        with reading(path), h5py.File(path, "r") as file:
            self._slide_ids = sorted(
                name for name in file if file.get(name, getclass=True) is h5py.Group
            )

    @property
    @override
    def slide_ids(self) -> list[str]:
        return list(self._slide_ids)

    @override
    def shape(self, slide_id: str) -> BagShape:
        with reading(self.path, slide_id):
            return entry_shape(self._group(slide_id), slide_id, source=str(self.path))

    @override
    def read_stored(self, slide_id: str) -> StoredBag:
        with reading(self.path, slide_id):
            return read_entry(self._group(slide_id), slide_id, source=str(self.path))

    @override
    def label(self, slide_id: str) -> str | None:
        with reading(self.path, slide_id):
            attributes = self._group(slide_id).attrs
            return label_text(attributes["label"]) if "label" in attributes else None

    def _group(self, slide_id: str) -> h5py.Group:
        file = self._file.handle()
        if slide_id not in file:
            raise unknown_slide(slide_id, self)
        return file[slide_id]
