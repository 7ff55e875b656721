"""Figures by epoch: how much attention moves, and how concentrated it is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mil_anchor.figures.style import Style, add_legend, line_styles, make_grid
from mil_anchor.results import Run, by_cell

# Attention that does not move at all still gives divergences of this order, by rounding.
_ROUNDING = 1e-7
# How opaque the bands of up to four plug-ins are; more of them fade, to leave the lines readable.
_BANDS = {"lowest to highest run": 0.2, "10 to 90 % of bags": 0.07}


class Measure(NamedTuple):
    """A column of ``attention.csv``, and how it is drawn."""

    column: str
    label: str
    log: bool = False


class Curve(NamedTuple):
    """A measure by epoch: mean over runs and bags, spread of the runs' means, spread of the bags.

    Of the bags it is the 10th and 90th percentile over all bags of all runs, of the runs the lowest
    and the highest mean.
    """

    epochs: list[int]
    mean: list[float]
    runs: tuple[list[float], list[float]]
    bags: tuple[list[float], list[float]]


_JSD = Measure("jsd", "JSD to previous epoch (nats)", log=True)
_CONCENTRATION = (
    Measure("entropy", "entropy / ln N"),
    Measure("top1pct", "mass of the top 1 %"),
    Measure("top10", "mass of the top 10"),
)


def jsd_figure(runs: Sequence[Run]) -> Figure:
    """How much the attention on validation bags moves from epoch to epoch.

    A row of panels for each data set and a column for each model; one line for each plug-in, the
    mean over bags and runs; a darker band from the steadiest to the least steady run, and a lighter
    one for the middle 80 % of the bags.

    Args:
        runs: Complete runs.

    Raises:
        ValueError: No run has measured it.

    Source: Figure 1 and App. P of ASMIL (arXiv 2603.06658).
    """
    return _draw(runs, [_JSD])


def concentration_figure(runs: Sequence[Run]) -> Figure:
    """How concentrated the attention on validation bags is: entropy, top 1 % and top 10.

    Laid out as `jsd_figure`, with three rows for each data set.

    Args:
        runs: Complete runs.

    Raises:
        ValueError: No run has measured it.
    """
    return _draw(runs, _CONCENTRATION)


def curve(runs: Sequence[Run], measure: Measure) -> Curve:
    """The measure of some runs by epoch, over the bags in which it is defined."""
    of_epochs: dict[int, dict[int, list[float]]] = {}
    for index, run in enumerate(runs):
        for row in run.attention():
            value = getattr(row, measure.column)
            if value is not None:
                of_epochs.setdefault(row.epoch, {}).setdefault(index, []).append(value)
    drawn = Curve(sorted(of_epochs), [], ([], []), ([], []))
    for epoch in drawn.epochs:
        of_runs = list(of_epochs[epoch].values())
        means = [float(np.mean(values)) for values in of_runs]
        low, high = np.percentile(np.concatenate(of_runs), [10, 90])
        drawn.mean.append(float(np.mean(means)))
        drawn.runs[0].append(min(means))
        drawn.runs[1].append(max(means))
        drawn.bags[0].append(float(low))
        drawn.bags[1].append(float(high))
    return drawn


def _draw(runs: Sequence[Run], measures: Sequence[Measure]) -> Figure:
    cells = by_cell(run for run in runs if (run.folder / "attention.csv").exists())
    of_cells = {cell: [curve(own, m) for m in measures] for cell, own in cells.items()}
    of_cells = {cell: curves for cell, curves in of_cells.items() if any(c.epochs for c in curves)}
    if not of_cells:
        raise ValueError(
            f"A run must have measured the {measures[0].label} of its validation bags in its "
            f"attention.csv, but none of {len(runs)} run(s) has. Train with a model whose "
            "attention is found, for two epochs at least."
        )
    data, models, plugins = (list(dict.fromkeys(cell[i] for cell in of_cells)) for i in range(3))
    plugins.sort(key=lambda plugin: (plugin != "none", plugin))
    styles, fading = line_styles(plugins), min(1.0, 4 / len(plugins))
    rows = [(name, index) for name in data for index in range(len(measures))]
    figure, axes = make_grid(len(rows), len(models), sharex=True, sharey="row")
    for cell in sorted(of_cells, key=lambda cell: plugins.index(cell[2])):
        name, model, plugin = cell
        for index, drawn in enumerate(of_cells[cell]):
            axis = axes[rows.index((name, index))][models.index(model)]
            _add(axis, drawn, measures[index], style=styles[plugin], label=plugin, fading=fading)
    for (name, index), of_row in zip(rows, axes, strict=True):
        of_row[0].set_ylabel(measures[index].label)
        for axis, model in zip(of_row, models, strict=True):
            axis.set_title(f"{model} on {name}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    others = [
        Patch(color="black", alpha=fading * alpha, linewidth=0, label=band)
        for band, alpha in _BANDS.items()
    ]
    add_legend(figure, "plug-in", others=others)
    return figure


def _add(
    axis: Axes, drawn: Curve, measure: Measure, *, style: Style, label: str, fading: float
) -> None:
    def floored(values: Sequence[float]) -> list[float]:
        return [max(value, _ROUNDING) for value in values] if measure.log else list(values)

    axis.plot(drawn.epochs, floored(drawn.mean), label=label, linewidth=1.6, **style._asdict())
    for (low, high), alpha in zip((drawn.runs, drawn.bags), _BANDS.values(), strict=True):
        axis.fill_between(
            drawn.epochs,
            floored(low),
            floored(high),
            color=style.color,
            alpha=fading * alpha,
            linewidth=0,
        )
    if measure.log:
        axis.set_yscale("log")
