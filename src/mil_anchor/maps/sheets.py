"""Sheets of heat maps: attention on the tiles of a slide, panel beside panel."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from jaxtyping import Float32, Float64
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from mil_anchor.data.bags import MicrometreCoords
from mil_anchor.maps.colors import AttentionColors, attention_colors
from mil_anchor.maps.geojson import class_color
from mil_anchor.maps.grid import TileGrid
from mil_anchor.maps.slide import SlideMap
from mil_anchor.maps.thumbnail import Thumbnail
from mil_anchor.maps.view import SlideView, view_slide

_COLOR_MAP = "viridis"
_NO_TILE = "#ececec"
_UNKNOWN = "#ffffff"
_CLEAR = (0.0, 0.0, 0.0, 0.0)
_OUTLINE = "#D55E00"
_SHEET_ASPECT = 2.0
_TITLE_POINTS = 9
_STRIP_INCHES = 0.25
_MIN_WIDTH = 2.0


@dataclass(frozen=True, eq=False)
class Panel:
    """One heat map of a sheet.

    Args:
        title: What it shows: "abmil + anchor_nsf, epoch 5".
        slide_map: The attention on the slide.
        epoch: Epoch from 0; None: with the chosen checkpoint.
        row: A row of the attention; None: the mean over rows.
    """

    title: str
    slide_map: SlideMap
    epoch: int | None = None
    row: int | None = None

    @property
    def attention(self) -> Float32[Tensor, " instance"]:
        """The attention that the panel shows."""
        return self.slide_map.attention(self.epoch, row=self.row)


def draw_sheet(
    panels: Sequence[Sequence[Panel]],
    file: Path,
    *,
    scale: str = "percentile",
    image: Thumbnail | None = None,
    mpp: float | int | None = None,
) -> None:
    """Draw heat maps of one slide side by side, in one scale of colours.

    "linear" and "log" show the attention times the number of tiles N, so that 1 is uniform, and run
    over all panels: colours can be compared between them. "log" ends four decades below the largest
    value. "percentile" ranks the tiles of each panel (100: highest; equal tiles share the mean of
    their ranks), which shows their order however concentrated a map is, and nothing of the
    concentration: hence each title gives the largest attention. Where instance labels or lesions
    are known, a first panel shows them and their outlines lie on the others.

    Args:
        panels: Rows of panels; a single row or column is laid out anew if it is long.
        file: The image to write; its suffix chooses the format.
        scale: "percentile", "linear" or "log".
        image: The slide; the maps lie half transparent over it.
        mpp: Micrometres per level-0 pixel, for the scale bar; None: what the image says.

    Raises:
        ValueError: No panels, or of several slides or different tiles, an unknown scale, a slide
            without coordinates, or an image that the tiles do not lie on.

    Source:
        ASMIL (arXiv 2603.06658), Figures 3, 4 and 13 compare epochs and methods in this way; the
        scales and outlines are ours.
    """
    drawn = [panel for row in panels for panel in row]
    slide = view_slide([panel.slide_map for panel in drawn], image)
    colors = attention_colors(scale, [panel.attention for panel in drawn])
    leading = slide.classes is not None or image is not None
    width, height = _panel_size(slide.grid, len(drawn) + leading)
    titles = [_title(panel, width) for panel in drawn]
    places = _layout(panels, leading=leading, aspect=width / height)
    n_rows, n_columns = (1 + max(place[axis] for place in places) for axis in (0, 1))
    above = max(title.count("\n") + 1 for title in titles) * 1.4 * _TITLE_POINTS / 72
    margin = 0.4 if slide.classes is None else 0.7
    figure = Figure(
        figsize=(n_columns * width + 0.9, n_rows * (above + height + _STRIP_INCHES) + margin),
        layout="constrained",
    )
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    cell = min(width / slide.grid.shape[1], height / slide.grid.shape[0])
    for place, index in places.items():
        axis = axes[place]
        _frame(axis, slide, height)
        if index is None:
            title = "slide" if slide.classes is None else "ground truth"
            _draw_classes(axis, slide)
        else:
            title = titles[index]
            _draw_attention(axis, slide, colors.values[index], norm=colors.norm, cell=cell)
        # Names of slides and runs may hold what matplotlib would read as formulas.
        axis.set_title(title, fontsize=_TITLE_POINTS, parse_math=False)
    _draw_bar(axes[0, 0], slide, height, mpp=image.mpp if mpp is None and image else mpp)
    _add_color_bar(figure, list(axes.flat), colors)
    _add_legend(figure, slide)
    of = slide.slide_map
    figure.suptitle(f"{of.bag_id} ({of.part}, label {of.label})", fontsize=10, parse_math=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=200)


def _layout(
    panels: Sequence[Sequence[Panel]], *, leading: bool, aspect: float
) -> dict[tuple[int, int], int | None]:
    """Which panel, by its number in reading order, has which row and column; None: the slide."""
    lengths = [len(row) for row in panels]
    first: list[int | None] = [None] if leading else []
    if len(lengths) == 1 or max(lengths) == 1:
        line = [*first, *range(sum(lengths))]
        n_columns = min(
            range(1, 1 + len(line)),
            key=lambda n: abs(np.log(n * aspect / -(-len(line) // n) / _SHEET_ASPECT)),
        )
        n_columns = -(
            -len(line) // -(-len(line) // n_columns)
        )  # the last row as full as the others
        return {divmod(position, n_columns): index for position, index in enumerate(line)}
    places: dict[tuple[int, int], int | None] = {(0, 0): None} if leading else {}
    for row, length in enumerate(lengths):
        for column in range(length):
            places[row, column + leading] = sum(lengths[:row]) + column
    return places


def _panel_size(grid: TileGrid, n_panels: int) -> tuple[float, float]:
    """Inches; equal area for slides of all shapes, but wide enough for a title."""
    side = 3.8 if n_panels <= 2 else 3.0 if n_panels <= 6 else 2.3
    aspect = min(max(grid.shape[1] / grid.shape[0], 0.2), 5.0)
    return max(side * aspect**0.5, _MIN_WIDTH), side / aspect**0.5


def _title(panel: Panel, width: float) -> str:
    attention = panel.attention
    largest = float(attention.max()) * len(attention)
    lines = wrap(panel.title, int(width * 72 / (0.58 * _TITLE_POINTS)))
    digits = 0 if largest >= 10 else 1
    return "\n".join([*lines, f"largest {largest:,.{digits}f} times uniform"])


def _frame(axis: Axes, slide: SlideView, height: float) -> None:
    """The part of the slide with tiles, a strip for the scale bar below it, and the thumbnail."""
    left, right, bottom, top = slide.grid.extent
    axis.set(xlim=(left, right), ylim=(bottom + _strip(slide.grid, height), top), aspect="equal")
    if slide.image is None:
        return
    rows, columns = slide.image_size
    shown = axis.imshow(slide.image.image, extent=(0, columns, rows, 0))
    axis.set(xlim=(left, right), ylim=(bottom + _strip(slide.grid, height), top))
    shown.set_clip_path(
        Rectangle((left, top), right - left, bottom - top, transform=axis.transData)
    )


def _strip(grid: TileGrid, height: float) -> float:
    """Room for the scale bar below the tiles, in the unit of the coordinates."""
    return grid.shape[0] * grid.pitch * _STRIP_INCHES / height


def _draw_attention(
    axis: Axes,
    slide: SlideView,
    values: Float64[np.ndarray, " instance"],
    *,
    norm: Normalize,
    cell: float,
) -> None:
    """The map and the outlines of what is known; ``cell`` is the width of a tile in inches."""
    axis.imshow(
        slide.grid.picture(torch.from_numpy(values)),
        extent=slide.grid.extent,
        cmap=colormaps[_COLOR_MAP].with_extremes(bad=_NO_TILE if slide.image is None else _CLEAR),
        norm=norm,
        alpha=None if slide.image is None else 0.6,
    )
    # Twice, to stand out from dark and from light tiles; thin, not to cover small ones.
    line = min(max(0.25 * 72 * cell, 0.4), 1.5)
    for color, width in (("white", 1.8 * line), (_OUTLINE, line)):
        axis.add_collection(LineCollection(list(slide.edges), colors=color, linewidths=width))


def _draw_classes(axis: Axes, slide: SlideView) -> None:
    if slide.classes is None:
        return
    picture = slide.grid.picture(slide.classes)
    colors = np.zeros((*picture.shape, 4))
    if slide.image is None:
        colors[:] = to_rgba(_NO_TILE)
    for label, color, _ in _classes_shown(slide):
        colors[picture == label] = to_rgba(color, alpha=1 if slide.image is None else 0.6)
    axis.imshow(colors, extent=slide.grid.extent)


def _classes_shown(slide: SlideView) -> Iterator[tuple[int, str, str]]:
    """Label, colour and name of the classes that are coloured; over an image, findings only."""
    if slide.classes is None:
        return
    counts = Counter(slide.classes.tolist())
    for label, count in sorted(counts.items()):
        if label <= 0 and slide.image is not None:
            continue
        name = "unknown" if label < 0 else f"class {label}"
        if slide.slide_map.instance_label is None:
            name = "lesion" if label else "no lesion"
        color = _UNKNOWN if label < 0 else class_color(label)
        yield label, color, f"{name} ({count:,} tiles)"


def _draw_bar(axis: Axes, slide: SlideView, height: float, *, mpp: float | None) -> None:
    """A length of 1, 2 or 5 times a power of ten, at most a third of the panel."""
    left, right, bottom, _ = slide.grid.extent
    unit_um = 1.0 if isinstance(slide.slide_map.coords, MicrometreCoords) else mpp
    longest = (right - left) / 3 * (unit_um or 1.0)
    power = 10.0 ** np.floor(np.log10(longest))
    length = power * max(step for step in (1, 2, 5) if step * power <= longest)
    name = f"{length:,g} px" if unit_um is None else f"{length:g} µm"
    if unit_um is not None and length >= 1000:
        name = f"{length / 1000:g} mm"
    across = length / (unit_um or 1.0)
    below = bottom + 0.55 * _strip(slide.grid, height)
    axis.plot([left, left + across], [below, below], color="black", linewidth=2)
    gap = 0.3 * _strip(slide.grid, height)
    axis.text(left + across + gap, below, name, fontsize=8, verticalalignment="center")


def _add_color_bar(figure: Figure, axes: list[Axes], colors: AttentionColors) -> None:
    width, height = figure.get_size_inches()
    bar = figure.colorbar(
        ScalarMappable(colors.norm, _COLOR_MAP),
        ax=axes,
        label=colors.label,
        extend=colors.extend,
        fraction=0.2 / width,
        aspect=0.75 * height / 0.15,
        pad=0.01,
        ticks=colors.ticks,
    )
    bar.ax.minorticks_off()
    if colors.ticks is not None:
        bar.ax.set_yticklabels([f"{tick:g}" for tick in colors.ticks])


def _add_legend(figure: Figure, slide: SlideView) -> None:
    handles: list[Patch] = [
        Patch(facecolor=color, edgecolor="#666666", label=name)
        for _, color, name in _classes_shown(slide)
    ]
    if len(slide.edges):
        handles.append(
            Patch(facecolor="none", edgecolor=_OUTLINE, label="ground truth in all panels")
        )
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False
        )
