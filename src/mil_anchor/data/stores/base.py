"""What a store of tile features is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from mil_anchor.data.bags import TileCoords


@dataclass(frozen=True, eq=False)
class StoredBag:
    """What a store holds of one slide.

    Args:
        slide_id: Name of the slide.
        features: Tile features, at least one tile.
        coords: Where the tiles lie; None if the store does not say.
        instance_label: Class index of every tile, -1 where it is unknown.
        lesion: Which lesion of the slide every tile belongs to, from 1; 0 for none.
        coverage: Share of every tile that is lesion.
    """

    slide_id: str
    features: Float[Tensor, "instance width"]
    coords: TileCoords | None = None
    instance_label: Int[Tensor, " annotation"] | None = None
    lesion: Int[Tensor, " annotated"] | None = None
    coverage: Float[Tensor, " covered"] | None = None


class BagShape(NamedTuple):
    """Size of a slide's features."""

    n_instances: int
    width: int


class Store(ABC):
    """Tile features of many slides on disk, read one slide at a time.

    Args:
        path: The folder or file.
    """

    layout: str

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    @abstractmethod
    def slide_ids(self) -> list[str]:
        """Names of all slides, sorted."""

    @abstractmethod
    def shape(self, slide_id: str) -> BagShape:
        """Number of tiles and feature width, without reading the features where that is possible.

        Raises:
            ValueError: If the slide is not in the store, is empty, is no bag or cannot be read; the
                message names it.
        """

    @abstractmethod
    def read_stored(self, slide_id: str) -> StoredBag:
        """One slide, its features in the dtype of the store (float16 or float32).

        Raises:
            ValueError: As `shape`, or if features are not finite.
        """

    def read(self, slide_id: str) -> StoredBag:
        """One slide with float32 features.

        Raises:
            ValueError: As `read_stored`.
        """
        stored = self.read_stored(slide_id)
        return replace(stored, features=stored.features.float())

    def label(self, slide_id: str) -> str | None:
        """The slide's label as the store itself writes it; None if it holds none."""
        _ = slide_id
        return None

    def file(self, slide_id: str) -> Path:
        """The file that holds the slide's features."""
        _ = slide_id
        return self.path


class FileStore(Store):
    """A store with one file of features per slide.

    Args:
        path: The folder.
        files: The file of every slide.
    """

    def __init__(self, path: Path, files: Mapping[str, Path]) -> None:
        super().__init__(path)
        self._files = dict(sorted(files.items()))

    @property
    @override
    def slide_ids(self) -> list[str]:
        return list(self._files)

    @override
    def file(self, slide_id: str) -> Path:
        """The file that holds the slide's features.

        Raises:
            ValueError: If the slide is not in the store.
        """
        if slide_id not in self._files:
            raise unknown_slide(slide_id, self)
        return self._files[slide_id]


def unknown_slide(slide_id: str, store: Store) -> ValueError:
    """The error for a slide that a store does not hold."""
    return ValueError(
        f"A slide must be in its store, but {slide_id!r} is not in {store.path}, which holds "
        f"{store.slide_ids[:3]}, ... Check the slide's id."
    )
