"""Figures of runs."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev

from mil_anchor.results import Run, by_cell


def jsd_figure(runs: Sequence[Run], file: Path) -> None:
    """How much the attention on validation bags moves from epoch to epoch.

    One panel per data set and model, one line per plug-in: mean over bags and runs; the band is one
    standard deviation over runs. The paper's Figure 1 (ASMIL, arXiv 2603.06658).

    Args:
        runs: Complete runs.
        file: The image to write; its suffix chooses the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Figures need matplotlib, which is not installed. "
            "Run: pip install 'mil_anchor[figures]'"
        ) from error
    cells = by_cell(runs)
    panels = list(dict.fromkeys(cell[:2] for cell in cells))
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for cell, members in cells.items():
            if cell[:2] == panel:
                epochs, mean, sd = _jsd_by_epoch(members)
                (line,) = axis.plot(epochs, mean, label=cell[2])
                low = [max(m - s, m / 10) for m, s in zip(mean, sd, strict=True)]
                high = [m + s for m, s in zip(mean, sd, strict=True)]
                axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15)
        axis.set(title=f"{panel[1]} on {panel[0]}", xlabel="epoch", yscale="log")
        axis.legend(title="plug-in")
    axes[0].set_ylabel("JSD to the previous epoch (nats)")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _jsd_by_epoch(runs: Sequence[Run]) -> tuple[list[int], list[float], list[float]]:
    """Epochs, and over runs the mean and standard deviation of a run's mean over bags."""
    of_runs: dict[int, list[float]] = {}
    for run in runs:
        of_bags: dict[int, list[float]] = {}
        for row in run.attention():
            if row.jsd is not None:
                of_bags.setdefault(row.epoch, []).append(row.jsd)
        for epoch, values in of_bags.items():
            of_runs.setdefault(epoch, []).append(fmean(values))
    epochs = sorted(of_runs)
    return epochs, [fmean(of_runs[e]) for e in epochs], [pstdev(of_runs[e]) for e in epochs]
