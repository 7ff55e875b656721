"""What all scripts share: arguments, facts of the machine, and the file of a script's ratios."""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import MIN_ROUNDS, Timings
from mil_anchor.environment import environment

FOLDER = Path(__file__).parent
PEERS = ("torchmil", "monai")


def arguments(
    description: str | None, *, rounds: int = MIN_ROUNDS, on_gpu: bool = True
) -> argparse.ArgumentParser:
    """The arguments of every script: ``--rounds``, ``--folder``, and ``--device`` where it has one.

    Args:
        description: What the script measures.
        rounds: How many rounds it makes unless told otherwise.
        on_gpu: Whether it can measure on a GPU, too.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help=f"rounds that count (default: %(default)s); fewer than {MIN_ROUNDS} only try it out",
    )
    if on_gpu:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    else:
        parser.set_defaults(device="cpu")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where the figures are written as JSON"
    )
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line, and makes this process one whose steps can be timed."""
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        say("Skipped: --device cuda needs a CUDA GPU, and torch sees none here.")
        sys.exit(0)
    be_quiet()
    # A second thread would wait for its turn on a shared core: ratios of two threads mean nothing.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return chosen


def be_quiet() -> None:
    """Keep Lightning's remarks on tiny loaders and missing validation out of the tables."""
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(text: str) -> None:
    """Print a line."""
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def show(table: Table) -> None:
    """Print a table, as wide as its words."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def machine() -> dict[str, str | int]:
    """On what a script ran, and when: processor, cores, versions, commit."""
    found = environment()
    found["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measured(timings: Timings, name: str, reference: str | None = None) -> dict[str, float]:
    """A ratio of a table as the file holds it."""
    return {
        "ratio": timings.ratio(name, reference),
        "control": timings.control,
        "milliseconds": timings.milliseconds(name),
        "reference_milliseconds": timings.milliseconds(reference or timings.reference),
    }


def measured_sum(timings: Timings, *names: str, reference: str | None = None) -> dict[str, float]:
    """The ratio of what several variants take together, as the file holds it."""
    rows = [measured(timings, name, reference) for name in names]
    summed = {key: sum(row[key] for row in rows) for key in ("ratio", "milliseconds")}
    return rows[0] | summed


def write(
    script: str, ratios: Mapping[str, Mapping[str, Any]], chosen: argparse.Namespace, **more: Any
) -> Path:
    """Writes ``SCRIPT.json`` (``SCRIPT_cuda.json`` on a GPU) and returns its path.

    Args:
        script: The script's name.
        ratios: By key: ``ratio``, ``control`` (None where none is possible), and what belongs to
            them.
        chosen: The script's arguments.
        more: Further values of the file.
    """
    suffix = "" if chosen.device == "cpu" else f"_{chosen.device}"
    path: Path = chosen.folder / f"{script}{suffix}.json"
    content = {"machine": machine(), "rounds": chosen.rounds, **more, "ratios": ratios}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
