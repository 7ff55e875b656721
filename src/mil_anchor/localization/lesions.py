"""Lesion-level FROC by the official CAMELYON16 procedure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from mil_anchor.data.bags import MicrometreCoords
from mil_anchor.localization.detections import ISOLATED_BELOW_UM, Detections, import_optional

FALSE_POSITIVES_PER_SLIDE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

_GROWTH_UM = 75 / 2
# The official masks are read at level 5 of slides with 0.243 um per pixel.
_OFFICIAL_PIXEL_UM = 0.243 * 2**5


class Lesions(NamedTuple):
    """The lesions of a slide as they are evaluated: grown, filled and numbered.

    Args:
        number: Number of the lesion at each pixel, from 1; 0 outside.
        isolated: Whether lesion 1, 2, ... is one of isolated tumour cells, which do not count.
        pixel_um: Size of a pixel in micrometres.
        origin_um: Top left corner (x, y) of the image in micrometres.
    """

    number: Int[np.ndarray, "row column"]
    isolated: Bool[np.ndarray, " lesion"]
    pixel_um: float
    origin_um: tuple[float, float] = (0.0, 0.0)


def lesions_from_mask(
    mask: Bool[np.ndarray, "row column"] | Integer[np.ndarray, "row column"],
    pixel_um: float | int,
    *,
    origin_um: tuple[float, float] = (0.0, 0.0),
) -> Lesions:
    """Lesions of an annotation mask, prepared as the official evaluation does.

    Every pixel whose distance to the mask is below 75 um / 2 is added, holes are filled, and
    8-connected sets are numbered. A set whose major axis is below 275 um counts as isolated tumour
    cells.

    Args:
        mask: True, or above 0, where there is tumour. Numbers of lesions do not matter: lesions
            that grow together are one.
        pixel_um: Size of a pixel in micrometres.
        origin_um: Top left corner (x, y) of the mask on the slide, in micrometres.

    Returns:
        The lesions.

    Raises:
        ValueError: If the pixels have no size.
        ModuleNotFoundError: If scipy or scikit-image is not installed.

    Example:
        >>> mask = np.zeros((100, 100), dtype=bool)
        >>> mask[10:60, 10:60] = mask[80, 80] = True
        >>> lesions = lesions_from_mask(mask, 7.776)
        >>> int(lesions.number.max()), lesions.isolated
        (2, array([False,  True]))

    Source:
        Evaluation script of CAMELYON16 (Ehteshami Bejnordi et al., JAMA 2017). The text of the
        challenge joins what lies within 75 um; the script grows by half of it to each side.
    """
    if not 0 < pixel_um < math.inf:
        raise ValueError(
            f"pixel_um must be a number above 0, but {pixel_um} came. Give the size of a pixel of "
            "the mask in micrometres: that of level 0 times the downsampling of the mask."
        )
    tumour = mask > 0
    # The distance to a mask without tumour is not defined.
    if not tumour.any():
        return Lesions(
            np.zeros(mask.shape, dtype=np.int64), np.empty(0, bool), float(pixel_um), origin_um
        )
    ndimage, measure = import_optional("scipy.ndimage"), import_optional("skimage.measure")
    grown = ndimage.distance_transform_edt(~tumour) < _GROWTH_UM / pixel_um
    number = measure.label(ndimage.binary_fill_holes(grown), connectivity=2)
    limit = ISOLATED_BELOW_UM / pixel_um
    isolated = [region.axis_major_length < limit for region in measure.regionprops(number)]
    return Lesions(number, np.array(isolated), float(pixel_um), origin_um)


def lesions_from_tiles(lesion: Int[Tensor, " tile"], coords: MicrometreCoords) -> Lesions:
    """Lesions of a slide of which the tiles are annotated, prepared as those of a mask.

    Lesion tiles are drawn as squares into a mask with pixels as fine as the official ones (7.776
    um): pixels as large as tiles would not grow by 37.5 um, and a lesion of one tile would have no
    axis at any pitch.

    Args:
        lesion: Above 0 where a tile belongs to a lesion.
        coords: Where the tiles lie.

    Returns:
        The lesions.

    Raises:
        ModuleNotFoundError: If scipy or scikit-image is not installed.

    Example:
        >>> import torch
        >>> coords = MicrometreCoords(torch.tensor([[0, 0], [128, 0], [0, 512]]), 128.0)
        >>> lesions_from_tiles(torch.tensor([1, 1, 2]), coords).isolated
        array([False,  True])
    """
    corners = coords.xy[lesion > 0].detach().double().cpu().numpy()
    side = math.ceil(coords.pitch / _OFFICIAL_PIXEL_UM)
    pixel_um = coords.pitch / side
    if len(corners) == 0:
        return lesions_from_mask(np.zeros((1, 1), dtype=bool), pixel_um)
    margin = math.ceil(_GROWTH_UM / pixel_um)
    origin = corners.min(axis=0) - margin * pixel_um
    cells = np.rint((corners - origin) / pixel_um).astype(np.int64)
    width, height = cells.max(axis=0) + side + margin
    mask = np.zeros((height, width), dtype=bool)
    for column, row in cells:
        mask[row : row + side, column : column + side] = True
    return lesions_from_mask(mask, pixel_um, origin_um=(float(origin[0]), float(origin[1])))


class SlideHits(NamedTuple):
    """What the detections of one slide hit.

    Args:
        false_positives: Scores of detections outside all lesions.
        best: Highest score in each lesion that counts; minus infinity where there is none.
        n_isolated: Number of lesions that do not count.
    """

    false_positives: Float[np.ndarray, " detection"]
    best: Float[np.ndarray, " lesion"]
    n_isolated: int


def match_detections(detections: Detections, lesions: Lesions | None) -> SlideHits:
    """Tell hits from false positives on one slide.

    Several hits of a lesion count once, with the highest score. Hits of isolated tumour cells count
    neither as hits nor as false positives. What lies outside the mask is a false positive.

    Args:
        detections: The detections.
        lesions: The lesions; None on a slide without any.

    Returns:
        What was hit.
    """
    scores = detections.scores.astype(np.float64)
    if lesions is None:
        return SlideHits(scores, np.empty(0), 0)
    cells = np.floor((detections.xy_um - lesions.origin_um) / lesions.pixel_um)
    column, row = cells.astype(np.int64).T
    height, width = lesions.number.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    hit = np.zeros(len(scores), dtype=np.int64)
    hit[inside] = lesions.number[row[inside], column[inside]]
    best = np.full(len(lesions.isolated) + 1, -math.inf)
    np.maximum.at(best, hit, scores)
    counted = best[1:][~lesions.isolated]
    return SlideHits(scores[hit == 0], counted, int(lesions.isolated.sum()))


@dataclass(frozen=True, eq=False)
class FrocResult:
    """The FROC curve of a cohort and its score; its text says both and how they were got.

    Args:
        score: Mean of the sensitivities.
        sensitivities: Share of lesions found at 1/4, 1/2, 1, 2, 4 and 8 false positives per slide.
        false_positives: Of the curve: mean number per slide, falling.
        sensitivity: Of the curve: share of lesions found.
        n_slides: Number of slides, those without lesions too.
        n_lesions: Number of lesions that count.
        n_isolated: Number of lesions of isolated tumour cells, which do not.
        detections: How detections were made.
        official: Whether the lowest threshold was dropped.
    """

    score: float
    sensitivities: dict[float, float]
    false_positives: Float[np.ndarray, " threshold"]
    sensitivity: Float[np.ndarray, " threshold"]
    n_slides: int
    n_lesions: int
    n_isolated: int
    detections: str
    official: bool

    def __str__(self) -> str:
        number = f"{self.score:.3f}".removeprefix("0")
        lowest = "dropped" if self.official else "kept"
        return f"FROC {number} ({self.detections}; lowest threshold {lowest})"


def froc(slides: Iterable[SlideHits], detections: str, *, official: bool = False) -> FrocResult:
    """Mean sensitivity at 1/4, 1/2, 1, 2, 4 and 8 false positives per slide.

    At each threshold t, the share of lesions whose best hit is at least t stands against the number
    of false positives of at least t, divided by the number of all slides. Between these points and
    (0, 0) the sensitivity is interpolated; beyond the last of them it stays.

    Args:
        slides: What was hit on each slide, those without lesions too.
        detections: How detections were made, for the result: the text of the `Detector`.
        official: Whether to drop the lowest threshold, as the official script does. It lists a
            missed lesion and isolated tumour cells with score 0: where there is one, what is
            dropped is this 0 and the result is as without; else it is the lowest detection.

    Returns:
        The result.

    Raises:
        ValueError: If no lesion counts, or a score is negative with ``official``.

    Example:
        >>> found = SlideHits(np.array([0.3]), np.array([0.9, -np.inf]), n_isolated=0)
        >>> normal = SlideHits(np.array([0.5]), np.empty(0), n_isolated=0)
        >>> print(froc([found, normal], "nms, radius 275 um"))
        FROC .500 (nms, radius 275 um; lowest threshold kept)

    Source:
        Evaluation script of CAMELYON16 (Ehteshami Bejnordi et al., JAMA 2017). By default we keep
        the lowest threshold, and scores need not be probabilities.
    """
    hits = list(slides)
    false = np.concatenate([np.empty(0), *(slide.false_positives for slide in hits)])
    best = np.concatenate([np.empty(0), *(slide.best for slide in hits)])
    n_lesions, n_isolated = len(best), sum(slide.n_isolated for slide in hits)
    if n_lesions == 0:
        raise ValueError(
            f"FROC needs a lesion that counts, but there is none in {len(hits)} slides, and "
            f"{n_isolated} of isolated tumour cells. Add slides with annotated lesions."
        )
    thresholds = np.unique(np.concatenate([false, best[best > -math.inf]]))
    if official:
        if len(thresholds) and thresholds[0] < 0:
            raise ValueError(
                "The official script takes scores of at least 0, which is the score of a missed "
                f"lesion, but {thresholds[0]} came. Give probabilities, or set official=False."
            )
        missed = n_isolated > 0 or bool((best == -math.inf).any())
        thresholds = np.unique(np.append(thresholds, 0.0) if missed else thresholds)[1:]
    per_slide = np.append(_at_least(false, thresholds), 0) / len(hits)
    found = np.append(_at_least(best, thresholds), 0) / n_lesions
    at = np.interp(FALSE_POSITIVES_PER_SLIDE, per_slide[::-1], found[::-1])
    return FrocResult(
        score=float(at.mean()),
        sensitivities=dict(zip(FALSE_POSITIVES_PER_SLIDE, at.tolist(), strict=True)),
        false_positives=per_slide,
        sensitivity=found,
        n_slides=len(hits),
        n_lesions=n_lesions,
        n_isolated=n_isolated,
        detections=detections,
        official=official,
    )


def _at_least(
    scores: Float[np.ndarray, " score"], thresholds: Float[np.ndarray, " threshold"]
) -> Int[np.ndarray, " threshold"]:
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
