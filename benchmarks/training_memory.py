"""How much memory does training on 300 slides of 10,000 x 384 take?

Writes the synthetic cohort of that size into a packed file (2.4 GB), trains ABMIL with the plug-in
on it by run.py, once for each way of keeping slides in memory, and reads the largest resident set
of each process from the operating system. Run: python -m benchmarks.training_memory
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mil_anchor.data.synthetic import MPP, SyntheticCohort, write_cohort

ROOT = Path(__file__).parents[1]
# What keep_in_memory is set to, and the most that the process may take, in GB.
BUDGETS = {"false": 1.5, "1": 2.5, "true": 4.5}


def main() -> int:
    """Measure and print a table; the exit code is 1 if a budget does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="full", help="size of the cohort (default: full)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the cohort is written, and kept")
    parser.add_argument("--json", type=Path, help="file for the figures")
    chosen = parser.parse_args()
    cohort = SyntheticCohort("camelyon_like", chosen.size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary) / "cohort"
        packed = write_cohort(cohort, folder, layout="packed")
        rows = {
            keep: _train(packed, folder, keep, epochs=chosen.epochs, out=Path(temporary))
            for keep in BUDGETS
        }
    _print(rows)
    result = {
        "torch": torch.__version__,
        "slides": len(cohort),
        "instances": cohort.size.n_tiles,
        "width": cohort.width,
        "keep_in_memory": rows,
    }
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row["peak_gb"] > row["budget_gb"] for row in rows.values()))


def _train(packed: Path, folder: Path, keep: str, *, epochs: int, out: Path) -> dict[str, Any]:
    overrides = [
        "model=abmil",
        "plugin=anchor_nsf",
        "data=folder",
        f"data.root={packed}",
        f"data.labels={folder / 'labels.csv'}",
        f"data.splits={folder}",
        f"data.mpp={MPP}",
        f"data.keep_in_memory={keep}",
        "hidden=128",
        "threads=1",
        f"trainer.max_epochs={epochs}",
        "trainer.enable_progress_bar=false",
        f"out={out / keep}",
    ]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "run.py", *overrides], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"run.py must end with 0, but ended with {process.returncode}.")
    return {
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "budget_gb": BUDGETS[keep],
        "run_s": time.perf_counter() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }


def _print(rows: dict[str, dict[str, Any]]) -> None:
    table = Table("keep_in_memory", "peak (GB)", "budget (GB)", "run (s)", "CPU (s)")
    for keep, row in rows.items():
        table.add_row(keep, *(f"{value:.3g}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
