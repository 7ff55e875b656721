"""Thumbnails of whole-slide images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

# A slide without small levels would have to be read as a whole: 4 bytes for each of its pixels.
_MAX_PIXELS_READ = 100_000_000


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A small picture of a slide, and where its pixels lie.

    Args:
        image: Red, green and blue.
        downsample: Level-0 pixels of the slide per pixel of the thumbnail.
        mpp: Micrometres per level-0 pixel; None if the file does not say.
    """

    image: UInt8[np.ndarray, "height width 3"]
    downsample: float
    mpp: float | None = None


def open_thumbnail(path: Path, max_side: int) -> Thumbnail:
    """A thumbnail of a slide in any format that OpenSlide reads.

    Args:
        path: The slide: .svs, .ndpi, .mrxs, .scn, pyramidal tiled .tif, ...
        max_side: Largest width or height of the thumbnail in pixels.

    Returns:
        The thumbnail, with what the scanner did not see in the slide's background colour. A slide
        below ``max_side`` keeps its size.

    Raises:
        ValueError: There is no such slide, or it holds no level that is small enough to be read.
        ModuleNotFoundError: OpenSlide is not installed.
    """
    if max_side < 1:
        raise ValueError(f"max_side must be at least 1 pixel, but {max_side} came. Use 2000.")
    try:
        import openslide
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Thumbnails of slides need OpenSlide, which is not installed. "
            "Run: pip install 'mil_anchor[wsi]'"
        ) from error
    if not path.exists():
        raise ValueError(f"A slide must be a file, but {path} does not exist. Name another file.")
    try:
        with openslide.OpenSlide(path) as slide:
            level = slide.get_best_level_for_downsample(max(slide.dimensions) / max_side)
            _check_size(path, slide.level_dimensions[level], max_side)
            # Across the longer side, where rounding to whole pixels matters least.
            thumbnail = slide.get_thumbnail((max_side, max_side))
            downsample = max(slide.dimensions) / max(thumbnail.size)
            mpp = slide.properties.get(openslide.PROPERTY_NAME_MPP_X)
    except openslide.OpenSlideError as error:
        raise ValueError(
            f"A slide must be an image that OpenSlide reads, but {path} is none ({error}). A plain "
            "TIFF must be tiled; other formats can be converted by vips to a pyramidal TIFF."
        ) from error
    return Thumbnail(np.array(thumbnail), downsample, None if mpp is None else float(mpp))


def _check_size(path: Path, level: tuple[int, int], max_side: int) -> None:
    width, height = level
    if width * height > _MAX_PIXELS_READ:
        raise ValueError(
            f"A slide must hold a level small enough for a thumbnail, but of {path} {width} x "
            f"{height} pixels would be read for {max_side}. Convert it to a pyramidal TIFF."
        )
