"""How well scores of tiles, attention for instance, find lesions."""

from mil_anchor.localization.detections import (
    AllTiles,
    Components,
    Detections,
    NonMaximumSuppression,
)
from mil_anchor.localization.lesions import (
    froc,
    lesions_from_mask,
    lesions_from_tiles,
    match_detections,
)
from mil_anchor.localization.tiles import (
    LocalizationReport,
    LocalizationRow,
    SlideScores,
    localize,
    localize_slide,
    rescale,
)

__all__ = [
    "AllTiles",
    "Components",
    "Detections",
    "LocalizationReport",
    "LocalizationRow",
    "NonMaximumSuppression",
    "SlideScores",
    "froc",
    "lesions_from_mask",
    "lesions_from_tiles",
    "localize",
    "localize_slide",
    "match_detections",
    "rescale",
]
