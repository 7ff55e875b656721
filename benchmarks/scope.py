"""What does a training step cost when the anchor mirrors the attention block, or the whole model?

Trains each baseline four ways, interleaved: bare (twice, as a control), and with the anchor's scope
"block" and "encoder". Process CPU time of one thread; per round the fastest step after the first
ones, over rounds the minimum. Run: python -m benchmarks.scope
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from baselines.abmil import ABMIL
from baselines.asmil import ASMIL
from baselines.clam import CLAMMB, CLAMSB
from baselines.dsmil import DSMIL
from baselines.transmil import TransMIL
from benchmarks.fitting import step_seconds
from mil_anchor import AnchorCallback
from mil_anchor.data.bags import Bag, collate_bags
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
SCOPES = {"bare": None, "block": "block", "encoder": "encoder", "bare again": None}
# The first steps find and prove the attention.
N_FIRST = 3


def main() -> None:
    """Time the models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12)
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
    loader = DataLoader([batch] * chosen.steps, batch_size=None)
    rows = {
        name: _time(partial(MODELS[name], chosen.width, chosen.hidden), loader, chosen.rounds)
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


def _time(make: Callable[[], nn.Module], loader: Any, n_rounds: int) -> dict[str, Any]:
    """Milliseconds of a step in each variant, ratios to bare, and what the anchor mirrors."""
    seconds: dict[str, list[float]] = {name: [] for name in SCOPES}
    n_mirrored: dict[str, int] = {}
    for index in range(n_rounds):
        for name in list(SCOPES)[:: -1 if index % 2 else 1]:
            scope = SCOPES[name]
            plugin = [] if scope is None else [AnchorCallback(scope=scope)]
            torch.manual_seed(0)
            module = MILModule(make(), n_classes=2)
            seconds[name].append(min(step_seconds(module, loader, plugin)[N_FIRST:]))
            for callback in plugin:
                mirrored = callback.anchor.block.parameters()
                n_mirrored[name] = sum(parameter.numel() for parameter in mirrored)
    bare = min(seconds["bare"])
    return {
        name: {
            "step_ms": 1000 * min(own),
            "ratio": min(own) / bare,
            "mirrored_parameters": n_mirrored.get(name, 0),
        }
        for name, own in seconds.items()
    }


def _print(rows: dict[str, Any]) -> None:
    ratios = [f"{name} / bare" for name in SCOPES if name != "bare"]
    table = Table("model", "bare (ms)", *ratios)
    for model, row in rows.items():
        others = [f"{row[name]['ratio']:.3f}" for name in SCOPES if name != "bare"]
        table.add_row(model, f"{row['bare']['step_ms']:.3g}", *others)
    Console().print(table)


if __name__ == "__main__":
    main()
