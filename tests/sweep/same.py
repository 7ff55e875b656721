"""Compares two run folders."""

import json
from pathlib import Path

MEASURED = ("test/", "val/", "attention/", "best_epoch")


def assert_same_result(folder: Path, other: Path) -> None:
    """Two run folders hold the same numbers, but for what they cost."""
    for name in ("predictions.csv", "attention.csv", "split.csv"):
        assert (folder / name).read_text() == (other / name).read_text()
    first, second = (
        {key: value for key, value in metrics.items() if key.startswith(MEASURED)}
        for metrics in (json.loads((run / "metrics.json").read_text()) for run in (folder, other))
    )
    assert first == second
    assert "val/selection" in first
