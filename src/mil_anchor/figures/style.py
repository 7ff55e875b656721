"""What the figures share: colours that the colour-blind tell apart, and the grid of panels."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is hard to see on white.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("solid", "dashed", "dotted", "dashdot")


class Style(NamedTuple):
    """How a line is drawn in all panels."""

    color: str
    linestyle: str


def line_styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each; the dashes change when the colours are used up."""
    n = len(COLORS)
    return {
        name: Style(COLORS[index % n], _DASHES[index // n % len(_DASHES)])
        for index, name in enumerate(names)
    }


def make_grid(
    n_rows: int,
    n_columns: int,
    *,
    width: float = 3.2,
    height: float = 2.6,
    sharex: bool | Literal["row", "col"] = False,
    sharey: bool | Literal["row", "col"] = False,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a grid of panels, width and height of each in inches, and room for a legend.

    With ``height_ratios``, one for each row, ``height`` is the mean over the rows.
    """
    size = (width * n_columns + 1.6, height * n_rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        n_rows,
        n_columns,
        squeeze=False,
        sharex=sharex,
        sharey=sharey,
        height_ratios=height_ratios,
    )
    return figure, [list(row) for row in axes]


def add_legend(figure: Figure, title: str, *, others: Sequence[Artist] = ()) -> None:
    """One legend for all panels, outside of them, in the order of the first appearance.

    Args:
        figure: The figure.
        title: Title of the legend.
        others: Further entries, which name themselves.
    """
    entries: dict[str, Artist] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    handles = [*entries.values(), *others]
    labels = [*entries, *(str(other.get_label()) for other in others)]
    figure.legend(handles, labels, title=title, loc="outside right upper")
