"""What do mixed precision and torch.compile gain in a training step with the plug-in?

Steps each model in float32, in bf16-mixed, and compiled. Meant for a GPU, where both are at home:
python -m benchmarks.modes --device cuda
"""

import argparse
from contextlib import ExitStack

from rich.table import Table

from benchmarks.models import bag_for, enter_fit
from benchmarks.record import arguments, measured, show, start, write
from benchmarks.timing import CLOCKS, Timings, time_steps
from mil_anchor import AnchorCallback

N_INSTANCES = 10_000
MODELS = ("ABMIL 1024-512-128", "CLAM-SB 1024", "TransMIL 1024", "DSMIL 1024")
FLOAT32 = "float32"
MODES: dict[str, dict[str, bool | str]] = {
    FLOAT32: {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "compiled": {"compiles": True},
}


def main() -> None:
    """Time the modes and print a table."""
    chosen = start(arguments(__doc__))
    ratios: dict[str, dict[str, float]] = {}
    others = [mode for mode in MODES if mode != FLOAT32]
    table = Table("model", f"{FLOAT32} (ms)", *(f"{mode} / {FLOAT32}" for mode in others), "A/A")
    for name in MODELS:
        timings = _time(name, chosen)
        ratios |= {f"{name}, {mode}": measured(timings, mode) for mode in others}
        cells = [timings.milliseconds(FLOAT32), *map(timings.ratio, others), timings.control]
        table.add_row(name, *(f"{cell:.4g}" for cell in cells))
    show(table)
    write("modes", ratios, chosen, instances=N_INSTANCES)


def _time(name: str, chosen: argparse.Namespace) -> Timings:
    batch = bag_for(name, N_INSTANCES, device=chosen.device)
    with ExitStack() as fits:
        steps = {
            mode: enter_fit(
                fits, name, batch, plugin=AnchorCallback(), device=chosen.device, **options
            )
            for mode, options in MODES.items()
        }
        return time_steps(steps, rounds=chosen.rounds, clock=CLOCKS[chosen.device])


if __name__ == "__main__":
    main()
