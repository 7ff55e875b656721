"""Is a bag read from the repacked file at least as fast as ``torch.load`` reads one from a .pt?

Every variant ends with a float32 tensor in memory. Process CPU time of one thread, and wall time;
warm cache, orders A B and B A in turn, minima over rounds. A bag that is mapped is in memory when
every page of it has been looked at. Run: python -m benchmarks.read_bag
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.record import arguments, show, start, write
from benchmarks.slides import RandomSlides
from mil_anchor.data.repack import repack
from mil_anchor.data.stores.packed import PackedStore

BAGS = ((10_000, 1024), (1000, 384))
REFERENCE = "torch.load"
COPY = "copy in memory"
MAPPED = "packed float32, mapped"
# What is compared with a copy in memory: the ratio's name, and the variant's.
RATIOS = {
    "read": "packed float32",
    "read float16": "packed float16",
    "mapped": MAPPED,
    "mapped, every page": f"{MAPPED}, every page",
    "into memory in use": "copy into memory in use",
}
# A page of memory holds so many float32.
_PAGE = 1024


def main() -> None:
    """Time the variants, print tables and write the figures."""
    chosen = start(arguments(__doc__, rounds=21, on_gpu=False))
    ratios: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, dict[str, float]]] = {}
    for n_instances, width in BAGS:
        size = f"{n_instances} x {width}"
        with tempfile.TemporaryDirectory() as folder:
            source = RandomSlides(
                Path(folder) / "source", n_slides=3, n_instances=n_instances, width=width
            )
            sizes[size] = _time(_variants(source), rounds=chosen.rounds)
        show(_table(sizes[size], title=size))
        ratios |= {f"{key}, {size}": _ratio(sizes[size], name) for key, name in RATIOS.items()}
    write("read_bag", ratios, chosen, h5py=h5py.__version__, sizes=sizes)


def _variants(source: RandomSlides) -> dict[str, Callable[[], Tensor]]:
    # One of a cohort, neither its first nor its last.
    slide_id = source.slide_ids[1]
    folder, features = source.path.parent, source.read_stored(slide_id).features
    stores = {}
    for dtype in ("float16", "float32"):
        repack(source, folder / f"{dtype}.h5", dtype=dtype, progress=False)
        stores[dtype] = PackedStore(folder / f"{dtype}.h5")
    torch.save(features, folder / "bag.pt")
    for name, rows in (("clam", 32), ("trident", 1)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=features.numpy(), chunks=(rows, features.shape[1]))

    def load() -> Tensor:
        return torch.load(folder / "bag.pt", weights_only=True)

    def look(bag: Tensor) -> Tensor:
        bag.view(-1)[::_PAGE].sum()
        return bag

    in_use = features.clone()

    def read_h5(name: str) -> Tensor:
        with h5py.File(folder / f"{name}.h5") as file:
            return torch.from_numpy(file["features"][:])

    return {
        REFERENCE: load,
        "torch.load again": load,
        "packed float16": lambda: stores["float16"].read(slide_id).features,
        "packed float32": lambda: stores["float32"].read_stored(slide_id).features,
        MAPPED: lambda: stores["float32"].read(slide_id).features,
        f"{MAPPED}, every page": lambda: look(stores["float32"].read(slide_id).features),
        "h5py, CLAM chunks (32, D)": lambda: read_h5("clam"),
        "h5py, TRIDENT chunks (1, D)": lambda: read_h5("trident"),
        COPY: features.clone,
        f"{COPY} again": features.clone,
        "copy into memory in use": lambda: in_use.copy_(features),
    }


def _ratio(rows: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    """A variant beside a copy in memory, in the form that all scripts share."""
    copy = rows[COPY]["cpu_ms"]
    return {
        "ratio": rows[name]["cpu_ms"] / copy,
        "control": rows[f"{COPY} again"]["cpu_ms"] / copy,
        "milliseconds": rows[name]["cpu_ms"],
    }


def _time(variants: dict[str, Callable[[], Tensor]], *, rounds: int) -> dict[str, dict[str, float]]:
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name in list(variants)[:: 1 if index % 2 else -1]:
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            bag = variants[name]()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - wall_start)
            del bag  # not within the next variant's time
    # The first round fills the cache.
    best_cpu = {name: min(seconds[1:]) for name, seconds in cpu.items()}
    best_wall = {name: min(seconds[1:]) for name, seconds in wall.items()}
    return {
        name: {
            "cpu_ms": 1000 * best_cpu[name],
            "wall_ms": 1000 * best_wall[name],
            "cpu_ratio": best_cpu[name] / best_cpu[REFERENCE],
            "wall_ratio": best_wall[name] / best_wall[REFERENCE],
        }
        for name in variants
    }


def _table(rows: dict[str, dict[str, float]], *, title: str) -> Table:
    columns = ("variant", "CPU (ms)", "wall (ms)", f"CPU / {REFERENCE}", f"wall / {REFERENCE}")
    table = Table(*columns, title=title)
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3g}" for value in row.values()))
    return table


if __name__ == "__main__":
    main()
