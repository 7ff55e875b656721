"""Heat maps of a few slides: the runs of all plug-ins side by side, epoch by epoch."""

import base64
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from mil_anchor.maps.colors import AttentionColors, attention_colors
from mil_anchor.maps.file import MAPS_FILE, KeptBag, read_map, read_maps
from mil_anchor.maps.grid import TileGrid
from mil_anchor.maps.slide import SlideMap
from mil_anchor.maps.view import SlideView, view_slide
from mil_anchor.report.curves import rounded
from mil_anchor.results import Run

log = logging.getLogger(__name__)

SCALES = ("percentile", "log")
_COLOR_MAP = "viridis"
# Level 0 of a picture is "no tile"; the others are the colours from the lowest to the highest.
_N_LEVELS = 255
_MAX_SLIDES = 16
_MAX_EPOCHS = 20
_MAX_BYTES = 3_000_000


class Slides(NamedTuple):
    """Slides for the page: what it draws of each, and how many there was no room for."""

    shown: list[dict[str, Any]]
    n_left_out: int


class _Candidate(NamedTuple):
    """A slide whose attention all runs of one data set, model, seed and fold have kept."""

    runs: list[Run]
    bag_id: str
    epochs: list[int]


def slides(runs: Sequence[Run]) -> Slides:
    """A few slides of each data set and model, with the attention of every plug-in's run.

    Compared are runs of one data set, model, seed and fold, on validation slides that all of them
    have kept. As there is little room on a page, slides of the first seed come first, and of a
    longer training at most 20 epochs are shown.

    Args:
        runs: Complete runs.
    """
    chosen: list[dict[str, Any]] = []
    n_bytes, n_left_out = 0, 0
    for candidate in _candidates(runs):
        if len(chosen) >= _MAX_SLIDES or n_bytes >= _MAX_BYTES:
            n_left_out += 1
            continue
        try:
            drawn = _slide(candidate)
        except ValueError as error:
            log.warning("No heat map on the page: %s", error)
            continue
        chosen.append(drawn)
        n_bytes += sum(
            len(image)
            for panel in drawn["panels"]
            for own in panel["images"].values()
            for image in own
        )
    return Slides(chosen, n_left_out)


def color_stops() -> list[str]:
    """The colours of the maps from the lowest to the highest, evenly spaced, for a legend."""
    return [to_hex(color) for color in colormaps[_COLOR_MAP](np.linspace(0, 1, 17))]


def _candidates(runs: Sequence[Run]) -> list[_Candidate]:
    """First those of the first seed, of all data sets and models in turn."""
    cells: dict[tuple[str, str], dict[tuple[int, int], list[Run]]] = {}
    for run in runs:
        of = run.metrics
        seeds = cells.setdefault((of["data"], of["model"]), {})
        seeds.setdefault((of["seed"], of["fold"]), []).append(run)
    ranked = []
    for cell, seeds in sorted(cells.items()):
        for place, (_, members) in enumerate(sorted(seeds.items())):
            for rank, candidate in enumerate(_kept_by_all(members)):
                ranked.append(((place, rank, cell), candidate))
    return [candidate for _, candidate in sorted(ranked, key=lambda entry: entry[0])]


def _kept_by_all(runs: Sequence[Run]) -> Iterator[_Candidate]:
    """In the order of the first run's file, which begins with what is likely to be found."""
    kept = {run.folder: _kept(run) for run in runs}
    with_maps = [run for run in runs if kept[run.folder]]
    if not with_maps:
        return
    for bag_id in kept[with_maps[0].folder]:
        of_runs = [kept[run.folder].get(bag_id) for run in with_maps]
        if None not in of_runs:
            epochs = set.intersection(*(set(bag.epochs) for bag in of_runs if bag is not None))
            if epochs:
                yield _Candidate(with_maps, bag_id, sorted(epochs))


def _kept(run: Run) -> dict[str, KeptBag]:
    file = run.folder / MAPS_FILE
    if not file.exists():
        return {}
    try:
        return {bag.bag_id: bag for bag in read_maps(file) if bag.epochs}
    except ValueError as error:
        log.warning("No heat maps of %s: %s", run.folder, error)
        return {}


def _slide(candidate: _Candidate) -> dict[str, Any]:
    maps = [read_map(run.folder / MAPS_FILE, candidate.bag_id) for run in candidate.runs]
    view = view_slide(maps, None)
    places = np.linspace(0, len(candidate.epochs) - 1, min(_MAX_EPOCHS, len(candidate.epochs)))
    epochs = [candidate.epochs[int(place)] for place in places.round()]
    attentions = [own.attention(epoch) for own in maps for epoch in epochs]
    panels: list[dict[str, Any]] = [
        {
            "plugin": run.cell[2],
            "largest": [rounded(float(own.attention(epoch).max())) for epoch in epochs],
            "images": {},
        }
        for run, own in zip(candidate.runs, maps, strict=True)
    ]
    legends = {}
    for scale in SCALES:
        colors = attention_colors(scale, attentions)
        legends[scale] = _legend(colors)
        images = [_png(view.grid, _levels(colors, values)) for values in colors.values]
        for place, panel in enumerate(panels):
            panel["images"][scale] = images[place * len(epochs) : (place + 1) * len(epochs)]
    of = candidate.runs[0].metrics
    return {
        **{key: of[key] for key in ("data", "model", "seed", "fold")},
        "bag": candidate.bag_id,
        "label": maps[0].label,
        "part": maps[0].part,
        "n_instances": _n_instances(maps[0]),
        "epochs": epochs,
        "shape": list(view.grid.shape),
        "outline": _outline(view),
        "legends": legends,
        "panels": panels,
    }


def _n_instances(slide_map: SlideMap) -> int:
    return len(slide_map.known_coords.xy)


def _legend(colors: AttentionColors) -> dict[str, Any]:
    ticks = colors.ticks or []
    return {
        "label": colors.label,
        "ticks": [[rounded(float(colors.norm(tick))), f"{tick:g}"] for tick in ticks],
    }


def _levels(
    colors: AttentionColors, values: Float64[np.ndarray, " instance"]
) -> Float64[np.ndarray, " instance"]:
    shares = np.asarray(colors.norm(values), dtype=np.float64)
    return np.floor(shares * (_N_LEVELS - 1) + 0.5) + 1


def _png(grid: TileGrid, levels: Float64[np.ndarray, " instance"]) -> str:
    """A picture with a pixel for each cell, transparent where there is no tile, in base64."""
    picture = grid.picture(torch.from_numpy(levels))
    indices: UInt8[np.ndarray, "row column"] = np.where(np.isnan(picture), 0, picture).astype(
        np.uint8
    )
    image = Image.fromarray(indices)
    colors = colormaps[_COLOR_MAP](np.linspace(0, 1, _N_LEVELS), bytes=True)[:, :3]
    image.putpalette(bytes(3) + np.ascontiguousarray(colors).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _outline(view: SlideView) -> str:
    """Outlines of lesions and classes as an SVG path in cells; empty where none is known."""
    left, _, _, top = view.grid.extent
    cells = ((view.edges - np.array([left, top])) / view.grid.pitch).round().astype(int).tolist()
    return "".join(f"M{x0} {y0}L{x1} {y1}" for (x0, y0), (x1, y1) in cells)
