"""A store in memory, whose slides can be broken."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mil_anchor.data.bags import MicrometreCoords, PixelCoords
from mil_anchor.data.stores.base import BagShape, Store, StoredBag


class MemoryStore(Store):
    layout = "memory"

    def __init__(self, path: Path, slides: Mapping[str, StoredBag | Exception]) -> None:
        super().__init__(path)
        self.slides = dict(slides)
        self.labels: dict[str, str] = {}
        self.reads: list[str] = []

    @property
    def slide_ids(self) -> list[str]:
        return sorted(self.slides)

    def shape(self, slide_id: str) -> BagShape:
        if slide_id not in self.slides:
            raise ValueError(f"slide {slide_id!r} is not in the store")
        slide = self.slides[slide_id]
        if isinstance(slide, Exception):
            raise slide
        return BagShape(*slide.features.shape)

    def read_stored(self, slide_id: str) -> StoredBag:
        self.shape(slide_id)
        self.reads.append(slide_id)
        slide = self.slides[slide_id]
        if not slide.features.isfinite().all():
            raise ValueError(f"slide {slide_id!r} holds NaN")
        return slide

    def label(self, slide_id: str) -> str | None:
        return self.labels.get(slide_id)


def make_slide(slide_id: str, n_instances: int = 4, *, width: int = 3, **entries) -> StoredBag:
    generator = torch.Generator().manual_seed(hash((len(slide_id), n_instances)) % 1000)
    features = torch.randn(n_instances, width, generator=generator)
    return StoredBag(slide_id, features, **entries)


def varied_slides() -> dict[str, StoredBag]:
    """Slides that differ in what they have beside features."""
    pixels = torch.tensor([[0, 256], [256, 256], [2**31 + 1, 512]])
    return {
        slide.slide_id: slide
        for slide in (
            make_slide("a.b/ü c", 3, coords=PixelCoords(pixels, 256.0)),
            make_slide("bare", 5),
            make_slide("one", 1, coords=MicrometreCoords(torch.tensor([[0.1, 0.7]]), 112.5)),
            make_slide(
                "truth",
                4,
                coords=PixelCoords(torch.arange(8, dtype=torch.int32).reshape(4, 2), 1.0),
                instance_label=torch.tensor([-1, 0, 1, 1], dtype=torch.int8),
                lesion=torch.tensor([0, 0, 1, 2]),
                coverage=torch.tensor([0.0, 0.1, 0.5, 1.0]),
            ),
        )
    }


def assert_same(left: StoredBag, right: StoredBag) -> None:
    """Equal in every value and dtype; features in those of the left one."""
    assert left.slide_id == right.slide_id
    assert torch.equal(left.features, right.features.to(left.features.dtype))
    assert type(left.coords) is type(right.coords)
    if left.coords is not None:
        assert left.coords.pitch == right.coords.pitch
        assert left.coords.xy.dtype == right.coords.xy.dtype
        assert torch.equal(left.coords.xy, right.coords.xy)
    for name in ("instance_label", "lesion", "coverage"):
        entry, other = getattr(left, name), getattr(right, name)
        assert (entry is None) == (other is None), name
        if entry is not None:
            assert entry.dtype == other.dtype
            assert torch.equal(entry, other)
