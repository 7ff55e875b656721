"""The figure of bag features over epochs."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mil_anchor.callbacks.bag_features import FEATURES_FOLDER, EpochFeatures, read_bag_features
from mil_anchor.figures.style import COLORS, add_legend, make_grid
from mil_anchor.results import Run, by_cell

_N_PANELS = 5
_PERPLEXITY = 30
_MARKERS = "osD^vP*"


def tsne_figure(runs: Sequence[Run]) -> Figure:
    """How the features of the validation bags part by class: t-SNE over the epochs.

    A row of panels for the first run of each data set, model and plug-in that has kept its bag
    features, and a column for each of five epochs. All epochs of a run are embedded together, so
    its panels can be compared.

    Args:
        runs: Complete runs.

    Raises:
        ValueError: No run has kept bag features, or all of them of too few bags.
        ModuleNotFoundError: scikit-learn is not installed.

    Source: App. C of ASMIL (arXiv 2603.06658).
    """
    kept = [run for run in runs if any((run.folder / FEATURES_FOLDER).glob("*.npz"))]
    if not kept:
        raise ValueError(
            f"t-SNE needs the bag features of a run, but none of {len(runs)} run(s) has kept them. "
            "Train with bag_features=true."
        )
    chosen = [members[0] for members in by_cell(kept).values()]
    of_runs = [read_bag_features(run.folder / FEATURES_FOLDER) for run in chosen]
    pairs = zip(chosen, of_runs, strict=True)
    drawn = [(run, epochs) for run, epochs in pairs if _n_points(epochs) > _PERPLEXITY]
    if not drawn:
        sizes = [_n_points(epochs) for epochs in of_runs]
        raise ValueError(
            f"t-SNE with a perplexity of {_PERPLEXITY} needs more points (validation bags x "
            f"epochs) than that, but the runs have {sizes}. Train for more epochs, or validate on "
            "more bags."
        )
    figure, axes = make_grid(len(drawn), _N_PANELS, width=2.0, height=1.9)
    for (run, epochs), row in zip(drawn, axes, strict=True):
        data, model, plugin = run.cell
        row[0].set_ylabel(f"{model}, {plugin}\n{data}, seed {run.metrics['seed']}", fontsize=9)
        _draw_run(row, epochs)
    add_legend(figure, "label")
    return figure


def embed(epochs: Sequence[EpochFeatures]) -> list[Float[np.ndarray, "_ 2"]]:
    """The bags of all epochs in one plane.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "t-SNE needs scikit-learn, which is not installed. "
            "Run: pip install 'mil_anchor[figures]'"
        ) from error
    together = np.concatenate([own.features for own in epochs]).astype(np.float32)
    placed = TSNE(perplexity=_PERPLEXITY, random_state=0).fit_transform(together)
    ends = np.cumsum([len(own.features) for own in epochs])
    return np.split(placed, ends[:-1])


def shown_epochs(n_epochs: int) -> list[int]:
    """Positions of the panels' epochs: the first, the last and evenly between."""
    places = np.linspace(0, n_epochs - 1, min(_N_PANELS, n_epochs))
    return [int(place) for place in places.round()]


def _draw_run(row: Sequence[Axes], epochs: Sequence[EpochFeatures]) -> None:
    placed = embed(epochs)
    together = np.concatenate(placed)
    margin = 0.05 * np.ptp(together, axis=0)
    low, high = together.min(axis=0) - margin, together.max(axis=0) + margin
    for axis in row:
        axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    shown = shown_epochs(len(epochs))
    for axis, index in zip(row, shown, strict=False):
        axis.set_title(f"epoch {epochs[index].epoch}", fontsize=9)
        for label in np.unique(epochs[index].labels):
            across, up = placed[index][epochs[index].labels == label].T
            axis.scatter(
                across,
                up,
                s=18,
                color=COLORS[(label + 1) % len(COLORS)],
                marker=_MARKERS[label % len(_MARKERS)],
                label=str(label),
                alpha=0.8,
                linewidth=0,
            )
    for axis in row[len(shown) :]:
        axis.set_axis_off()


def _n_points(epochs: Sequence[EpochFeatures]) -> int:
    return sum(len(own.features) for own in epochs)
