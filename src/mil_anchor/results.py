"""Reads run folders and puts them side by side."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.table import Table

from mil_anchor.callbacks.monitor import MEASURES, AttentionRow, read_attention

METRICS_FILE = "metrics.json"


class _Column(NamedTuple):
    key: str
    title: str
    factor: float
    digits: int


_COLUMNS = (
    _Column("test/f1", "F1", 1, 3),
    _Column("test/auroc", "AUROC", 1, 3),
    _Column("test/accuracy", "accuracy", 1, 3),
    _Column("attention/jsd", "JSD·1000", 1000, 2),
    _Column("attention/entropy", "entropy", 1, 3),
)


class Run(NamedTuple):
    """A complete run: where it lies and what its ``metrics.json`` says."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def cell(self) -> tuple[str, str, str]:
        """Data, model and plug-in: runs of one cell differ in seed, fold and overrides."""
        return self.metrics["data"], self.metrics["model"], self.metrics["plugin"]

    def attention(self) -> list[AttentionRow]:
        """The run's ``attention.csv``."""
        return read_attention(self.folder / "attention.csv")


def read_metrics(folder: Path) -> dict[str, Any]:
    """The ``metrics.json`` of a complete run."""
    metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text())
    return metrics


def read_runs(root: Path) -> list[Run]:
    """All complete runs below a folder, in the order of their paths.

    Raises:
        ValueError: There is no complete run.
    """
    runs = [
        Run(file.parent, read_metrics(file.parent)) for file in sorted(root.rglob(METRICS_FILE))
    ]
    if not runs:
        raise ValueError(
            f"{root} must hold complete runs, but there is no {METRICS_FILE} below it. "
            "Run 'python run.py' first, or name another folder."
        )
    return runs


def attention_summary(rows: Sequence[AttentionRow]) -> dict[str, float]:
    """What ``metrics.json`` says of the attention on validation bags: means over bags.

    ``attention/jsd`` is the mean over all epochs, ``attention/jsd_last_third`` that over the last
    third of them (rounded up), when a schedule may have slowed the training. All others
    (``rank_correlation``, ``entropy``, ``top1pct``, ``top10``, ``auroc``, ``mixing_correlation``)
    are of the last epoch. What is not defined is left out.
    """
    epochs = sorted({row.epoch for row in rows})
    last_third = set(epochs[-math.ceil(len(epochs) / 3) :])
    summary = {
        "jsd": _mean(rows, "jsd"),
        "jsd_last_third": _mean([row for row in rows if row.epoch in last_third], "jsd"),
    }
    for measure in MEASURES:
        if measure != "jsd":
            summary[measure] = _mean([row for row in rows if row.epoch == epochs[-1]], measure)
    return {f"attention/{name}": value for name, value in summary.items() if value is not None}


def by_cell(runs: Iterable[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """Runs of each data set, model and plug-in, sorted; ``none`` stands first."""
    cells: dict[tuple[str, str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (*run.cell[:2], run.cell[2] != "none", run.cell[2])):
        cells.setdefault(run.cell, []).append(run)
    return cells


def results_tables(runs: Iterable[Run]) -> list[Table]:
    """A table for each data set: mean±sd over the runs (seeds, folds) of each model and plug-in.

    Test metrics of the checkpoint chosen on validation; the attention of validation bags: JSD
    between epochs (nats x 1000, mean over epochs) and entropy / ln N (last epoch). The title
    says which weights all of them speak of, those that are trained (online) or averages; where the
    runs differ in it, the last column does.
    """
    of_data: dict[str, list[Run]] = {}
    for run in runs:
        of_data.setdefault(run.cell[0], []).append(run)
    return [_table(name, own) for name, own in sorted(of_data.items())]


def results_markdown(runs: Iterable[Run]) -> str:
    """What `results_tables` shows, as one Markdown table."""
    titles = ["data", "model", "plug-in", "runs", *(column.title for column in _COLUMNS)]
    lines = [[*titles, "weights"], ["---"] * 3 + ["---:"] * (len(titles) - 3) + ["---"]]
    for cell, members in by_cell(runs).items():
        values = [_mean_and_sd(members, column) for column in _COLUMNS]
        lines.append([*cell, str(len(members)), *values, _weights(members)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _mean(rows: Sequence[AttentionRow], measure: str) -> float | None:
    values = [value for row in rows if (value := getattr(row, measure)) is not None]
    return fmean(values) if values else None


def _table(data: str, runs: Sequence[Run]) -> Table:
    weights = _weights(runs)
    is_mixed = "," in weights
    title = f"{data}: mean±sd over n runs" + ("" if is_mixed else f", {weights} weights")
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("plug-in", no_wrap=True)
    for title in ("n", *(column.title for column in _COLUMNS)):
        table.add_column(title, justify="right", no_wrap=True)
    if is_mixed:
        table.add_column("weights", no_wrap=True)
    for (_, model, plugin), members in by_cell(runs).items():
        values = [_mean_and_sd(members, column) for column in _COLUMNS]
        of_cell = [_weights(members)] if is_mixed else []
        table.add_row(model, plugin, str(len(members)), *values, *of_cell)
    return table


def _weights(runs: Sequence[Run]) -> str:
    """Which weights the runs were evaluated with."""
    return ", ".join(sorted({run.metrics.get("weights", "unknown") for run in runs}))


def _mean_and_sd(runs: Sequence[Run], column: _Column) -> str:
    values = [run.metrics[column.key] * column.factor for run in runs if column.key in run.metrics]
    if not values:
        return "-"
    mean, spread = fmean(values), [stdev(values)] if len(values) > 1 else []
    # Without the leading zero, as the papers' tables: so the table fits 80 columns.
    return "±".join(f"{number:.{column.digits}f}".removeprefix("0") for number in (mean, *spread))
