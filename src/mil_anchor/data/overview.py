"""What a store and a table of labels hold, and what is wrong with them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mil_anchor.data.labels import LabelTable
from mil_anchor.data.stores.base import Store, StoredBag
from mil_anchor.data.stores.checks import names_on_disk
from mil_anchor.data.stores.packed import PackedStore, entries_of
from mil_anchor.data.stores.progress import with_bar

_QUANTILES = {
    "min": 0.0,
    "5 %": 0.05,
    "25 %": 0.25,
    "50 %": 0.5,
    "75 %": 0.75,
    "95 %": 0.95,
    "max": 1.0,
}


@dataclass(frozen=True)
class ClassCount:
    """How much there is of a class in a table of labels.

    Args:
        name: The class.
        n_slides: Slides of the table.
        n_cases: Cases (patients) that these slides are of.
        n_readable: Slides that are on disk and can be read.
    """

    name: str
    n_slides: int
    n_cases: int
    n_readable: int


@dataclass
class StoreOverview:
    """What was found in a store; rich can print it.

    Args:
        path: The store.
        layout: Its layout.
        n_slides: Slides on disk.
        bytes_on_disk: Size of all files below the path.
        checksums: Whether the slides were compared with checksums.
        bytes_in_memory: Size of all readable features as float32.
        n_instances: Tiles of every readable slide.
        width: Feature width of every readable slide.
        dtypes: Number of slides of every dtype.
        grids: Number of slides of every coords unit and pitch; None for slides without coords.
        entries: Number of slides that have instance labels, lesions, coverage.
        broken: Slides that cannot be read, and why.
        classes: What the table holds of each class; None without a table.
        missing: Slides of the table that are not on disk.
        unlisted: Slides on disk that are in no row of the table.
    """

    path: Path
    layout: str
    n_slides: int
    bytes_on_disk: int
    checksums: bool
    bytes_in_memory: int = 0
    n_instances: dict[str, int] = field(default_factory=dict)
    width: dict[str, int] = field(default_factory=dict)
    dtypes: Counter[str] = field(default_factory=Counter)
    grids: Counter[tuple[str, float] | None] = field(default_factory=Counter)
    entries: Counter[str] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)
    classes: list[ClassCount] | None = None
    missing: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)

    @property
    def widths(self) -> Counter[int]:
        """Number of slides of every feature width."""
        return Counter(self.width.values())

    @property
    def of_other_width(self) -> list[str]:
        """Slides that do not have the most frequent width."""
        usual = max(self.widths, key=lambda width: self.widths[width], default=None)
        return [slide_id for slide_id, width in self.width.items() if width != usual]

    @property
    def ok(self) -> bool:
        """Whether nothing is missing or broken and all slides have one width."""
        return not self.missing and not self.broken and len(self.widths) == 1

    @property
    def quantiles(self) -> dict[str, float]:
        """Quantiles of the number of tiles of a slide; empty if none is readable."""
        sizes = list(self.n_instances.values())
        return {
            name: float(np.quantile(sizes, level)) for name, level in _QUANTILES.items() if sizes
        }

    def __rich__(self) -> Group:
        parts: list[Table | Text] = [_facts(self)]
        if self.classes is not None:
            parts.append(_class_table(self.classes))
        broken = [f"{slide_id}: {reason}" for slide_id, reason in self.broken.items()]
        of_other_width = [f"{slide_id}: {self.width[slide_id]}" for slide_id in self.of_other_width]
        for title, lines in (
            ("missing on disk", self.missing),
            ("in no row of the table", self.unlisted),
            ("of another width", of_other_width),
            ("broken", broken),
        ):
            if lines:
                # Text, because the name of a slide may look like rich's markup.
                parts.append(Text("\n  ".join([f"{len(lines)} {title}:", *lines])))
        return Group(*parts)


def inspect_data(
    store: Store, table: LabelTable | None = None, *, progress: bool = True
) -> StoreOverview:
    """Read every slide of a store once, and compare the store with a table of labels.

    Slides of a packed file are compared with their checksums as well.

    Args:
        store: The store.
        table: Labels of its slides.
        progress: Show a progress bar on standard error.

    Returns:
        What was found. Broken slides are a part of it, not an error.
    """
    overview = StoreOverview(
        path=store.path,
        layout=store.layout,
        n_slides=len(store.slide_ids),
        bytes_on_disk=_bytes_below(store.path),
        checksums=isinstance(store, PackedStore),
    )
    for slide_id in with_bar(store.slide_ids, "reading", progress=progress):
        try:
            if isinstance(store, PackedStore):
                stored = store.read_verified(slide_id)
            else:
                stored = store.read_stored(slide_id)
        except (ValueError, OSError) as error:
            overview.broken[slide_id] = str(error)
        else:
            _count(overview, stored)
    if table is not None:
        table = replace(table, slide_ids=names_on_disk(store, table.slide_ids))
        on_disk, listed = set(store.slide_ids), set(table.slide_ids)
        overview.missing = sorted(listed - on_disk)
        overview.unlisted = sorted(on_disk - listed)
        overview.classes = _count_classes(table, set(overview.n_instances))
    return overview


def _count(overview: StoreOverview, stored: StoredBag) -> None:
    n_instances, width = stored.features.shape
    overview.n_instances[stored.slide_id] = n_instances
    overview.bytes_in_memory += 4 * n_instances * width
    overview.width[stored.slide_id] = width
    overview.dtypes[str(stored.features.dtype).removeprefix("torch.")] += 1
    coords = stored.coords
    overview.grids[None if coords is None else (coords.unit, float(coords.pitch))] += 1
    overview.entries.update(name for name in entries_of(stored) if name != "coords")


def _count_classes(table: LabelTable, readable: set[str]) -> list[ClassCount]:
    counts = []
    rows = list(zip(table.slide_ids, table.labels, table.cases, strict=True))
    for index, name in enumerate(table.classes):
        members = [(slide_id, case) for slide_id, label, case in rows if label == index]
        counts.append(
            ClassCount(
                name,
                n_slides=len(members),
                n_cases=len({case for _, case in members}),
                n_readable=sum(slide_id in readable for slide_id, _ in members),
            )
        )
    return counts


def _bytes_below(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _facts(overview: StoreOverview) -> Table:
    sizes = list(overview.n_instances.values())
    grids = {
        "none" if grid is None else f"{grid[0]}, pitch {grid[1]:g}": count
        for grid, count in overview.grids.items()
    }
    quantiles = [f"{name} {value:,.0f}" for name, value in overview.quantiles.items()]
    facts = {
        "store": str(overview.path),
        "layout": overview.layout,
        "slides": f"{overview.n_slides}, of which {len(overview.broken)} broken",
        "width": _counted(overview.widths),
        "dtype": _counted(overview.dtypes),
        "tiles": f"{sum(sizes):,} in all; per slide " + ", ".join(quantiles),
        "coords": _counted(grids),
        "also holds": _counted(overview.entries),
        "on disk": f"{overview.bytes_on_disk / 1e9:.3g} GB",
        "in memory": f"{overview.bytes_in_memory / 1e9:.3g} GB as float32",
    }
    if overview.checksums:
        facts["checksums"] = f"{len(overview.n_instances)} of {overview.n_slides} slides agree"
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(name, Text(fact))
    return table


def _class_table(classes: list[ClassCount]) -> Table:
    table = Table("class", box=None, pad_edge=False)
    for title in ("slides", "cases", "readable"):
        table.add_column(title, justify="right")
    for entry in classes:
        counts = (entry.n_slides, entry.n_cases, entry.n_readable)
        table.add_row(Text(entry.name), *map(str, counts))
    return table


def _counted(counts: Mapping[Any, int]) -> str:
    """Values with the number of slides of each, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{value} ({count} slides)" for value, count in ordered) or "none"
