"""Detections of lesions, made of tile scores."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from mil_anchor.data.bags import MicrometreCoords

# CAMELYON16: a grown lesion with a shorter major axis is one of isolated tumour cells.
ISOLATED_BELOW_UM = 275


@dataclass(frozen=True, eq=False)
class Detections:
    """Points of a slide where a lesion is suspected.

    Args:
        scores: How sure each one is; finite.
        xy_um: Position (x, y) of each one in micrometres; x runs to the right and y down.

    Raises:
        ValueError: If the lengths differ, or a value is not finite.
    """

    scores: Float[np.ndarray, " detection"]
    xy_um: Float[np.ndarray, "position 2"]

    def __post_init__(self) -> None:
        """Refuse what would be sorted wrongly."""
        if len(self.scores) != len(self.xy_um):
            raise ValueError(
                f"Every detection needs a score and a position, but {len(self.scores)} scores and "
                f"{len(self.xy_um)} positions came. Read both from one place."
            )
        if not (np.isfinite(self.scores).all() and np.isfinite(self.xy_um).all()):
            raise ValueError(
                "Scores and positions of detections must be finite, but NaN or infinity came. "
                "Look for a diverged loss, or for tiles without a position."
            )


class Detector(ABC):
    """Makes detections of tile scores; its text says how."""

    @abstractmethod
    def __call__(self, scores: Float[Tensor, " tile"], coords: MicrometreCoords) -> Detections:
        """Detections at tile centres, with the scores of these tiles.

        Args:
            scores: One score per tile, higher is more suspect.
            coords: Where the tiles lie.

        Returns:
            The detections.

        Raises:
            ValueError: As `Detections`.
            ModuleNotFoundError: If scipy is needed and not installed.
        """

    @abstractmethod
    def __str__(self) -> str: ...


class AllTiles(Detector):
    """Every tile is a detection."""

    @override
    def __call__(self, scores: Float[Tensor, " tile"], coords: MicrometreCoords) -> Detections:
        corners = coords.xy.detach().double().cpu().numpy()
        return Detections(scores.detach().double().cpu().numpy(), corners + coords.pitch / 2)

    @override
    def __str__(self) -> str:
        return "all tiles"


@dataclass(frozen=True)
class NonMaximumSuppression(Detector):
    """Takes the highest tile, drops the others within a radius, and so on with what remains.

    Tiles of one score are taken from top to bottom and from left to right.

    Args:
        radius_um: The radius in micrometres. The default is the size below which a grown lesion
            counts as isolated tumour cells: closer peaks are hardly two lesions. A radius below the
            pitch of the tiles drops nothing.
    """

    radius_um: float | int = ISOLATED_BELOW_UM

    def __post_init__(self) -> None:
        """Refuse a radius that is none."""
        if not 0 < self.radius_um < math.inf:
            raise ValueError(
                f"radius_um must be a number above 0, but {self.radius_um} came. Use AllTiles() "
                "to suppress nothing."
            )

    @override
    def __call__(self, scores: Float[Tensor, " tile"], coords: MicrometreCoords) -> Detections:
        tiles = AllTiles()(scores, coords)
        tree = import_optional("scipy.spatial").cKDTree(tiles.xy_um)
        left = np.ones(len(tiles.scores), dtype=bool)
        kept = []
        for index in _from_highest(tiles):
            if left[index]:
                kept.append(index)
                left[tree.query_ball_point(tiles.xy_um[index], self.radius_um)] = False
        return Detections(tiles.scores[kept], tiles.xy_um[kept])

    @override
    def __str__(self) -> str:
        return f"nms, radius {self.radius_um:g} um"


@dataclass(frozen=True)
class Components(Detector):
    """One detection for each 8-connected set of tiles above a threshold, at its highest tile.

    Args:
        threshold: Of the scores, rescaled to [0, 1] on each slide. The detection keeps the score
            as it came.
    """

    threshold: float | int = 0.5

    def __post_init__(self) -> None:
        """Refuse a threshold that every slide, or none, is above."""
        if not 0 <= self.threshold < 1:
            raise ValueError(
                f"threshold must lie in [0, 1), but {self.threshold} came. Scores are rescaled "
                "to [0, 1] on each slide."
            )

    @override
    def __call__(self, scores: Float[Tensor, " tile"], coords: MicrometreCoords) -> Detections:
        tiles = AllTiles()(scores, coords)
        low, high = tiles.scores.min(), tiles.scores.max()
        above = tiles.scores > low + self.threshold * (high - low)
        tiles = Detections(tiles.scores[above], tiles.xy_um[above])
        n_tiles = len(tiles.scores)
        # Tiles of different tissue pieces may lie on shifted grids: distances need no common one.
        tree = import_optional("scipy.spatial").cKDTree(tiles.xy_um)
        pairs = tree.query_pairs(1.5 * coords.pitch, p=math.inf, output_type="ndarray")
        graph = import_optional("scipy.sparse").coo_array(
            (np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(n_tiles, n_tiles)
        )
        _, component = import_optional("scipy.sparse.csgraph").connected_components(
            graph, directed=False
        )
        order = _from_highest(tiles)
        kept = order[np.unique(component[order], return_index=True)[1]]
        return Detections(tiles.scores[kept], tiles.xy_um[kept])

    @override
    def __str__(self) -> str:
        return f"components above {self.threshold:g} of each slide's range"


def import_optional(module: str) -> ModuleType:
    """Import a module of scipy or scikit-image.

    Raises:
        ModuleNotFoundError: If it is not installed; the message says what to run.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"FROC needs {module.partition('.')[0]}, which is not installed. "
            "Run: pip install 'mil_anchor[localization]'"
        ) from error


def _from_highest(tiles: Detections) -> Int[np.ndarray, " detection"]:
    # The position decides between equal scores, so that the order of the tiles does not.
    return np.lexsort((tiles.xy_um[:, 0], tiles.xy_um[:, 1], -tiles.scores))
