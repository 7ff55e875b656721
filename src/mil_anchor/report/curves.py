"""What the page's line charts show: a run's attention, its learning and its calibration."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from mil_anchor.calibration import calibration
from mil_anchor.callbacks.monitor import AttentionRow
from mil_anchor.predictions import read_tested
from mil_anchor.results import Run

# By epoch, None where the measure is not defined.
Curve = list[float | None]


class Measure(NamedTuple):
    """Something that the page draws by epoch.

    Args:
        key: Column of ``attention.csv`` or of the logger's ``metrics.csv``.
        label: What it is, with its unit.
        log: Whether its axis is logarithmic.
    """

    key: str
    label: str
    log: bool = False


ATTENTION = (
    Measure("jsd", "JSD to previous epoch (nats)", log=True),
    Measure("entropy", "entropy / ln N"),
    Measure("rank_correlation", "rank correlation with previous epoch"),
    Measure("top1pct", "mass of the top 1 %"),
    Measure("top10", "mass of the top 10"),
    Measure("auroc", "AUROC of attention on tile labels"),
)
LEARNING = (
    Measure("train/loss", "training loss"),
    Measure("val/loss", "validation loss"),
    Measure("val/f1", "validation F1"),
    Measure("val/auroc", "validation AUROC"),
)


def attention_curves(run: Run) -> dict[str, Curve]:
    """The attention measures of a run by epoch from 0: means over its validation bags.

    A run without ``attention.csv`` has none.
    """
    if not (run.folder / "attention.csv").exists():
        return {}
    of_epochs: dict[int, list[AttentionRow]] = {}
    for row in run.attention():
        of_epochs.setdefault(row.epoch, []).append(row)
    return _curves(
        ATTENTION, of_epochs, lambda rows, key: _mean([getattr(row, key) for row in rows])
    )


def learning_curves(run: Run) -> dict[str, Curve]:
    """Losses and validation metrics of a run by epoch from 0, as the CSV logger has kept them.

    A resumed run has several versions of the log; of an epoch in two of them, the later counts.
    A run without a CSV log has none.
    """
    of_epochs: dict[int, dict[str, float]] = {}
    logs = run.folder.glob("logs/version_*/metrics.csv")
    for file in sorted(logs, key=lambda log: int(log.parent.name.removeprefix("version_"))):
        for row in _whole_rows(file):
            if not row.get("epoch"):
                continue
            values = {m.key: float(row[m.key]) for m in LEARNING if row.get(m.key)}
            of_epochs.setdefault(int(row["epoch"]), {}).update(values)
    # After the fit, the chosen checkpoint is validated once more, as if in an epoch of its own.
    trained = {epoch: values for epoch, values in of_epochs.items() if "train/loss" in values}
    return _curves(LEARNING, trained, lambda values, key: values.get(key))


def reliability(run: Run) -> dict[str, Any] | None:
    """How often a run is right, by how sure it is of its test bags; None without test bags."""
    tested = read_tested(run.folder)
    if tested is None:
        return None
    found = calibration(tested.labels, tested.probabilities)
    return {
        "error": rounded(found.error),
        "confidence": [rounded(own.confidence) for own in found.bins],
        "accuracy": [rounded(own.accuracy) for own in found.bins],
        "n": [own.n_bags for own in found.bins],
    }


def rounded(value: float | None) -> float | None:
    """Four significant digits, which is finer than a screen; None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def _curves(
    measures: Sequence[Measure],
    of_epochs: dict[int, Any],
    value_of: Callable[[Any, str], float | None],
) -> dict[str, Curve]:
    """A curve from epoch 0 to the last for each measure that is defined somewhere."""
    curves: dict[str, Curve] = {}
    for measure in measures:
        curve: Curve = [None] * (1 + max(of_epochs, default=-1))
        for epoch, own in of_epochs.items():
            curve[epoch] = rounded(value_of(own, measure.key))
        if any(value is not None for value in curve):
            curves[measure.key] = curve
    return curves


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _whole_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a table, without one that a killed process has left half-written."""
    lines = file.read_text().splitlines(keepends=True)
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))
