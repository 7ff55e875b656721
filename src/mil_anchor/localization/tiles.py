"""How well the scores of tiles, attention for instance, find the lesions of slides."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from mil_anchor.data.bags import MicrometreCoords, TileCoords
from mil_anchor.localization.detections import Detector, NonMaximumSuppression
from mil_anchor.localization.lesions import (
    FrocResult,
    SlideHits,
    froc,
    lesions_from_tiles,
    match_detections,
)

_THRESHOLD = 0.5
# A glass slide is 76 mm long. Larger ones come of wrong units, and their masks would fill a memory.
_LARGEST_SLIDE_UM = 100_000


@dataclass(frozen=True, eq=False)
class SlideScores:
    """Scores of a slide's tiles, and what is known about its lesions.

    Args:
        bag_id: Name of the slide.
        label: Class index of the slide; 0 is a slide without lesions.
        scores: One finite score per tile, higher is more suspect.
        instance_label: Above 0 where a tile is lesion, 0 where normal, -1 where unknown.
        lesion: Which lesion of the slide every tile belongs to, from 1; 0 for none.
        coords: Where the tiles lie.
        mpp: Micrometres per level-0 pixel; needed for FROC if ``coords`` are in pixels.
        confidence: What scores are multiplied by where they are compared between slides, which FROC
            does: the probability that there is a lesion, for instance.

    Raises:
        ValueError: If there is no tile, a score is not finite, an entry has another length,
            ``mpp`` is not above 0, or ``confidence`` is not in [0, 1].
    """

    bag_id: str
    label: int
    scores: Float[Tensor, " tile"]
    instance_label: Int[Tensor, " annotation"] | None = None
    lesion: Int[Tensor, " annotated"] | None = None
    coords: TileCoords | None = None
    mpp: float | int | None = None
    confidence: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what would be measured wrongly."""
        if len(self.scores) == 0 or not self.scores.isfinite().all():
            raise ValueError(
                f"Every slide needs a finite score per tile, but slide {self.bag_id!r} has no tile "
                "or scores of NaN or infinity. Look for a diverged loss or an empty slide."
            )
        for name in ("instance_label", "lesion", "coords"):
            entry = getattr(self, name)
            if entry is not None and len(entry) != len(self.scores):
                raise ValueError(
                    f"{name} must have one entry per tile, but slide {self.bag_id!r} has "
                    f"{len(entry)} for {len(self.scores)} scores. Take away padding from both."
                )
        if self.mpp is not None and not 0 < self.mpp < float("inf"):
            raise ValueError(
                f"mpp must be a number above 0, but slide {self.bag_id!r} has {self.mpp}. Give the "
                "micrometres per level-0 pixel, or None."
            )
        if not 0 <= self.confidence <= 1:
            raise ValueError(
                f"confidence must lie in [0, 1], but slide {self.bag_id!r} has {self.confidence}. "
                "Give a probability, or 1."
            )

    @property
    def annotated(self) -> bool:
        """Whether anything is known about single tiles."""
        known = self.instance_label is not None and bool((self.instance_label >= 0).any())
        return known or self.lesion is not None

    @property
    def tile_labels(self) -> Int[Tensor, " tile"]:
        """1 lesion, 0 normal, -1 unknown.

        Without labels of tiles, lesions say it, and all tiles of a slide of label 0 are normal.
        """
        if self.instance_label is not None:
            return self.instance_label.cpu().clamp(-1, 1).long()
        if self.lesion is not None:
            return (self.lesion.cpu() > 0).long()
        return torch.full((len(self.scores),), 0 if self.label == 0 else -1)

    @property
    def normal(self) -> bool:
        """Whether the slide has label 0, a normal tile and no lesion tile."""
        return self.label == 0 and int(self.tile_labels.max()) == 0

    @property
    def coords_um(self) -> MicrometreCoords | None:
        """Where the tiles lie in micrometres; None if it is not known."""
        if self.coords is None or isinstance(self.coords, MicrometreCoords):
            return self.coords
        if self.mpp is None:
            return None
        return MicrometreCoords(self.coords.xy.double() * self.mpp, self.coords.pitch * self.mpp)


class LocalizationRow(NamedTuple):
    """One row of ``localization.csv``; None where a quantity is not defined or not known.

    ``found_any``, ``found_mean`` and ``found_all`` are numbers of lesions.
    """

    bag_id: str
    label: int
    n_tiles: int
    n_lesion_tiles: int
    dice: float | None
    specificity: float | None
    auroc: float | None
    average_precision: float | None
    n_lesions: int
    found_any: int
    found_mean: int
    found_all: int


