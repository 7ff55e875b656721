"""Does a sweep of small jobs gain from running two at once?

Sixteen fits of ABMIL on musk1 by one command each way: one after the other in one process
(``hydra/launcher=basic``), and in two workers of joblib. Wall time of the whole command, imports
included; the ways in turn, minima over rounds. The machine must have nothing else to do: how many
cores each way has had is CPU time / wall time. Run: python -m benchmarks.sweep
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from benchmarks.record import arguments, show, start, write

ROOT = Path(__file__).resolve().parents[1]
N_JOBS = 16
REFERENCE = "one after the other"
LAUNCHERS = {
    REFERENCE: ["hydra/launcher=basic"],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}


def main() -> None:
    """Time the launchers and print a table."""
    parser = arguments(__doc__, rounds=1, on_gpu=False)
    parser.add_argument("--epochs", type=int, default=40, help="of each job (default: 40)")
    chosen = start(parser)
    wall: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    cpu: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    for index in range(chosen.rounds):
        for name in list(LAUNCHERS)[:: -1 if index % 2 else 1]:
            wall_s, cpu_s = _sweep(LAUNCHERS[name], epochs=chosen.epochs)
            wall[name].append(wall_s)
            cpu[name].append(cpu_s)
    table = Table("launcher", "wall (s)", f"/ {REFERENCE}", "CPU (s)", "cores")
    ratios = {}
    for name in LAUNCHERS:
        wall_s, cpu_s = min(wall[name]), min(cpu[name])
        ratio = wall_s / min(wall[REFERENCE])
        figures = wall_s, ratio, cpu_s, cpu_s / wall_s
        table.add_row(name, *(f"{figure:.3g}" for figure in figures))
        ratios[name] = {
            "ratio": ratio,
            "control": None,
            "milliseconds": 1000 * wall_s,
            "cpu_milliseconds": 1000 * cpu_s,
        }
    show(table)
    write("sweep", ratios, chosen, jobs=N_JOBS, epochs=chosen.epochs)


def _sweep(launcher: list[str], *, epochs: int) -> tuple[float, float]:
    """Wall and CPU seconds of a sweep, those of its processes included."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            *(sys.executable, "run.py", "-m", "model=abmil", "data=musk1"),
            f"seed=range({N_JOBS})",
            f"trainer.max_epochs={epochs}",
            "trainer.enable_progress_bar=false",
            f"out={out}",
            *launcher,
        ]
        before, begun_s = os.times(), time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        wall_s, after = time.perf_counter() - begun_s, os.times()
        n_done = len(list(Path(out).rglob("metrics.json")))
    if done.returncode or n_done != N_JOBS:
        raise RuntimeError(
            f"All {N_JOBS} jobs must end with a result, but {n_done} did:\n{done.stderr[-2000:]}"
        )
    return wall_s, sum(after[2:4]) - sum(before[2:4])  # of children, in user and in system mode


if __name__ == "__main__":
    main()
