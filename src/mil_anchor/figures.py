"""Figures of runs."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from mil_anchor.results import Run, by_cell

# float32 attention that does not move at all still gives divergences of this order.
_ROUNDING = 1e-7


def jsd_figure(runs: Sequence[Run], file: Path) -> None:
    """How much the attention on validation bags moves from epoch to epoch.

    A row of panels for each data set and a column for each model; one line for each plug-in, the
    mean over bags and runs, and a band from the steadiest to the least steady run. The paper's
    Figure 1 (ASMIL, arXiv 2603.06658).

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
    rows, columns, plugins = (list(dict.fromkeys(cell[i] for cell in cells)) for i in range(3))
    figure = Figure(figsize=(3.2 * len(columns) + 1, 2.8 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for (data, model, plugin), members in cells.items():
        axis = axes[rows.index(data)][columns.index(model)]
        of_epochs = _jsd_by_epoch(members)
        epochs = list(of_epochs)
        mean, low, high = (
            [max(of(values), _ROUNDING) for values in of_epochs.values()]
            for of in (fmean, min, max)
        )
        color = f"C{plugins.index(plugin)}"
        axis.plot(epochs, mean, color=color, label=plugin)
        axis.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(title=f"{model} on {data}", yscale="log")
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    for axis in axes[:, 0]:
        axis.set_ylabel("JSD to previous epoch (nats)")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.legend(lines.values(), lines.keys(), title="plug-in", loc="outside right upper")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _jsd_by_epoch(runs: Sequence[Run]) -> dict[int, list[float]]:
    """For every epoch the mean over bags of each run."""
    of_epochs: dict[int, list[float]] = {}
    for run in runs:
        of_bags: dict[int, list[float]] = {}
        for row in run.attention():
            if row.jsd is not None:
                of_bags.setdefault(row.epoch, []).append(row.jsd)
        for epoch, values in of_bags.items():
            of_epochs.setdefault(epoch, []).append(fmean(values))
    return dict(sorted(of_epochs.items()))