@dataclass(frozen=True)
class LocalizationReport:
    """What `localize` measured.

    Args:
        metrics: Numbers of the cohort; what is not defined or not known is left out.
        rows: One row for each slide of which something is known.
        froc: The curve, and how it was got; None if it is not in the metrics.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[LocalizationRow] = field(default_factory=list)
    froc: FrocResult | None = None


def rescale(scores: Float[Tensor, " tile"]) -> Float64[Tensor, " tile"]:
    """Scores of one slide on [0, 1]: ``(s - min s) / (max s - min s)``.

    Args:
        scores: At least one finite score.

    Returns:
        The rescaled scores. Equal scores single out no tile and become 0, though the formula has no
        value there.

    Example:
        >>> rescale(torch.tensor([-1.0, 0.0, 3.0])).tolist(), rescale(torch.ones(2)).tolist()
        ([0.0, 0.25, 1.0], [0.0, 0.0])
    """
    values = scores.detach().double().cpu()
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def localize_slide(slide: SlideScores) -> LocalizationRow:
    """Measure the localisation on one slide; unknown tiles are left out, but for the rescaling.

    A tile is predicted where its rescaled score is above 0.5.

    - ``dice``: 2 TP / (2 TP + FP + FN), on a slide with a lesion tile.
    - ``specificity``: TN / (TN + FP), on a slide of label 0 without one.
    - ``auroc``, ``average_precision``: of the scores, on a slide with lesion and normal tiles.
    - ``found_any``, ``found_mean``, ``found_all``: lesions of which the highest, the mean or the
      lowest rescaled score is above 0.5.

    The rescaling sets the highest score of every slide to 1, that of a normal slide too, so the
    first two reward concentration in opposite ways. Scores with one spike predict one tile of N:
    the specificity is 1 - 1/N, but the Dice at most 2 / (1 + L) on a lesion of L tiles. Scores that
    are high on all tiles but one that is low predict N - 1: the Dice is at least 2 (L - 1) /
    (N + L - 1), but the specificity 1/N. Equal scores predict none: specificity 1, Dice 0. So read
    the two together, and with the AUROC and the average precision, which depend on the order of the
    scores only.

    Args:
        slide: The slide.

    Returns:
        The row.

    Source:
        ASMIL (arXiv 2603.06658) for Dice on positive and specificity on negative slides, threshold
        0.5. The paper does not say what it does with equal scores.
    """
    scores = rescale(slide.scores)
    predicted = scores > _THRESHOLD
    positive, normal = slide.tile_labels == 1, slide.tile_labels == 0
    n_positive, n_normal = int(positive.sum()), int(normal.sum())
    n_hits, n_false = int((predicted & positive).sum()), int((predicted & normal).sum())
    known, both = positive | normal, n_positive > 0 and n_normal > 0
    truth = positive[known].long()
    # Ranks, for torchmetrics takes scores outside [0, 1] for logits, and its sigmoid makes ties.
    _, rank = torch.unique(slide.scores.detach().cpu(), return_inverse=True)
    share = (rank[known] + 1).double() / len(scores)
    lesions = _lesion_scores(scores, slide.lesion)
    return LocalizationRow(
        bag_id=slide.bag_id,
        label=slide.label,
        n_tiles=len(scores),
        n_lesion_tiles=n_positive,
        dice=2 * n_hits / (n_hits + n_false + n_positive) if n_positive else None,
        specificity=1 - n_false / n_normal if slide.normal else None,
        auroc=float(binary_auroc(share, truth)) if both else None,
        average_precision=float(binary_average_precision(share, truth)) if both else None,
        n_lesions=len(lesions),
        found_any=sum(bool(own.max() > _THRESHOLD) for own in lesions),
        found_mean=sum(bool(own.mean() > _THRESHOLD) for own in lesions),
        found_all=sum(bool(own.min() > _THRESHOLD) for own in lesions),
    )


def localize(
    slides: Iterable[SlideScores],
    *,
    detector: Detector | None = None,
    official: bool = False,
) -> LocalizationReport:
    """Measure the localisation on a cohort, as far as its annotation goes.

    The metrics are, each with ``localization/`` before it: the means of ``dice``, ``specificity``,
    ``auroc`` and ``average_precision`` over the slides that have them (see `localize_slide`); the
    shares ``lesion_any``, ``lesion_mean`` and ``lesion_all`` of all lesions; and ``froc``. FROC is
    measured on slides whose tiles have a place in micrometres and that either have lesion ids or
    are of label 0 without a lesion tile. It compares scores between slides, and attention sums to
    one on each of them, on normal ones too: see ``confidence`` of `SlideScores`.

    Args:
        slides: The slides; read one by one, and not kept once a slide with a lesion came.
        detector: How FROC makes detections of tile scores; None: `NonMaximumSuppression`.
        official: Whether FROC drops the lowest threshold, as the official script does.

    Returns:
        The report; empty if no tile of any slide is annotated.

    Raises:
        ValueError: If ``official`` meets negative scores, or a slide larger than 100 mm would enter
            FROC.
        ModuleNotFoundError: If there are lesions on a grid in micrometres and scipy or scikit-image
            is not installed.

    Example:
        >>> grid = torch.cartesian_prod(torch.arange(9.0), torch.arange(9.0))
        >>> lesion = (grid < 3).all(dim=1).long()
        >>> coords = MicrometreCoords(128 * grid, 128.0)
        >>> tumour = SlideScores("a", 1, lesion.double(), lesion=lesion, coords=coords)
        >>> normal = SlideScores("b", 0, torch.zeros(81), coords=coords)
        >>> report = localize([tumour, normal])
        >>> report.metrics["localization/dice"], report.metrics["localization/specificity"]
        (1.0, 1.0)
        >>> print(report.froc)
        FROC 1.000 (nms, radius 275 um; lowest threshold kept)
    """
    detector = NonMaximumSuppression() if detector is None else detector
    rows: list[LocalizationRow] = []
    hits: list[SlideHits] = []
    waiting: list[tuple[SlideScores, MicrometreCoords]] = []
    annotated = lesion_seen = False
    for slide in slides:
        rows.append(localize_slide(slide))
        annotated |= slide.annotated
        lesion_seen |= rows[-1].n_lesions > 0
        coords = slide.coords_um
        if coords is not None and (slide.lesion is not None or slide.normal):
            waiting.append((slide, coords))
        # A cohort without lesions needs neither the time for detections nor scipy.
        if lesion_seen:
            hits += [_match(held, coords, detector) for held, coords in waiting]
            waiting.clear()
    if not annotated:
        return LocalizationReport()
    metrics = _means(rows)
    result = None
    if any(len(slide.best) for slide in hits):
        result = froc(hits, str(detector), official=official)
        metrics["localization/froc"] = result.score
    known = [
        row for row in rows if row.n_lesion_tiles or row.n_lesions or row.specificity is not None
    ]
    return LocalizationReport(metrics, known, result)


def _lesion_scores(
    scores: Float64[Tensor, " tile"], lesion: Int[Tensor, " tile"] | None
) -> list[Float64[Tensor, " _"]]:
    if lesion is None:
        return []
    ids = lesion.cpu()
    return [scores[ids == own] for own in torch.unique(ids).tolist() if own > 0]


def _means(rows: list[LocalizationRow]) -> dict[str, float]:
    metrics = {}
    for name in ("dice", "specificity", "auroc", "average_precision"):
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        if values:
            metrics[f"localization/{name}"] = fmean(values)
    n_lesions = sum(row.n_lesions for row in rows)
    if n_lesions:
        for name in ("any", "mean", "all"):
            n_found = sum(getattr(row, f"found_{name}") for row in rows)
            metrics[f"localization/lesion_{name}"] = n_found / n_lesions
    return metrics


def _match(slide: SlideScores, coords: MicrometreCoords, detector: Detector) -> SlideHits:
    extent_um = float((coords.xy.amax(dim=0) - coords.xy.amin(dim=0)).max())
    if extent_um > _LARGEST_SLIDE_UM:
        raise ValueError(
            f"The tiles of a slide must lie within {_LARGEST_SLIDE_UM / 1000:g} mm, but those of "
            f"{slide.bag_id!r} span {extent_um / 1000:g} mm. Correct its coordinates or its mpp."
        )
    lesions = None if slide.lesion is None else lesions_from_tiles(slide.lesion.cpu(), coords)
    return match_detections(detector(slide.scores * slide.confidence, coords), lesions)
