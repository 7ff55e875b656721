"""What does a training step cost when the anchor mirrors the attention block, or the whole model?

Trains each baseline four ways, interleaved: bare (twice, as a control), and with the anchor's scope
"block" and "encoder". Process CPU time of one thread, a step of each per round, minima over rounds.
Run: python -m benchmarks.scope
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from rich.table import Table
from torch import nn

from baselines.abmil import ABMIL
from baselines.asmil import ASMIL
from baselines.clam import CLAMMB, CLAMSB
from baselines.dsmil import DSMIL
from baselines.transmil import TransMIL
from benchmarks.fitting import SteppedFit
from benchmarks.models import random_bag
from benchmarks.record import arguments, measured, show, start, write
from benchmarks.timing import CLOCKS, time_steps
from mil_anchor import AnchorCallback
from mil_anchor.data.bags import Batch
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
BARE, SCOPES = "bare", ("block", "encoder")
# The first steps find and prove the attention.
N_FIRST = 3


def main() -> None:
    """Time the models and print a table."""
    parser = arguments(__doc__, rounds=27)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--instances", type=int, default=2000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=128)
    chosen = start(parser)
    batch = random_bag(chosen.instances, chosen.width, device=chosen.device)
    table = Table("model", "bare (ms)", *(f"{scope} / bare" for scope in SCOPES), "A/A")
    ratios: dict[str, dict[str, float]] = {}
    for name in chosen.models:
        rows = _time(partial(MODELS[name], chosen.width, chosen.hidden), batch, chosen)
        ratios |= {f"{name}, {scope}": row for scope, row in rows.items()}
        row = rows[SCOPES[0]]
        figures = (row["reference_milliseconds"], *(rows[s]["ratio"] for s in SCOPES))
        table.add_row(name, *(f"{figure:.4g}" for figure in (*figures, row["control"])))
    show(table)
    shape = {key: getattr(chosen, key) for key in ("instances", "width", "hidden", "models")}
    write("scope", ratios, chosen, **shape)


def _time(
    make: Callable[[], nn.Module], batch: Batch, chosen: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The ratio of each scope to the bare model, and how many parameters its anchor mirrors."""
    plugins = {scope: AnchorCallback(scope=scope) for scope in SCOPES}
    with ExitStack() as fits:
        steps = {}
        for name in (BARE, *SCOPES):
            torch.manual_seed(0)
            callbacks = [plugins[name]] if name in plugins else []
            module = MILModule(make(), n_classes=2)
            fit = SteppedFit(module, batch, callbacks=callbacks, device=chosen.device)
            steps[name] = fits.enter_context(fit).step
        timings = time_steps(
            steps, rounds=chosen.rounds, n_warmup=N_FIRST, clock=CLOCKS[chosen.device]
        )
        mirrored = {
            scope: sum(p.numel() for p in plugin.anchor.block.parameters())
            for scope, plugin in plugins.items()
        }
    return {
        scope: measured(timings, scope) | {"mirrored_parameters": mirrored[scope]}
        for scope in SCOPES
    }


if __name__ == "__main__":
    main()
