"""Writes the generated parts of scaling.md from what `make bench` has measured.

Run `python -m docs.scaling` from the checkout; it measures nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.goals import read_measured
from benchmarks.record import FOLDER
from docs.pages import fill, table_row, table_rule
from tests.composing import composed

PAGE = Path(__file__).parent / "scaling.md"
# What the page asks the price of: every cell of a table is a model with a plug-in.
N_PLUGINS, N_SEEDS, N_SLIDES, N_TILES = 3, 5, 500, 10_000
TABLE_MODELS = ("ABMIL 1024-512-128", "CLAM-SB 1024", "TransMIL 1024", "DSMIL 1024")
N_WORKERS = (1, 2, 8, 64)
_MS_PER_HOUR = 3_600_000

Measured = Mapping[str, Any]


def steps(measured: Measured) -> str:
    """Seconds and memory of a slide, by model and number of tiles."""
    models = measured["growth"]["models"]
    sizes = list(next(iter(models.values()))["milliseconds"])
    titles = [f"{int(size):,} tiles" for size in sizes]
    lines = [
        f"{_on(measured['growth'])} Seconds of a training step with the plug-in, and in brackets "
        "its peak memory over the loaded bag in MB:",
        "",
        table_row("model", *titles),
        table_rule(1, len(sizes)),
    ]
    for name, row in models.items():
        cells = (
            f"{row['milliseconds'][size] / 1000:.3g} ({row['megabytes'][size]:.0f})"
            for size in sizes
        )
        lines.append(table_row(name, *cells))
    return "\n".join(lines)


def widths(measured: Measured) -> str:
    """What the width of the features changes."""
    ratios = measured["peers"]["ratios"]
    lines = [table_row("ABMIL, widths", "1,000 tiles (s)", "10,000 tiles (s)"), table_rule(1, 2)]
    for name in ("384-128-128", "1024-512-128"):
        cells = (
            ratios[f"ABMIL {name} / torchmil ABMIL {name}, {size}"]["milliseconds"] / 1000
            for size in (1000, 10_000)
        )
        lines.append(table_row(name, *(f"{cell:.3g}" for cell in cells)))
    return "\n".join(lines)


def price(measured: Measured) -> str:
    """What a whole table costs on so many workers."""
    n_epochs = composed("+experiment=table2").trainer.max_epochs
    hours = {
        name: N_PLUGINS * N_SEEDS * N_SLIDES * n_epochs * milliseconds / _MS_PER_HOUR
        for name, milliseconds in _milliseconds(measured).items()
    }
    efficiency = _efficiency(measured)
    lines = [
        f"{len(hours)} models x {N_PLUGINS} plug-ins x {N_SEEDS} seeds x {N_SLIDES} training "
        f"slides of {N_TILES:,} tiles x {n_epochs} epochs (those of `+experiment=table2`), each "
        "step at the price of one with the plug-in, without validation. A worker is one core; two "
        f"of them have done {2 * efficiency:.2f} times the work of one (`python -m "
        "benchmarks.sweep`), and more are taken to lose no more than that, since jobs share "
        "nothing but disks and memory bandwidth:",
        "",
        table_row("model", *(f"{n} worker{'s' * (n > 1)} (h)" for n in N_WORKERS)),
        table_rule(1, len(N_WORKERS)),
    ]
    for name, of_one in [*hours.items(), ("all", sum(hours.values()))]:
        shared = (of_one / n / (efficiency if n > 1 else 1) for n in N_WORKERS)
        lines.append(table_row(name, *(f"{value:,.1f}" for value in shared)))
    return "\n".join(lines)


def limits(measured: Measured) -> str:
    """What a step's time goes into."""
    read = measured["read_bag"]["sizes"][f"{N_TILES} x 1024"]
    loop = measured["loop"]
    row = loop["ratios"]["bare Trainer, 10 tiles"]
    n_bags = loop["epochs"] * (loop["train_bags"] + loop["val_bags"])
    of_loop = (row["milliseconds"] - row["reference_milliseconds"]) / n_bags
    parts = {
        "reading the bag, repacked as float32": read["packed float32"]["cpu_ms"],
        "mapping it instead": read["packed float32, mapped"]["cpu_ms"],
        "Lightning's loop, beyond a plain one": of_loop,
    }
    step = _milliseconds(measured)
    lines = [
        f"Milliseconds for one bag of {N_TILES:,} x 1024, and as a share of a training step with "
        "the plug-in (warm disk cache):",
        "",
        table_row("", "ms", *step),
        table_rule(1, 1 + len(step)),
        *(
            table_row(name, f"{value:.2f}", *(f"{value / of:.1%}" for of in step.values()))
            for name, value in parts.items()
        ),
        table_row("the step itself (ms)", "", *(f"{of:.0f}" for of in step.values())),
    ]
    return "\n".join(lines)


def _milliseconds(measured: Measured) -> dict[str, float]:
    """A step of each model of the table."""
    models = measured["growth"]["models"]
    return {name: models[name]["milliseconds"][str(N_TILES)] for name in TABLE_MODELS}


def _efficiency(measured: Measured) -> float:
    return 1 / (2 * float(measured["sweep"]["ratios"]["joblib"]["ratio"]))


def _on(content: Measured) -> str:
    machine = content["machine"]
    return f"One thread of {machine['processor']}, torch {machine['torch']}, no GPU."


PARTS: dict[str, Callable[[Measured], str]] = {
    "steps": steps,
    "widths": widths,
    "price": price,
    "limits": limits,
}


def page(text: str, measured: Measured) -> str:
    """The page with its generated parts."""
    return fill(text, PARTS, measured)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), read_measured(FOLDER)))
