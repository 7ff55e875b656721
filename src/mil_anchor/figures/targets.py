"""The figure of target values."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from torch import Tensor

from mil_anchor.figures.style import add_legend, line_styles, make_grid
from mil_anchor.rebuilt import RawScores, holds_anchor, rebuild, validation_scores
from mil_anchor.results import Run, by_cell
from mil_anchor.targets import SoftmaxTarget, Target, as_target

log = logging.getLogger(__name__)

TARGETS: dict[str, Target] = {
    "softmax": SoftmaxTarget(),
    "softmax, temperature 2": SoftmaxTarget(2.0),
    "NSF": as_target("nsf"),
    "NSF, centred": as_target("nsf_centered"),
}
_N_BINS = 40
# What is lower counts as this: a target of exactly zero has no logarithm.
_LOWEST = 1e-6


def targets_figure(runs: Sequence[Run]) -> Figure:
    """How the targets spread the attention: histograms of target x N over instances.

    A row of panels for each data set and a column for each model, of one run: the first with an
    anchor if there is one. The scores are the anchor's on the run's validation bags, in its chosen
    checkpoint, or the online model's without an anchor. 1 is the uniform distribution.

    Args:
        runs: Complete runs, whose data are there.

    Raises:
        ValueError: No run can be built anew.

    Source: Figure 8 of ASMIL (arXiv 2603.06658).
    """
    found: dict[tuple[str, str], tuple[Run, RawScores]] = {}
    problems: list[str] = []
    for place, run in _chosen(runs).items():
        try:
            found[place] = run, validation_scores(rebuild(run.folder))
        except ValueError as error:
            problems.append(str(error))
    if not found:
        raise ValueError(
            f"Raw scores must come from a run that can be built anew, but none of {len(problems)} "
            f"can. The first: {problems[0]}"
        )
    for problem in problems:
        log.warning("No histogram of targets: %s", problem)
    data, models = (list(dict.fromkeys(place[i] for place in found)) for i in range(2))
    figure, axes = make_grid(len(data), len(models))
    for row, name in zip(axes, data, strict=True):
        row[0].set_ylabel("share of instances")
        for axis, model in zip(row, models, strict=True):
            if (name, model) in found:
                _draw(axis, *found[name, model])
            else:
                axis.set_axis_off()
    add_legend(figure, "target")
    return figure


def relative_targets(
    of_bags: Sequence[Float[Tensor, "row _"]], target: Target
) -> Float[np.ndarray, " value"]:
    """Target x N of every instance and row of these bags, N instances each."""
    values = []
    for scores in of_bags:
        relative = target(scores).exp() * (scores > -torch.inf).sum(dim=-1, keepdim=True)
        values.append(relative[scores > -torch.inf].double().numpy())
    return np.concatenate(values)


def _chosen(runs: Sequence[Run]) -> dict[tuple[str, str], Run]:
    """For each data set and model the first run with an anchor, else the first."""
    places: dict[tuple[str, str], list[Run]] = {}
    for (data, model, _), members in by_cell(runs).items():
        places.setdefault((data, model), []).append(members[0])
    return {
        place: next((run for run in firsts if holds_anchor(run.folder)), firsts[0])
        for place, firsts in places.items()
    }


def _draw(axis: Axes, run: Run, scores: RawScores) -> None:
    data, model, plugin = run.cell
    values = {
        name: relative_targets(scores.of_bags, target).clip(_LOWEST)
        for name, target in TARGETS.items()
    }
    together = np.concatenate(list(values.values()))
    edges = np.geomspace(together.min() * 0.99, together.max() * 1.01, _N_BINS + 1)
    styles = line_styles(list(values))
    for name, of_target in values.items():
        shares = np.histogram(of_target, edges)[0] / len(of_target)
        axis.stairs(shares, edges, label=name, color=styles[name].color, linewidth=1.4)
    axis.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    whose = f"{plugin}, seed {run.metrics['seed']}: {scores.source} scores"
    axis.set_title(f"{model} on {data}\n{whose}", fontsize=9)
    axis.set(xscale="log", xlabel="target x N (1: uniform)")
    if edges[-1] < 100 * edges[0]:
        # Matplotlib's own labels of so few decades overlap.
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
