"""What the slides of a synthetic cohort are like, and how many and how large they are."""

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class WitnessRange:
    """Witness rates, drawn log-uniformly, of one kind of slide with a lesion.

    Args:
        probability: Share of the slides with a lesion that are of this kind.
        low: Smallest share of a slide's tiles that are lesion.
        high: Largest share.

    Raises:
        ValueError: If the probability is not in (0, 1], or not 0 < low <= high <= 0.6.
    """

    probability: float
    low: float
    high: float

    def __post_init__(self) -> None:
        """Refuse rates that no slide can have."""
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"The probability of a witness range must lie in (0, 1], but {self.probability} "
                "came. Leave out ranges that no slide has."
            )
        if not 0 < self.low <= self.high <= 0.6:
            raise ValueError(
                "A witness range must satisfy 0 < low <= high <= 0.6, so that normal tissue is "
                f"left, but {self.low} and {self.high} came. Give shares of a slide's tiles."
            )


@dataclass(frozen=True)
class Preset:
    """What the slides of a cohort are like.

    A shift, offset or length is Mahalanobis: in standard deviations of a component.

    Args:
        class_names: Names of the classes, the one without a lesion first. Class g is the highest
            grade of lesion on the slide.
        witness: Kinds of slides with a lesion; their probabilities sum to 1. Matches how small a
            share of a slide carries its label.
        lower_grades: Probability that a slide of grade g also holds lesions of a lower grade; each
            lower grade is drawn for itself. Matches lesions that progress.
        more_foci: Mean number of lesion foci beyond the first (Poisson), each grade.
        strength: Shift of a tile that is lesion altogether; its median over slides.
        strength_spread: Standard deviation of the logarithm of the shift over slides. Matches
            tumours that are easy or hard to tell.
        mimics: Probability that a slide holds tiles that look half-way to a lesion, of any label.
            Matches benign tissue that pathologists look at twice.
        mimic_share: Smallest and largest share of such tiles, drawn log-uniformly.
        mimic_strength: Shift of a mimic as a share of the slide's lesion shift.
        artefact_link: How far an artefact follows the label in the training centres: 0 not at all,
            1 always. Matches pen marks, or a scanner that one clinic used for its cancers.
        artefact_share: Smallest and largest share of artefact tiles, drawn log-uniformly.
        label_noise: Probability that a slide of a training centre has another class's label.
        n_centres: Number of centres. The last one is held out.
        centre_gain: Standard deviation of the logarithm of a centre's gain per feature. With the
            offset it matches stain and scanner.
        centre_offset: Length per component of a centre's offset.
        size_spread: Standard deviation of the logarithm of the number of tiles.

    Raises:
        ValueError: If a probability, share or count is impossible.
    """

    class_names: tuple[str, ...]
    witness: tuple[WitnessRange, ...]
    lower_grades: float = 0.0
    more_foci: float = 2.0
    strength: float = 6.0
    strength_spread: float = 0.25
    mimics: float = 0.6
    mimic_share: tuple[float, float] = (0.005, 0.08)
    mimic_strength: float = 0.7
    artefact_link: float = 0.2
    artefact_share: tuple[float, float] = (0.02, 0.1)
    label_noise: float = 0.04
    n_centres: int = 4
    centre_gain: float = 0.15
    centre_offset: float = 0.3
    size_spread: float = 0.5

    def __post_init__(self) -> None:
        """Refuse a cohort that cannot be drawn."""
        if len(self.class_names) < 2:
            raise ValueError(
                f"A cohort needs two classes or more, but {self.class_names} came. "
                "Name the class without a lesion first."
            )
        total = sum(kind.probability for kind in self.witness)
        if abs(total - 1) > 1e-9:
            raise ValueError(
                f"The probabilities of the witness ranges must sum to 1, but their sum is {total}. "
                "Scale them."
            )
        for name in ("lower_grades", "mimics", "artefact_link", "label_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must lie in 0..1, but {getattr(self, name)} came. Give a probability."
                )
        for name in ("mimic_share", "artefact_share"):
            low, high = getattr(self, name)
            if not 0 < low <= high < 0.2:
                raise ValueError(
                    f"{name} must satisfy 0 < low <= high < 0.2, so that there is room beside the "
                    f"lesions, but {low} and {high} came. Give shares of a slide's tiles."
                )
        if self.n_centres < 2:
            raise ValueError(
                f"n_centres must be at least 2, since the last centre is held out, but "
                f"{self.n_centres} came. Use 4."
            )
        for name in (
            "more_foci",
            "strength",
            "strength_spread",
            "mimic_strength",
            "centre_gain",
            "centre_offset",
            "size_spread",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be a number from 0, but {getattr(self, name)} came. "
                    "Use 0 to switch it off."
                )


@dataclass(frozen=True)
class Size:
    """How many slides a cohort has, and how large they are.

    Args:
        n_slides: Number of slides.
        n_tiles: Median number of tiles of a slide.
        width: Number of features.

    Raises:
        ValueError: If there is no slide, a slide is too small for a lesion among normal tissue, or
            there are too few features for distinct lesions.
    """

    n_slides: int
    n_tiles: int
    width: int

    def __post_init__(self) -> None:
        """Refuse a cohort too small to hold what it promises."""
        for name, least in (("n_slides", 1), ("n_tiles", 40), ("width", 8)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, but {getattr(self, name)} came. "
                    "Use a larger cohort."
                )


PRESETS = MappingProxyType(
    {
        "camelyon_like": Preset(
            class_names=("negative", "positive"),
            witness=(WitnessRange(0.7, 0.002, 0.05), WitnessRange(0.3, 0.05, 0.5)),
        ),
        "bracs_like": Preset(
            class_names=("benign", "atypical", "malignant"),
            witness=(WitnessRange(1.0, 0.1, 0.2),),
            lower_grades=0.7,
        ),
    }
)

SIZES = MappingProxyType(
    {
        "tiny": Size(n_slides=60, n_tiles=120, width=32),
        "small": Size(n_slides=150, n_tiles=600, width=64),
        "medium": Size(n_slides=200, n_tiles=2500, width=128),
        "full": Size(n_slides=300, n_tiles=10_000, width=384),
    }
)
