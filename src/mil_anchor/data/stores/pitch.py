"""How far apart the tiles of a slide lie."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Num

# Micrometres are fractions: what lies closer than this is one place, rounded in two ways.
_SAME = 0.5


def grid_pitch(
    xy: Num[np.ndarray, "instance 2"], attributes: Mapping[str, object], *, unit: str
) -> float | None:
    """Distance between the corners of neighbouring tiles.

    Attributes say it: ``patch_size_level0``, else ``patch_size * downsample`` (level-0 pixels), or
    ``tile_size_um``; a non-zero ``overlap`` is taken off, read as pixels of the same magnification
    as ``patch_size``. Where most tiles have a neighbour at another distance, the tiles are right:
    attributes of CLAM do not hold the step, and an overlap may be meant in another unit.

    Without attributes it is the smallest positive difference of the coordinates. Where tissue
    regions have a grid each, as in CLAM, that would be the distance of two grids (a pixel or
    two), so the distance at which most tiles have a neighbour goes before it here as well.

    Args:
        xy: Corner or centre (x, y) of every tile.
        attributes: What the file says about its tiles; ``"None"`` counts as not said.
        unit: Unit of the coordinates, ``"px"`` or ``"um"``.

    Returns:
        The pitch in the unit of the coordinates. None if neither the attributes nor the tiles show
        one, as for a slide of one tile without attributes.

    Example:
        >>> grid_pitch(np.array([[0, 0], [224, 0], [224, 448]]), {}, unit="px")
        224.0
        >>> said = {"patch_size": 256, "patch_size_level0": 512, "overlap": 64}
        >>> grid_pitch(np.array([[0, 0]]), said, unit="px")
        384.0
    """
    said = _said(attributes, unit)
    usual = _usual_neighbour(xy)
    if said is None:
        return usual if usual is not None else _smallest_difference(xy)
    # Tiles two or three pitches apart show a hole, and corners are rounded to whole pixels.
    if usual is None or abs(usual - said * max(1, round(usual / said))) <= 1:
        return said
    return usual


def _said(attributes: Mapping[str, object], unit: str) -> float | None:
    if unit == "um":
        return _number(attributes, "tile_size_um")
    patch_size = _number(attributes, "patch_size")
    level0 = _number(attributes, "patch_size_level0")
    downsample = _number(attributes, "downsample")
    if level0 is None and patch_size is not None and downsample is not None:
        level0 = patch_size * downsample
    overlap = _number(attributes, "overlap")
    if level0 is None or overlap is None:
        return level0
    pitch = level0 - overlap * (level0 / patch_size if patch_size is not None else 1)
    return pitch if pitch > 0 else None


def _number(attributes: Mapping[str, object], name: str) -> float | None:
    value = attributes.get(name)
    if value is None or isinstance(value, (str, bytes)):
        return None
    # CLAM writes the downsample factor as a pair, one for x and one for y.
    number = float(np.ravel(np.asarray(value, dtype=np.float64))[0])
    return number if np.isfinite(number) and number > 0 else None


def _usual_neighbour(xy: Num[np.ndarray, "instance 2"]) -> float | None:
    """The most frequent distance to the next tile of the row or column, if most tiles have it."""
    gaps = [_gaps_along(xy, axis) for axis in (0, 1)]
    distances, counts = np.unique(np.concatenate(gaps).round(2), return_counts=True)
    if len(counts) == 0 or counts.max() < max(2, len(xy) / 2):
        return None
    return float(distances[counts.argmax()])


def _gaps_along(xy: Num[np.ndarray, "instance 2"], axis: int) -> Num[np.ndarray, " gap"]:
    position, line = xy[:, axis], xy[:, 1 - axis]
    order = np.lexsort((position, line))
    gaps = np.diff(position[order])
    neighbours: Num[np.ndarray, " gap"] = gaps[(np.diff(line[order]) == 0) & (gaps > 0)]
    return neighbours


def _smallest_difference(xy: Num[np.ndarray, "instance 2"]) -> float | None:
    differences = np.concatenate([np.diff(np.unique(xy[:, axis])) for axis in (0, 1)])
    differences = differences[differences > _SAME]
    return float(differences.min()) if len(differences) else None
