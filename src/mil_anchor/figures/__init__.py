"""Figures of runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mil_anchor.results import Run

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Figures need matplotlib, which is not installed. Run: pip install 'mil_anchor[figures]'"
    ) from error

from mil_anchor.figures.curves import concentration_figure, jsd_figure
from mil_anchor.figures.embedding import tsne_figure
from mil_anchor.figures.reliability import reliability_figure
from mil_anchor.figures.targets import targets_figure

__all__ = [
    "FIGURES",
    "DrawnFigures",
    "concentration_figure",
    "draw_figures",
    "jsd_figure",
    "reliability_figure",
    "targets_figure",
    "tsne_figure",
]

FIGURES: dict[str, Callable[[Sequence[Run]], Figure]] = {
    "jsd": jsd_figure,
    "concentration": concentration_figure,
    "tsne": tsne_figure,
    "targets": targets_figure,
    "reliability": reliability_figure,
}


class DrawnFigures(NamedTuple):
    """The files that were written, and for each figure that was not: why."""

    files: list[Path]
    missing: dict[str, str]


def draw_figures(runs: Sequence[Run], folder: Path) -> DrawnFigures:
    """Write every figure in ``FIGURES`` that the runs have data for, as PNG and as SVG.

    Args:
        runs: Complete runs.
        folder: Where to; it is made.

    Raises:
        ValueError: The runs have no data for any figure.
    """
    drawn = DrawnFigures([], {})
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in FIGURES.items():
        try:
            figure = make(runs)
        except (ValueError, ModuleNotFoundError) as error:
            drawn.missing[name] = str(error)
            continue
        for suffix in ("png", "svg"):
            file = folder / f"{name}.{suffix}"
            figure.savefig(file, dpi=150)
            drawn.files.append(file)
    if not drawn.files:
        reasons = " ".join(f"{name}: {why}" for name, why in drawn.missing.items())
        raise ValueError(f"The runs must have data for a figure, but they have none. {reasons}")
    return drawn
