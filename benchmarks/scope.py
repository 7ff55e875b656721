"""What does a training step cost when the anchor mirrors the attention block, or the whole model?

Trains each baseline four ways, interleaved: bare (twice, as a control), and with the anchor's scope
"block" and "encoder". Process CPU time of one thread, a step of each per round, minima over rounds.
Run: python -m benchmarks.scope
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from baselines.abmil import ABMIL
from baselines.asmil import ASMIL
from baselines.clam import CLAMMB, CLAMSB
from baselines.dsmil import DSMIL
from baselines.transmil import TransMIL
from benchmarks.fitting import SteppedFit
from benchmarks.timing import again, time_steps
from mil_anchor import AnchorCallback
from mil_anchor.data.bags import Bag, Batch, collate_bags
from mil_anchor.module import MILModule

# DSMIL reads the features as they are.
MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "abmil": lambda width, hidden: ABMIL(width, 2, hidden=hidden),
    "clam_sb": lambda width, hidden: CLAMSB(width, 2, hidden=hidden),
    "clam_mb": lambda width, hidden: CLAMMB(width, 2, hidden=hidden),
    "transmil": lambda width, hidden: TransMIL(width, 2, hidden=hidden),
    "dsmil": lambda width, hidden: DSMIL(width, 2, attention_width=hidden),
    "asmil": lambda width, hidden: ASMIL(width, 2, hidden=hidden),
}
SCOPES = {"bare": None, "block": "block", "encoder": "encoder"}
_OTHERS = ("block", "encoder", again("bare"))
# The first steps find and prove the attention.
N_FIRST = 3


def main() -> None:
    """Time the models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=27)
    parser.add_argument("--instances", type=int, default=2000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--json", type=Path, help="file for the figures")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    batch = collate_bags([Bag(torch.randn(chosen.instances, chosen.width), 1, "bag")])
    rows = {
        name: _time(partial(MODELS[name], chosen.width, chosen.hidden), batch, chosen)
        for name in chosen.models
    }
    _print(rows)
    result = {
        "torch": torch.__version__,
        "instances": chosen.instances,
        "width": chosen.width,
        "hidden": chosen.hidden,
        "rounds": chosen.rounds,
        "models": rows,
    }
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")


def _time(
    make: Callable[[], nn.Module], batch: Batch, chosen: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of a step in each variant, ratios to bare, and what the anchor mirrors."""
    plugins = {name: [AnchorCallback(scope=scope)] for name, scope in SCOPES.items() if scope}
    with ExitStack() as fits:
        steps = {}
        for name in SCOPES:
            torch.manual_seed(0)
            fit = SteppedFit(MILModule(make(), n_classes=2), batch, callbacks=plugins.get(name, ()))
            steps[name] = fits.enter_context(fit).step
        timings = time_steps(steps, rounds=chosen.rounds, n_warmup=N_FIRST)
        blocks = {name: plugin.anchor.block for name, (plugin,) in plugins.items()}
    return {
        name: {
            "step_ms": timings.milliseconds(name),
            "ratio": timings.ratio(name),
            "mirrored_parameters": sum(p.numel() for p in blocks[name].parameters())
            if name in blocks
            else 0,
        }
        for name in timings.seconds
    }


def _print(rows: dict[str, Any]) -> None:
    ratios = [f"{name} / bare" for name in _OTHERS]
    table = Table("model", "bare (ms)", *ratios)
    for model, row in rows.items():
        others = [f"{row[name]['ratio']:.3f}" for name in _OTHERS]
        table.add_row(model, f"{row['bare']['step_ms']:.3g}", *others)
    Console().print(table)


if __name__ == "__main__":
    main()
