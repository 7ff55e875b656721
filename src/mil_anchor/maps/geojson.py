"""GeoJSON of an attention map, for QuPath."""

import json
import uuid
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mil_anchor.data.bags import MicrometreCoords
from mil_anchor.maps.slide import SlideMap

# Okabe and Ito's colours, told apart with any colour vision. Class 0 is the absence of a finding.
CLASS_COLORS = ("#999999", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#0072B2", "#E69F00")


def class_color(label: int) -> str:
    """The colour in which heat maps and QuPath show a class of instances."""
    if label == 0:
        return CLASS_COLORS[0]
    return CLASS_COLORS[1 + (label - 1) % (len(CLASS_COLORS) - 1)]


def write_geojson(
    slide_map: SlideMap,
    file: Path,
    *,
    epoch: int | None = None,
    row: int | None = None,
    mpp: float | None = None,
) -> None:
    """Write the tiles of a slide with their attention as objects that QuPath (0.4, later) imports.

    A FeatureCollection of "tile" objects, squares of the tile pitch in level-0 pixels. Measurements
    are ``attention`` (sums to one over the slide), ``attention_x_n`` (1 is uniform attention) and,
    where known, ``lesion``. A known label k makes a tile ``class <k>``; where only lesions are
    known, a tile of one is ``lesion``. In QuPath: File > Import objects from file, then Measure >
    Show measurement maps.

    Args:
        slide_map: The attention on the slide.
        file: The file to write, ``.geojson``.
        epoch: Epoch from 0; None: with the chosen checkpoint.
        row: A row of the attention; None: the mean over rows.
        mpp: Micrometres per level-0 pixel; needed where coordinates are in micrometres.

    Raises:
        ValueError: There are no coordinates, their unit needs ``mpp``, or the epoch or row is not
            kept.

    Source:
        RFC 7946; ring order and closing by section 3.1.6.
    """
    corners, pitch = _level0_pixels(slide_map, mpp)
    attention = slide_map.attention(epoch, row=row).tolist()
    n_instances = len(attention)
    features = []
    for index, (x, y) in enumerate(corners.tolist()):
        measurements = {
            "attention": attention[index],
            "attention_x_n": attention[index] * n_instances,
        }
        if slide_map.lesion is not None:
            measurements["lesion"] = int(slide_map.lesion[index])
        right, below = x + pitch, y + pitch
        ring = [[x, y], [right, y], [right, below], [x, below], [x, y]]
        # The same export has the same ids; tiles of another epoch or run do not collide with them.
        name = json.dumps([slide_map.bag_id, epoch, row, index, attention[index]])
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, name)),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "tile",
                    **_classification(slide_map, index),
                    "measurements": measurements,
                },
            }
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def _level0_pixels(
    slide_map: SlideMap, mpp: float | None
) -> tuple[Float[Tensor, "instance 2"], float]:
    coords = slide_map.known_coords
    if not isinstance(coords, MicrometreCoords):
        return coords.xy.double(), float(coords.pitch)
    if mpp is None or not mpp > 0:
        raise ValueError(
            f"QuPath counts in pixels, so the coordinates of slide {slide_map.bag_id!r}, which are "
            f"in micrometres, need micrometres per pixel above 0, but mpp is {mpp}. Give the "
            "slide's image, or mpp."
        )
    # A hundredth of a pixel is enough, and keeps files small.
    return (coords.xy.double() / mpp).round(decimals=2), round(coords.pitch / mpp, 2)


def _classification(slide_map: SlideMap, index: int) -> dict[str, Any]:
    if slide_map.instance_label is not None:
        label = int(slide_map.instance_label[index])
        if label < 0:
            return {}
        name, color = f"class {label}", class_color(label)
    elif slide_map.lesion is not None and slide_map.lesion[index] > 0:
        name, color = "lesion", class_color(1)
    else:
        return {}
    return {
        "classification": {
            "name": name,
            "color": [int(color[start : start + 2], 16) for start in (1, 3, 5)],
        }
    }
