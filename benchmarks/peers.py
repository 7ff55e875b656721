"""Is a step of our models with the plug-in faster than a step of what users have today, bare?

Goals 3 to 6. Our models train with the anchor and NSF, the peers without: torchmil's, MONAI's,
textbook ABMIL and DSMIL, and TransMIL in its authors' operations; those of one table step in turn,
and one LightningModule with one Adam trains them all. Where a goal may lie below what exact float32
can reach, the matrix products of our step alone are timed as well, and for small bags, in which the
calls count, its whole step on ten tiles. Run: python -m benchmarks.peers
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack

from rich.table import Table

from benchmarks.floors import PRODUCTS, floor_of
from benchmarks.models import bag_for, enter_fit
from benchmarks.record import arguments, measured, measured_sum, show, start, write
from benchmarks.timing import CLOCKS, Step, Timings, time_steps
from mil_anchor import AnchorCallback

# Our model, which is timed twice as the control, and its peers.
ABMIL_1024 = (
    "ABMIL 1024-512-128",
    ("torchmil ABMIL 1024-512-128", "textbook ABMIL 1024-512-128", "MONAI MILModel 1024-512-2048"),
)
ABMIL_384 = ("ABMIL 384-128-128", ("torchmil ABMIL 384-128-128", "textbook ABMIL 384-128-128"))
TRANSMIL = ("TransMIL 1024", ("upstream TransMIL 1024", "torchmil TransMIL 1024"))
# Our model without the plug-in, as a peer.
ITSELF = "itself"
TABLES: tuple[tuple[str, Sequence[str], int], ...] = (
    (*ABMIL_1024, 10_000),
    (*ABMIL_1024, 1000),
    (*ABMIL_384, 10_000),
    (*ABMIL_384, 1000),
    ("CLAM-SB 1024", ("torchmil CLAM_SB 1024",), 10_000),
    ("DSMIL 1024", ("torchmil DSMIL 1024", "textbook DSMIL 1024"), 10_000),
    (TRANSMIL[0], (*TRANSMIL[1], ITSELF), 10_000),
    (*TRANSMIL, 1000),
)
# Instances of a bag in which products take next to nothing, and of one in which calls do.
FEW, MANY = 10, 10_000


def main() -> None:
    """Time the models and print a table."""
    chosen = start(arguments(__doc__))
    ratios: dict[str, dict[str, float]] = {}
    table = Table(
        "ours with the plug-in / peer, bare", "tiles", "ours (ms)", "peer (ms)", "ratio", "A/A"
    )
    for ours, peers, n_instances in TABLES:
        timings, floors = _time(ours, peers, n_instances, chosen)
        rows = {f"{ours} / {peer}": measured(timings, ours, reference=peer) for peer in peers}
        if floors:
            key = f"{' + '.join(floors)} / {peers[0]}"
            rows[key] = measured_sum(timings, *floors, reference=peers[0])
        for key, row in rows.items():
            ratios[f"{key}, {n_instances}"] = row
            milliseconds = (f"{row[key]:.1f}" for key in ("milliseconds", "reference_milliseconds"))
            table.add_row(
                key,
                f"{n_instances:,}",
                *milliseconds,
                f"{row['ratio']:.3f}",
                f"{row['control']:.3f}",
            )
    show(table)
    write("peers", ratios, chosen)


def _time(
    ours: str, peers: Sequence[str], n_instances: int, chosen: argparse.Namespace
) -> tuple[Timings, list[str]]:
    """The timings, and which of them our step cannot do without, all of these together."""
    device = chosen.device
    batch = bag_for(ours, n_instances, device=device)
    with ExitStack() as fits:
        steps = {ours: enter_fit(fits, ours, batch, plugin=AnchorCallback(), device=device)}
        for peer in peers:
            name = ours if peer == ITSELF else peer
            steps[peer] = enter_fit(fits, name, batch, device=device)
        floors: dict[str, Step] = {}
        if ours in PRODUCTS:
            floors[f"products of {ours}"] = floor_of(ours, n_instances, device=device)
        if floors and n_instances < MANY:
            few = bag_for(ours, FEW, device=device)
            floors[f"step on {FEW} tiles"] = enter_fit(
                fits, ours, few, plugin=AnchorCallback(), device=device
            )
        timings = time_steps(steps | floors, rounds=chosen.rounds, clock=CLOCKS[device])
    return timings, list(floors)


if __name__ == "__main__":
    main()
