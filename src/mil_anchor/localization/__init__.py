"""How well scores of tiles, attention for instance, find lesions."""

from mil_anchor.localization.detections import AllTiles, Components, NonMaximumSuppression
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
    "LocalizationReport",
    "LocalizationRow",
    "NonMaximumSuppression",
    "SlideScores",
    "localize",
    "localize_slide",
    "rescale",
]
