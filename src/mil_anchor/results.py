"""Reads run folders and puts them side by side."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.table import Table

from mil_anchor.callbacks.monitor import AttentionRow, read_attention

METRICS_FILE = "metrics.json"

_COLUMNS = {
    "test/f1": "F1",
    "test/auroc": "AUROC",
    "test/accuracy": "accuracy",
    "attention/jsd": "JSD",
    "attention/entropy": "entropy / ln N",
}


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
    """JSD between epochs, mean over epochs and bags; entropy / ln N, mean of the last epoch."""
    moved = [row.jsd for row in rows if row.jsd is not None]
    last = max((row.epoch for row in rows), default=None)
    summary = {"attention/jsd": fmean(moved)} if moved else {}
    if rows:
        entropy = fmean(row.entropy for row in rows if row.epoch == last)
        summary["attention/entropy"] = entropy
    return summary


def by_cell(runs: Iterable[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """Runs of each data set, model and plug-in, sorted; ``none`` stands first."""
    cells: dict[tuple[str, str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (*run.cell[:2], run.cell[2] != "none", run.cell[2])):
        cells.setdefault(run.cell, []).append(run)
    return cells


def results_table(runs: Iterable[Run]) -> Table:
    """Mean +- standard deviation over the runs (seeds, folds) of each cell."""
    table = Table(title="Test bags of the checkpoint chosen on validation, mean ± sd over runs")
    for name in ("data", "model", "plug-in", "runs", *_COLUMNS.values()):
        table.add_column(name, justify="right" if name in (*_COLUMNS.values(), "runs") else "left")
    for cell, members in by_cell(runs).items():
        values = [
            _mean_and_sd([run.metrics[key] for run in members if key in run.metrics])
            for key in _COLUMNS
        ]
        table.add_row(*cell, str(len(members)), *values)
    return table


def _mean_and_sd(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"
