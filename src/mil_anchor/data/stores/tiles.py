"""From what a file holds to the checked bag of a slide."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from mil_anchor.data.bags import UNITS, TileCoords, column_not_finite
from mil_anchor.data.stores.base import BagShape, StoredBag
from mil_anchor.data.stores.pitch import grid_pitch

# What producers call the features, in the order in which we look for them.
FEATURE_KEYS = ("features", "feats", "feat", "patch_embeddings")


@dataclass(frozen=True, eq=False)
class RawCoords:
    """Coordinates as a file holds them.

    Args:
        xy: One (x, y) per tile; a leading axis of length 1 is allowed.
        attributes: What the file says about its tiles.
        unit: Level-0 pixels or micrometres.
        centred: Whether (x, y) is the centre of a tile rather than its top left corner.
    """

    xy: Num[np.ndarray, "..."]
    attributes: Mapping[str, object] = field(default_factory=dict)
    unit: Literal["px", "um"] = "px"
    centred: bool = False


def bag_shape(shape: tuple[int, ...], slide_id: str, *, source: str) -> BagShape:
    """Read the size of a bag off the shape of stored features.

    Args:
        shape: Shape of the array or tensor.
        slide_id: The slide, for errors.
        source: The file, for errors.

    Returns:
        Number of tiles and feature width.

    Raises:
        ValueError: If there is no tile, or the features are no bag.

    Example:
        >>> bag_shape((1, 1, 1536), "a", source="a.h5")
        BagShape(n_instances=1, width=1536)
    """
    # Only a leading axis goes: squeezing would also drop the axis of a slide of one tile.
    bag = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if 0 in bag:
        raise ValueError(
            f"Every slide needs at least one tile, but slide {slide_id!r} has features of shape "
            f"{shape} in {source}. Drop it from the table, or extract it again."
        )
    if len(bag) == 1:
        raise ValueError(
            f"Features must be (tiles, width), but slide {slide_id!r} has shape {shape} in "
            f"{source}: one embedding of the whole slide. Give the tile features instead."
        )
    if len(bag) != 2:
        raise ValueError(
            f"Features must be (tiles, width) or (1, tiles, width), but slide {slide_id!r} has "
            f"shape {shape} in {source}. Store one vector per tile."
        )
    return BagShape(*bag)


def checked_bag(
    slide_id: str,
    features: Num[Tensor, "..."],
    *,
    coords: RawCoords | None,
    annotation: Mapping[str, Num[np.ndarray, "..."]] | None = None,
    source: str,
) -> StoredBag:
    """Check what a file holds of a slide.

    Args:
        slide_id: The slide.
        features: As stored, float16 to float64.
        coords: As stored.
        annotation: ``instance_label``, ``lesion`` and ``coverage`` of every tile, as stored.
        source: The file, for errors.

    Returns:
        The bag. Features of more than 32 bits are float32; coordinates are left out where no pitch
        is known.

    Raises:
        ValueError: If the features are no bag, are not finite or are no floating point numbers, or
            an entry does not have one finite value per tile.
    """
    features = features.reshape(bag_shape(tuple(features.shape), slide_id, source=source))
    if not features.is_floating_point():
        raise ValueError(
            f"Features must be floating point numbers, but slide {slide_id!r} has "
            f"{features.dtype} in {source}. Store float16 or float32."
        )
    if features.dtype != torch.float16:
        features = features.float()
    _check_finite(features, slide_id, source)
    n_instances = len(features)
    entries = {
        name: _annotation(name, stored, n_instances, where=f"slide {slide_id!r} in {source}")
        for name, stored in (annotation or {}).items()
    }
    return StoredBag(
        slide_id,
        features,
        coords=None if coords is None else _tile_coords(coords, n_instances, slide_id, source),
        **entries,
    )


def label_text(value: object) -> str | None:
    """A stored bag label as text; None if it is not one value.

    Example:
        >>> label_text(np.array([1.0])), label_text(b"tumor"), label_text(np.zeros(3))
        ('1', 'tumor', None)
    """
    values = np.ravel(np.asarray(value))
    if len(values) != 1:
        return None
    single = values[0].item() if isinstance(values[0], np.generic) else values[0]
    if isinstance(single, bytes):
        return single.decode()
    return str(int(single)) if isinstance(single, float) and single.is_integer() else str(single)


def _check_finite(features: Float[Tensor, "instance width"], slide_id: str, source: str) -> None:
    column = column_not_finite(features)
    if column is not None:
        raise ValueError(
            f"Features must be finite, but slide {slide_id!r} holds NaN or infinity in column "
            f"{column} in {source}. Extract it again, or drop it from the table."
        )


def _tile_coords(raw: RawCoords, n_tiles: int, slide_id: str, source: str) -> TileCoords | None:
    xy = raw.xy[0] if raw.xy.ndim == 3 and len(raw.xy) == 1 else raw.xy
    if xy.shape != (n_tiles, 2):
        raise ValueError(
            f"Coordinates must be one (x, y) per tile, but slide {slide_id!r} has shape "
            f"{raw.xy.shape} for {n_tiles} tiles in {source}. Extract it again."
        )
    if not np.isfinite(xy).all():
        raise ValueError(
            f"Coordinates must be finite, but slide {slide_id!r} holds NaN or infinity in "
            f"{source}. Extract it again."
        )
    # Torch counts with few unsigned types.
    xy = xy.astype(np.int64) if xy.dtype.kind == "u" else xy.astype(xy.dtype.newbyteorder("="))
    pitch = grid_pitch(xy, raw.attributes, unit=raw.unit)
    if pitch is None:
        return None
    if raw.centred:
        xy = np.rint(xy - pitch / 2).astype(np.int64)
    return UNITS[raw.unit](torch.from_numpy(xy), pitch)


def _annotation(
    name: str, stored: Num[np.ndarray, "..."], n_tiles: int, *, where: str
) -> Num[Tensor, " instance"]:
    # torchmil stores (tiles,) or (tiles, 1).
    if stored.shape not in {(n_tiles,), (n_tiles, 1), (1, n_tiles)}:
        raise ValueError(
            f"{name} must be one value per tile, but {where} has shape {stored.shape} for "
            f"{n_tiles} tiles. Store it again."
        )
    values = stored.reshape(n_tiles)
    if name == "coverage":
        shares = values.astype(np.float32)
        if not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(
                f"coverage must be a share in [0, 1], but {where} holds another value or NaN. "
                "Store it again."
            )
        return torch.from_numpy(shares)
    # NaN has no integer, and numpy would warn of it before we can name the slide.
    indices = np.nan_to_num(values).astype(np.int64)
    if not np.array_equal(indices, values):
        raise ValueError(
            f"{name} must be whole numbers, but {where} holds fractions or NaN. Store it again."
        )
    return torch.from_numpy(indices)
