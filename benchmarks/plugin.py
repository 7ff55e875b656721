"""What does the plug-in add to a training step of a model that is not changed for it?

Goals 1 and 2. Fits each model bare, with the anchor and NSF, and with the anchor's arithmetic in
bfloat16 where the machine has it; all step in turn, and so does the forward pass of each anchor
alone, which no plug-in on an unmodified model can do without.
Run: python -m benchmarks.plugin
"""

import argparse
from contextlib import ExitStack
from typing import Any

import torch
from rich.table import Table

from benchmarks.floors import RepeatableAnchor
from benchmarks.models import bag_for, enter_fit
from benchmarks.record import arguments, measured, measured_sum, say, show, start, write
from benchmarks.timing import CLOCKS, Timings, again, time_steps
from mil_anchor import AnchorCallback
from mil_anchor.precision import check_bf16

BARE, PLUGIN, BF16 = "bare", "plug-in", "plug-in, bf16"
# Whose plug-in is timed in bfloat16, too: the others' anchors are too small to gain by it.
IN_BF16 = ("ABMIL 1024-512-128", "CLAM-SB 1024", "DSMIL 1024")
CASES = (
    ("ABMIL 1024-512-128", 10_000),
    ("ABMIL 384-128-128", 10_000),
    ("torchmil ABMIL 1024-512-128", 10_000),
    ("CLAM-SB 1024", 10_000),
    ("DSMIL 1024", 10_000),
    # Of 10,000 tiles it steps among its peers, where it is timed with the plug-in anyhow.
    ("TransMIL 1024", 1000),
)
# TransMIL's anchor is next to nothing.
WITH_FLOOR = {name for name, _ in CASES} - {"TransMIL 1024"}


def main() -> None:
    """Time the models and print a table."""
    chosen = start(arguments(__doc__))
    has_bf16 = multiplies_in_bf16(chosen.device)
    if not has_bf16:
        say("Skipped: bfloat16, for which this machine has no arithmetic.")
    ratios: dict[str, dict[str, float]] = {}
    table = Table("model", "instances", f"{BARE} (ms)", f"{PLUGIN} (ms)", "ratio", "bf16", "A/A")
    for name, n_instances in CASES:
        plugins: dict[str, dict[str, Any]] = {PLUGIN: {}}
        if has_bf16 and name in IN_BF16:
            plugins[BF16] = {"anchor_precision": "bf16"}
        timings = _time(name, n_instances, plugins, chosen)
        for plugin in plugins:
            key = f"{name}, {n_instances}{plugin.removeprefix(PLUGIN)}"
            ratios[key] = measured(timings, plugin)
            if _alone(plugin) in timings.seconds:
                ratios[f"{key}, floor"] = measured_sum(timings, BARE, _alone(plugin))
        table.add_row(name, f"{n_instances:,}", *_cells(timings))
    show(table)
    write("plugin", ratios, chosen)


def multiplies_in_bf16(device: str) -> bool:
    """Whether the plug-in accepts bfloat16 on the device."""
    try:
        check_bf16(torch.device(device))
    except RuntimeError:
        return False
    return True


def _time(
    name: str, n_instances: int, plugins: dict[str, dict[str, Any]], chosen: argparse.Namespace
) -> Timings:
    batch = bag_for(name, n_instances, device=chosen.device)
    variants: dict[str, AnchorCallback | None] = {BARE: None}
    variants |= {plugin: AnchorCallback(**options) for plugin, options in plugins.items()}
    with ExitStack() as fits:
        steps = {
            variant: enter_fit(fits, name, batch, plugin=plugin, device=chosen.device)
            for variant, plugin in variants.items()
        }
        if name in WITH_FLOOR:
            for plugin, options in plugins.items():
                anchor = RepeatableAnchor(**options)
                enter_fit(fits, name, batch, plugin=anchor, device=chosen.device)
                steps[_alone(plugin)] = anchor.run_anchor
        return time_steps(steps, rounds=chosen.rounds, clock=CLOCKS[chosen.device])


def _alone(plugin: str) -> str:
    return f"anchor of {plugin}"


def _cells(timings: Timings) -> list[str]:
    bf16 = f"{timings.ratio(BF16):.3f}" if BF16 in timings.seconds else ""
    milliseconds = [f"{timings.milliseconds(name):.1f}" for name in (BARE, PLUGIN)]
    return [
        *milliseconds,
        f"{timings.ratio(PLUGIN):.3f}",
        bf16,
        f"{timings.ratio(again(BARE)):.3f}",
    ]


if __name__ == "__main__":
    main()
