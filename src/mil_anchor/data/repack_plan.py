"""What a packed file shall hold, and whether a file may become that."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mil_anchor.data.stores.base import BagShape, Store
from mil_anchor.data.stores.checks import some
from mil_anchor.data.stores.packed import PackedIndex, State, is_packed, read_index
from mil_anchor.data.stores.progress import with_bar

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass
class RepackPlan:
    """What a packed file shall hold.

    Args:
        source: Where the slides come from.
        slide_ids: All slides, in their order in the file.
        dtype: dtype of the features, "float16" or "float32".
        shapes: Shape of every slide that is not broken.
        labels: Label text of every slide that is not broken, empty where the source holds none.
        broken: Why a slide cannot be read; more are found when slides are read.
    """

    source: Store
    slide_ids: list[str]
    dtype: str
    shapes: dict[str, BagShape] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Tiles of every slide, 0 where that is not known."""
        return [
            self.shapes[slide_id].n_instances if slide_id in self.shapes else 0
            for slide_id in self.slide_ids
        ]

    @property
    def width(self) -> int:
        """Feature width of all slides."""
        return next(iter(self.shapes.values())).width

    @property
    def reasons(self) -> str:
        """A line for each of the first broken slides."""
        shown = list(self.broken.items())[:10]
        more = [f"\n  ... and {len(self.broken) - 10} more"] if len(self.broken) > 10 else []
        return "".join([*(f"\n  {slide_id}: {reason}" for slide_id, reason in shown), *more])

    def check_destination(self, destination: Path) -> None:
        """Refuse a file that holds something else than a part of this plan.

        Raises:
            ValueError: If it does.
        """
        found = None
        index = read_index(destination) if is_packed(destination) else None
        if index is None:
            found = "it holds something else"
        elif index.source != str(self.source.path.resolve()):
            found = f"it was made from {index.source}, not {self.source.path.resolve()}"
        elif index.dtype.name != self.dtype:
            found = f"its features are {index.dtype.name}, not {self.dtype}"
        elif index.width != self.width:
            found = f"its features have width {index.width}, not {self.width}"
        elif index.slide_ids != self.slide_ids:
            other = sorted(set(index.slide_ids) ^ set(self.slide_ids))
            found = f"it is for other slides ({len(other)} differ: {some(other, shown=3)})"
        else:
            changed = [
                slide_id
                for position in index.positions(State.WRITTEN, State.VERIFIED)
                if (slide_id := index.slide_ids[position]) in self.shapes
                and self.shapes[slide_id].n_instances != index.slides["n_instances"][position]
            ]
            if changed:
                found = f"the source has another number of tiles now in {some(changed, shown=3)}"
        if found is not None:
            raise ValueError(
                f"{destination} must be new or hold a part of the same repack, but {found}. Give "
                "another destination, or delete the file if you do not need it."
            )

    def fits(self, index: PackedIndex) -> bool:
        """Whether every slide that is not in a file yet has a place of its size there."""
        sizes = self.sizes
        return all(
            sizes[position] in (0, index.slides["n_instances"][position])
            for position in index.positions(State.PENDING, State.LEFT_OUT)
        )


def plan_repack(
    source: Store, slide_ids: Sequence[str] | None, *, dtype: str, progress: bool
) -> RepackPlan:
    """Look at every slide without reading its features.

    Args:
        source: The store.
        slide_ids: Slides of it; None for all.
        dtype: dtype of the features in the file.
        progress: Show a progress bar.

    Returns:
        The plan.

    Raises:
        ValueError: If the dtype is unknown, or slides are missing, all broken or of more than one
            width.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, but {dtype!r} came. Use float16.")
    present = source.slide_ids
    wanted = sorted(set(present if slide_ids is None else slide_ids))
    if not wanted:
        raise ValueError(
            f"At least one slide must be asked for, but none of {source.path} is. Check the folder "
            "and the list of slides."
        )
    missing = sorted(set(wanted) - set(present))
    if missing:
        raise ValueError(
            f"Slides to repack must be in {source.path}, but {len(missing)} of {len(wanted)} are "
            f"not: {some(missing, shown=3)}. Leave them out, or extract their features first."
        )
    plan = RepackPlan(source, wanted, dtype)
    of_width: dict[int, list[str]] = {}
    for slide_id in with_bar(wanted, "looking", progress=progress):
        try:
            plan.shapes[slide_id] = source.shape(slide_id)
            plan.labels[slide_id] = source.label(slide_id) or ""
        except (ValueError, OSError) as error:
            plan.shapes.pop(slide_id, None)
            plan.broken[slide_id] = str(error)
        else:
            of_width.setdefault(plan.shapes[slide_id].width, []).append(slide_id)
    if not of_width:
        raise ValueError(
            f"At least one slide of {source.path} must be readable, but none of {len(wanted)} is. "
            f"{plan.reasons}"
        )
    if len(of_width) > 1:
        found = ", ".join(
            f"{width} in {some(ids, shown=3)}" for width, ids in sorted(of_width.items())
        )
        raise ValueError(
            f"All slides of a packed file must have one feature width, but there are {found}. "
            "Use features of one encoder only, and move the others out of the folder."
        )
    return plan
