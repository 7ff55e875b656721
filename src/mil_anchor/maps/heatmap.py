"""Heat maps of runs: which attention to draw, under which names, and where to."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from mil_anchor.maps.file import MAPS_FILE, read_map
from mil_anchor.maps.geojson import write_geojson
from mil_anchor.maps.thumbnail import Thumbnail, open_thumbnail
from mil_anchor.results import METRICS_FILE, read_metrics

try:
    from mil_anchor.maps.sheets import Panel, draw_sheet
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Heat maps need matplotlib, which is not installed. Run: pip install 'mil_anchor[figures]'"
    ) from error

_THUMBNAIL_SIDE = 2000


def heatmap(
    run_folders: Sequence[Path],
    slide: str,
    *,
    epochs: Sequence[int] | None = None,
    rows: Sequence[int] | Literal["all"] | None = None,
    image: Path | None = None,
    scale: str = "percentile",
    geojson: bool = False,
    mpp: float | int | None = None,
    out: Path | None = None,
) -> list[Path]:
    """Draw the attention of one or several runs on a slide as one sheet.

    Args:
        run_folders: Folders of runs that keep attention maps.
        slide: Name of the slide.
        epochs: Epochs from 0, as in ``attention.csv``; None: the chosen checkpoint, or the last
            epoch of a run that is not complete.
        rows: Rows of the attention, each in a panel of its own; "all" of them; None: their mean.
        image: The slide itself, to draw the attention over its thumbnail.
        scale: Colours, see `draw_sheet`.
        geojson: Whether to write each panel for QuPath, too, into ``heatmaps`` of its run.
        mpp: Micrometres per level-0 pixel; None: what the image says, else ``data.mpp`` of a run.
        out: The sheet; its suffix chooses the format. None: ``heatmaps/<slide>.png`` in the folder
            of a single run; of several runs, ``heatmap_<slide>.png`` where the command is run.

    Returns:
        The files that were written, the sheet first.

    Raises:
        ValueError: A run keeps no map of the slide, epoch or row, the slide has no coordinates, the
            image is not that of the slide, or ``mpp`` is needed and not known.
        ModuleNotFoundError: An image came, and OpenSlide is not installed.
    """
    if not run_folders:
        raise ValueError("A heat map needs at least one run, but none came. Name a run folder.")
    configs = [_read_config(folder) for folder in run_folders]
    stem = _file_stem(slide)
    panels: list[list[Panel]] = []
    exports: list[tuple[Path, Panel]] = []
    for folder, name in zip(run_folders, _run_names(run_folders, configs), strict=True):
        of_run = list(_panels_of_run(folder, slide, name=name, epochs=epochs, rows=rows))
        panels += of_run
        for panel in (panel for row in of_run for panel in row):
            which = "best" if panel.epoch is None else f"epoch{panel.epoch}"
            of_row = "" if panel.row is None else f"_row{panel.row}"
            exports.append((folder / "heatmaps" / f"{stem}_{which}{of_row}.geojson", panel))
    thumbnail = None if image is None else open_thumbnail(image, _THUMBNAIL_SIDE)
    mpp = _known_mpp(mpp, thumbnail, configs)
    if thumbnail is not None:
        thumbnail = replace(thumbnail, mpp=mpp)
    if out is None:
        single = len(run_folders) == 1
        out = run_folders[0] / "heatmaps" / f"{stem}.png" if single else Path(f"heatmap_{stem}.png")
    draw_sheet(panels, out, scale=scale, image=thumbnail, mpp=mpp)
    if not geojson:
        return [out]
    for file, panel in exports:
        write_geojson(panel.slide_map, file, epoch=panel.epoch, row=panel.row, mpp=mpp)
    return [out, *(file for file, _ in exports)]


def _panels_of_run(
    folder: Path,
    slide: str,
    *,
    name: str,
    epochs: Sequence[int] | None,
    rows: Sequence[int] | Literal["all"] | None,
) -> Iterator[list[Panel]]:
    """A row of panels for each row of the attention, with a column for each epoch."""
    slide_map = read_map(folder / MAPS_FILE, slide)
    shown: Sequence[int | None] = [None]
    if epochs is not None:
        shown = epochs
    elif not slide_map.has_best and slide_map.epochs:
        shown = slide_map.epochs[-1:]
    best = "best"
    if (folder / METRICS_FILE).exists():
        best = f"best (epoch {read_metrics(folder)['best_epoch']})"
    chosen: list[int | None] = [None]
    if rows is not None:
        chosen = [*(range(slide_map.n_rows) if rows == "all" else rows)]
    for row in chosen:
        of_row = "" if row is None else f", row {row}"
        panels = []
        for epoch in shown:
            when = best if epoch is None else f"epoch {epoch}"
            panel = Panel(f"{name}, {when}{of_row}", slide_map, epoch=epoch, row=row)
            try:
                _ = panel.attention
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from error
            panels.append(panel)
        yield panels


def _known_mpp(
    mpp: float | int | None, thumbnail: Thumbnail | None, configs: Sequence[Any]
) -> float | int | None:
    """Micrometres per level-0 pixel as given, else of the image, else of the first run with one."""
    if mpp is not None and not 0 < mpp < math.inf:
        raise ValueError(f"mpp must be a number above 0, but {mpp} came. Give none to look it up.")
    of_image = None if thumbnail is None else thumbnail.mpp
    said = (mpp, of_image, *(config.data.get("mpp") for config in configs))
    return next((own for own in said if own is not None), None)


def _read_config(folder: Path) -> Any:
    if not (folder / "config.yaml").exists():
        raise ValueError(
            f"A run folder must hold the config.yaml of its run, but {folder} does not. Name a "
            "folder that 'python run.py' has written."
        )
    return OmegaConf.load(folder / "config.yaml")


def _run_names(folders: Sequence[Path], configs: Sequence[Any]) -> list[str]:
    """Model and plug-in of every run, and what else tells the runs apart."""
    names: list[str] = []
    details: list[dict[str, str]] = []
    for config in configs:
        plugin = config.names.plugin
        names.append(config.names.model if plugin == "none" else f"{config.names.model} + {plugin}")
        details.append(
            {"": config.names.data, "seed ": str(config.seed), "fold ": str(config.data.fold)}
        )
    for what in details[0]:
        if len({detail[what] for detail in details}) > 1:
            names = [f"{n}, {what}{d[what]}" for n, d in zip(names, details, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{n}, {folder.name}" for n, folder in zip(names, folders, strict=True)]
    return names


def _file_stem(bag_id: str) -> str:
    """The id as a part of a file name; a hash keeps apart ids that would become equal."""
    stem = re.sub(r"[^\w.-]|^\.", "_", bag_id)[:100]
    if stem == bag_id:
        return stem
    return f"{stem}-{sha256(bag_id.encode(errors='surrogatepass')).hexdigest()[:8]}"
