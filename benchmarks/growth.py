"""Do time and memory per tile stay what they are as bags grow from 1,000 to 50,000 tiles?

Goal 9. Each model with the plug-in, one fit per size of the bag; the sizes of a model step in turn.
Memory is the peak over the loaded bag in a fresh process. Run: python -m benchmarks.growth
"""

import argparse
from contextlib import ExitStack

from rich.table import Table

from benchmarks.models import bag_for, enter_fit
from benchmarks.peak import TrainingRun, training_peaks
from benchmarks.record import arguments, show, start, write
from benchmarks.timing import CLOCKS, Timings, time_steps
from mil_anchor import AnchorCallback

SIZES = (1000, 5000, 10_000, 50_000)
REFERENCE, LARGEST = 5000, 50_000
MODELS = ("ABMIL 1024-512-128", "CLAM-SB 1024", "TransMIL 1024", "DSMIL 1024")
# 50,000 tiles take TransMIL ten times what they take the others.
FEW_ROUNDS = {"TransMIL 1024": 2}


def main() -> None:
    """Time the models and print a table."""
    chosen = start(arguments(__doc__))
    ratios: dict[str, dict[str, float]] = {}
    tables = {
        "time": Table("microseconds per tile", *_titles(), f"{LARGEST:,} / {REFERENCE:,}", "A/A"),
        "memory": Table("kB per tile", *_titles(), f"{LARGEST:,} / {REFERENCE:,}", "A/A"),
    }
    models: dict[str, dict[str, dict[int, float]]] = {}
    runs = [
        TrainingRun(name, size, has_plugin=True) for name in MODELS for size in (*SIZES, REFERENCE)
    ]
    peaks = iter(training_peaks(runs, device=chosen.device))
    for name in MODELS:
        timings = _time(name, chosen)
        milliseconds = {size: timings.milliseconds(str(size)) for size in SIZES}
        megabytes = {size: next(peaks) for size in SIZES}
        again = next(peaks)
        models[name] = {"milliseconds": milliseconds, "megabytes": megabytes}
        for what, values, control in (
            ("time", milliseconds, timings.control),
            ("memory", megabytes, again / megabytes[REFERENCE]),
        ):
            per_tile = {size: 1000 * value / size for size, value in values.items()}
            ratio = per_tile[LARGEST] / per_tile[REFERENCE]
            ratios[f"{name}, {what}"] = {"ratio": ratio, "control": control}
            cells = (f"{value:.1f}" for value in per_tile.values())
            tables[what].add_row(name, *cells, f"{ratio:.3f}", f"{control:.3f}")
    for table in tables.values():
        show(table)
    write("growth", ratios, chosen, models=models)


def _titles() -> list[str]:
    return [f"{size:,} tiles" for size in SIZES]


def _time(name: str, chosen: argparse.Namespace) -> Timings:
    with ExitStack() as fits:
        steps = {}
        for size in SIZES:
            batch = bag_for(name, size, device=chosen.device)
            steps[str(size)] = enter_fit(
                fits, name, batch, plugin=AnchorCallback(), device=chosen.device
            )
        return time_steps(
            steps,
            reference=str(REFERENCE),
            rounds=min(chosen.rounds, FEW_ROUNDS.get(name, chosen.rounds)),
            clock=CLOCKS[chosen.device],
        )


if __name__ == "__main__":
    main()
