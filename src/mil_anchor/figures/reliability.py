"""The figure of calibration: how often a bag is classified rightly, by its confidence."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mil_anchor.calibration import calibration
from mil_anchor.figures.style import Style, add_legend, line_styles, make_grid
from mil_anchor.predictions import PREDICTIONS_FILE, read_tested
from mil_anchor.results import Run, by_cell


class Reliability(NamedTuple):
    """The bins of some runs: means over those that have bags in a bin; NaN where none has.

    Args:
        edges: Edges of the bins.
        confidence: Mean confidence in each bin.
        accuracy: Share of bags in it that are classified rightly.
        share: Share of a run's bags in it.
        n_runs: Number of runs.
    """

    edges: Float[np.ndarray, " edge"]
    confidence: Float[np.ndarray, " bin"]
    accuracy: Float[np.ndarray, " bin"]
    share: Float[np.ndarray, " bin"]
    n_runs: int


def reliability_figure(runs: Sequence[Run]) -> Figure:
    """Whether the test bags are classified rightly as often as their probability says.

    A panel for each data set and model, with a line for each plug-in: the accuracy of each of 15
    bins by its confidence, first in each run and then the mean over the runs with bags there. On
    the diagonal a model is calibrated, below it is too sure. Under each panel stands the share of
    the bags in each bin.

    Args:
        runs: Complete runs.

    Raises:
        ValueError: No run has predicted test bags.

    Source: Guo et al., *On calibration of modern neural networks*, ICML 2017, figure 1.
    """
    found = {cell: reliability(own) for cell, own in by_cell(runs).items()}
    found = {cell: own for cell, own in found.items() if own.n_runs}
    if not found:
        raise ValueError(
            f"A run must have predicted test bags in its {PREDICTIONS_FILE}, but none of "
            f"{len(runs)} run(s) has. Train with test=true, on data with a test part."
        )
    data, models, plugins = (list(dict.fromkeys(cell[i] for cell in found)) for i in range(3))
    plugins.sort(key=lambda plugin: (plugin != "none", plugin))
    styles = line_styles(plugins)
    figure, axes = make_grid(
        2 * len(data),
        len(models),
        height=1.9,
        sharex=True,
        sharey="row",
        height_ratios=[3.0, 1.0] * len(data),
    )
    for row, name in enumerate(data):
        curves, shares = axes[2 * row : 2 * row + 2]
        curves[0].set_ylabel("accuracy")
        shares[0].set_ylabel("share of bags")
        for curve, share, model in zip(curves, shares, models, strict=True):
            own = {plugin: found.get((name, model, plugin)) for plugin in plugins}
            there = {plugin: drawn for plugin, drawn in own.items() if drawn is not None}
            if not there:
                curve.set_axis_off()
                share.set_axis_off()
                continue
            for plugin, drawn in there.items():
                _add(curve, share, drawn, style=styles[plugin], label=plugin)
            curve.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
            curve.set(ylim=(-0.02, 1.02), xlim=(0, 1))
            curve.set_title(f"{model} on {name}\n{_counts(list(there.values()))}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("confidence")
    diagonal = Line2D([], [], color="0.7", linewidth=0.8, label="calibrated")
    add_legend(figure, "plug-in", others=[diagonal])
    return figure


def reliability(runs: Sequence[Run]) -> Reliability:
    """The bins of the runs that have predicted test bags."""
    found = [
        calibration(tested.labels, tested.probabilities).bins
        for run in runs
        if (tested := read_tested(run.folder)) is not None
    ]
    if not found:
        nothing = np.empty(0)
        return Reliability(nothing, nothing, nothing, nothing, 0)
    counts = np.array([[own.n_bags for own in bins] for bins in found])
    edges = np.array([own.low for own in found[0]] + [found[0][-1].high])
    return Reliability(
        edges,
        _mean_of_filled([[own.confidence for own in bins] for bins in found]),
        _mean_of_filled([[own.accuracy for own in bins] for bins in found]),
        (counts / counts.sum(axis=1, keepdims=True)).mean(axis=0),
        len(found),
    )


def _mean_of_filled(of_runs: list[list[float]]) -> Float[np.ndarray, " bin"]:
    values = np.array(of_runs)
    # A bin that is empty in all runs has no mean, which numpy would warn of.
    n_filled = np.maximum((~np.isnan(values)).sum(axis=0), 1)
    return np.where(np.isnan(values).all(axis=0), np.nan, np.nansum(values, axis=0) / n_filled)


def _add(curve: Axes, share: Axes, drawn: Reliability, *, style: Style, label: str) -> None:
    is_filled = ~np.isnan(drawn.accuracy)
    curve.plot(
        drawn.confidence[is_filled],
        drawn.accuracy[is_filled],
        label=label,
        marker=".",
        linewidth=1.6,
        **style._asdict(),
    )
    share.stairs(drawn.share, drawn.edges, linewidth=1.2, **style._asdict())


def _counts(drawn: Sequence[Reliability]) -> str:
    """How many runs a line is the mean of."""
    counts = sorted({own.n_runs for own in drawn})
    of_each = " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))
    return f"{of_each} run{'s' * (counts[-1] != 1)} of each plug-in"
