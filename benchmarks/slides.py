"""Random slides, for the scripts that read them from disk."""

from pathlib import Path

import torch
from typing_extensions import override

from mil_anchor.data.stores.base import BagShape, Store, StoredBag


class RandomSlides(Store):
    """Slides of one size, drawn at random and kept in memory.

    Args:
        path: Where they are said to lie; nothing is written there.
        n_slides: How many there are.
        n_instances: Number of tiles of each.
        width: Width of the features.
    """

    layout = "benchmark"

    def __init__(self, path: Path, *, n_slides: int, n_instances: int, width: int) -> None:
        super().__init__(path)
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(n_slides, n_instances, width, generator=generator)

    @property
    @override
    def slide_ids(self) -> list[str]:
        return [f"{index:03}" for index in range(len(self.features))]

    @override
    def shape(self, slide_id: str) -> BagShape:
        return BagShape(*self.features.shape[1:])

    @override
    def read_stored(self, slide_id: str) -> StoredBag:
        return StoredBag(slide_id, self.features[int(slide_id)])
