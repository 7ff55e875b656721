"""A slide as its heat maps show it: the grid of tiles, what is known of them, and the picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from mil_anchor.data.bags import MicrometreCoords
from mil_anchor.maps.grid import TileGrid
from mil_anchor.maps.slide import SlideMap
from mil_anchor.maps.thumbnail import Thumbnail


@dataclass(frozen=True, eq=False)
class SlideView:
    """What all heat maps of a slide share; made by `view_slide`.

    Args:
        slide_map: One of the maps.
        grid: The cells of the tiles.
        image: The slide.
        image_unit: Length of a level-0 pixel in the unit of the coordinates.
        classes: Known class of every tile: 0 for none, -1 where it is not known.
        edges: Outlines of the classes above 0, within a lesion too, and of the lesions.
    """

    slide_map: SlideMap
    grid: TileGrid
    image: Thumbnail | None
    image_unit: float
    classes: Int[Tensor, " instance"] | None
    edges: Float64[np.ndarray, "edge 2 2"]

    @property
    def image_size(self) -> tuple[float, float]:
        """Height and width of the image in the unit of the coordinates."""
        if self.image is None:
            return 0.0, 0.0
        pixel = self.image.downsample * self.image_unit
        return self.image.image.shape[0] * pixel, self.image.image.shape[1] * pixel


def view_slide(maps: Sequence[SlideMap], image: Thumbnail | None) -> SlideView:
    """What maps of one slide share.

    Args:
        maps: The attention of one or several runs on the same tiles.
        image: The slide.

    Raises:
        ValueError: Maps of several slides, of different tiles or none, a slide without coordinates,
            or an image that the tiles do not lie on.
    """
    ids = list(dict.fromkeys(slide_map.bag_id for slide_map in maps))
    if len(ids) != 1:
        raise ValueError(
            f"A sheet must show one slide, but there are maps of {ids}. Draw a sheet for each."
        )
    slide_map = maps[0]
    for other in maps[1:]:
        _check_same_tiles(slide_map, other)
    coords, labels, lesion = slide_map.known_coords, slide_map.instance_label, slide_map.lesion
    grid = TileGrid(coords)
    classes, edges = labels, np.empty((0, 2, 2))
    if lesion is not None:
        classes = (lesion > 0).long() if labels is None else labels
    if classes is not None:
        group = classes.clamp(min=0)
        if lesion is not None:
            # Lesions that touch keep an outline each, and so do the classes of one lesion.
            group = group + (group.max() + 1) * lesion
        edges = grid.borders(group)
    unit = 1.0
    if image is not None and isinstance(coords, MicrometreCoords):
        if image.mpp is None:
            raise ValueError(
                f"The tiles of slide {slide_map.bag_id!r} are placed in micrometres, so the image "
                "must say its micrometres per pixel, but it does not. Give mpp, or draw without it."
            )
        unit = image.mpp
    slide = SlideView(slide_map, grid, image, unit, classes, edges)
    _check_tiles_on_image(slide)
    return slide


def _check_same_tiles(first: SlideMap, other: SlideMap) -> None:
    one, two = first.known_coords, other.known_coords
    if type(one) is type(two) and one.pitch == two.pitch and torch.equal(one.xy, two.xy):
        return
    tiles = [f"{len(c):,} tiles every {c.pitch:g} {c.unit}" for c in (one, two)]
    raise ValueError(
        f"Maps of one sheet must show the same tiles, but slide {first.bag_id!r} came with "
        f"{tiles[0]} and with {tiles[1]}, or with the same in another order. Compare runs on one "
        "set of features, or draw a sheet for each."
    )


def _check_tiles_on_image(slide: SlideView) -> None:
    if slide.image is None:
        return
    left, right, bottom, top = slide.grid.extent
    height, width = slide.image_size
    # Tiles at the border of a slide may reach over it.
    over = slide.grid.pitch
    if left < -over or top < -over or right > width + over or bottom > height + over:
        raise ValueError(
            f"The tiles of slide {slide.slide_map.bag_id!r} must lie on its image, but they reach "
            f"from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) and the image to ({width:g}, "
            f"{height:g}). Give the image of this slide."
        )
