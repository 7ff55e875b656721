"""Figures of synthetic.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from docs.synthetic_measures import Curves
from mil_anchor.data.synthetic import PRESETS, SIZES
from mil_anchor.data.synthetic.slide import SlideMap, draw_features, draw_map, plan_slide
from mil_anchor.data.synthetic.world import N_TYPES, World
from mil_anchor.maps.file import MAPS_FILE, read_map, read_maps
from mil_anchor.maps.sheets import Panel, draw_sheet

_EPOCHS = (0, 3, 6, 9, 14, 19, 39)
_NORMAL, _ARTEFACT, _MIMIC = "#d9d9d9", "#222222", "#56B4E9"
_LESIONS = ("#D55E00", "#8b1a1a")
_SIZE = SIZES["medium"]
_SEED = 9  # of a slide that has an artefact, mimics and about the median share of lesion


def draw_curves(runs: Mapping[str, Sequence[Curves]], file: Path) -> None:
    """Movement, concentration and losses by epoch: a row for each preset, a thin line per world.

    Args:
        runs: The runs of each preset, one per world.
        file: The image to write.
    """
    figure = Figure(figsize=(10.5, 2.9 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), 3, sharex=True, sharey="col", squeeze=False)
    for (preset, curves), (moved, concentration, loss) in zip(runs.items(), axes, strict=True):
        _lines(moved, [run.jsd for run in curves], color="C0", label="", first=1)
        moved.set(ylabel=f"{preset}\n\nJSD to the epoch before (nats)")
        _lines(concentration, [run.entropy for run in curves], color="C2", label="entropy / ln N")
        _lines(concentration, [run.largest for run in curves], color="C3", label="largest weight")
        concentration.set(ylabel="attention", ylim=(0, 1.02))
        _lines(loss, [run.train_loss for run in curves], color="C0", label="training")
        _lines(loss, [run.val_loss for run in curves], color="C1", label="validation")
        loss.set(ylabel="cross-entropy")
    for axis, title in zip(axes[0], ("movement", "concentration", "losses"), strict=True):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    for axis in axes[:, (0, 2)].flat:
        axis.set_ylim(bottom=0)
    for axis in axes[0, 1:]:
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)


def draw_epochs(run_folder: Path, file: Path) -> None:
    """The attention of a run on the first slide of which every epoch is kept."""
    maps = run_folder / MAPS_FILE
    slide = read_map(maps, next(bag.bag_id for bag in read_maps(maps) if bag.epochs))
    panels = [Panel(f"epoch {epoch}", slide, epoch=epoch) for epoch in _EPOCHS]
    draw_sheet([panels], file, scale="log")


def draw_cohort(file: Path) -> None:
    """A slide of each preset: tissue types, what lies on them, and the features as colours."""
    figure = Figure(figsize=(10.5, 3.75 * len(PRESETS)), layout="constrained")
    axes = figure.subplots(len(PRESETS), 3, squeeze=False)
    for name, (types, findings, features) in zip(PRESETS, axes, strict=True):
        preset, generator = PRESETS[name], np.random.default_rng(_SEED)
        # A slide of the highest class from the first centre.
        plan = plan_slide(len(preset.class_names) - 1, preset, _SIZE, generator=generator)
        tiles = draw_map(plan, preset, generator=generator)
        world = World(preset, _SIZE.width, generator=generator)
        drawn = draw_features(tiles, plan, preset, world=world, generator=generator)

        palette = [*colormaps["Set2"].colors[:N_TYPES], to_rgb(_ARTEFACT)]
        _picture(types, tiles, np.array(palette)[tiles.tissue])
        types.set_title(f"{name}: {N_TYPES} types of tissue", fontsize=10)
        _legend(types, {"artefact": _ARTEFACT})

        grades = {
            f"lesion: {kind}": color
            for kind, color in zip(preset.class_names[1:], _LESIONS, strict=False)
        }
        colors = np.array([to_rgb(color) for color in (_NORMAL, *grades.values())])[tiles.grade]
        colors[tiles.mimic] = to_rgb(_MIMIC)
        _picture(findings, tiles, colors)
        share = (tiles.grade > 0).mean()
        findings.set_title(f"lesions: {share:.1%} of {len(drawn):,} tiles", fontsize=10)
        _legend(findings, {**grades, "mimic": _MIMIC})

        _picture(features, tiles, _principal_colors(drawn))
        features.set_title("features: first 3 principal components", fontsize=10)
    figure.savefig(file, dpi=110)


def _lines(
    axis: Axes, of_runs: Sequence[Sequence[float]], *, color: str, label: str, first: int = 0
) -> None:
    epochs = range(first, first + len(of_runs[0]))
    for values in of_runs:
        axis.plot(epochs, values, color=color, linewidth=0.7, alpha=0.5)
    axis.plot(epochs, np.mean(of_runs, axis=0), color=color, linewidth=2.2, label=label)


def _picture(axis: Axes, tiles: SlideMap, colors: Float[np.ndarray, "tile 3"]) -> None:
    column, row = tiles.cell.T
    picture = np.ones((row.max() + 1, column.max() + 1, 3))
    picture[row, column] = colors
    axis.imshow(picture[row.min() :, column.min() :], interpolation="nearest")
    axis.set_axis_off()


def _legend(axis: Axes, colors: Mapping[str, str]) -> None:
    axis.legend(
        handles=[Patch(color=color, label=label) for label, color in colors.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=len(colors),
        fontsize=8,
        frameon=False,
    )


def _principal_colors(features: Float[np.ndarray, "tile width"]) -> Float[np.ndarray, "tile 3"]:
    centred = features - features.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    shown = centred @ axes.T
    low, high = np.percentile(shown, [2, 98], axis=0)
    return ((shown - low) / (high - low)).clip(0, 1)
