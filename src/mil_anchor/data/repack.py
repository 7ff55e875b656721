"""Writes a store as one packed file: resumable, and verified by checksum."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mil_anchor.data.repack_plan import DTYPES, RepackPlan, plan_repack
from mil_anchor.data.stores.base import Store, StoredBag
from mil_anchor.data.stores.checks import some
from mil_anchor.data.stores.packed import (
    PackedIndex,
    PackedStore,
    State,
    entries_of,
    open_packed,
    read_index,
)
from mil_anchor.data.stores.packing import lay_out, set_state, write_slide, writing
from mil_anchor.data.stores.progress import with_bar


@dataclass(frozen=True)
class RepackReport:
    """What a packed file holds at the end.

    Args:
        path: The file.
        n_slides: Slides in the file. Each was read back and agrees with its checksum.
        n_new: Slides that this run wrote.
        n_instances: Tiles of all slides.
        width: Feature width.
        dtype: dtype of the features.
        n_bytes: Size of the file.
        left_out: Slides that are not in the file, and why.
    """

    path: Path
    n_slides: int
    n_new: int
    n_instances: int
    width: int
    dtype: str
    n_bytes: int
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.n_slides} slides, {self.n_instances:,} tiles x {self.width} "
            f"{self.dtype}, {self.n_bytes / 1e9:.3g} GB; {self.n_new} slides written now",
            "Every slide was read back from the file and agrees with its checksum.",
        ]
        if self.left_out:
            lines.append(f"Left out {len(self.left_out)} slides:")
            lines += [f"  {slide_id}: {reason}" for slide_id, reason in self.left_out.items()]
        return "\n".join(lines)


def repack(
    source: Store,
    destination: Path,
    *,
    dtype: str = "float16",
    slide_ids: Sequence[str] | None = None,
    skip_broken: bool = False,
    progress: bool = True,
) -> RepackReport:
    """Write slides of a store into one contiguous HDF5 file that is fast to read.

    A run that was stopped, even killed, goes on after the last finished slide when it is started
    again; a finished file is left as it is. Broken slides do not stop the others: they are reported
    together at the end and tried again by the next run. At the end every slide is read back and
    compared with its checksum.

    Args:
        source: The slides. All must have one feature width.
        destination: The file, outside of the source; its folder must exist.
        dtype: dtype of the features, "float16" or "float32".
        slide_ids: Slides to write; None for all.
        skip_broken: Finish the file without the slides that cannot be read.
        progress: Show progress bars on standard error.

    Returns:
        What the file holds.

    Raises:
        ValueError: If slides are broken (all are named), lie beyond float16's range, differ in
            width or are not in the source, or if the destination cannot be used or holds something
            else.
        RuntimeError: If the disk is full or writing fails; slides that were finished stay so.
    """
    _check_folder(destination, source.path)
    plan = plan_repack(source, slide_ids, dtype=dtype, progress=progress)
    if not destination.exists():
        _lay_out(plan, destination, finished=None)
    plan.check_destination(destination)
    index = read_index(destination)
    for position in index.positions(State.WRITTEN, State.VERIFIED):
        plan.broken.pop(index.slide_ids[position], None)
    if not plan.fits(index):
        _lay_out(plan, destination, finished=index)
        index = read_index(destination)
    n_new = _write_all(plan, index, progress=progress)
    _verify_all(read_index(destination), progress=progress)
    if plan.broken:
        _settle_broken(plan, read_index(destination), skip_broken=skip_broken)
    index = read_index(destination)
    done = index.positions(State.VERIFIED)
    return RepackReport(
        path=destination,
        n_slides=len(done),
        n_new=n_new,
        n_instances=int(index.slides["n_instances"][done].sum()),
        width=index.width,
        dtype=dtype,
        n_bytes=destination.stat().st_size,
        left_out=plan.broken,
    )


def verify(path: Path, *, progress: bool = True) -> int:
    """Read every slide of a packed file and compare it with its checksum.

    Args:
        path: A finished file.
        progress: Show a progress bar on standard error.

    Returns:
        Number of slides, all of them intact.

    Raises:
        ValueError: If the file is not finished, or slides are damaged; all are named.
    """
    store = PackedStore(path)
    damaged = []
    for slide_id in with_bar(store.slide_ids, "verifying", progress=progress):
        try:
            store.read_verified(slide_id)
        except ValueError:
            damaged.append(slide_id)
    if damaged:
        raise ValueError(
            f"All slides of {path} must agree with their checksums, but {len(damaged)} are "
            f"damaged: {some(damaged, shown=3)}. Delete the file and repack its source again."
        )
    return len(store.slide_ids)


def _lay_out(plan: RepackPlan, destination: Path, *, finished: PackedIndex | None) -> None:
    sizes, labels = plan.sizes, [plan.labels.get(slide_id, "") for slide_id in plan.slide_ids]
    if finished is not None:
        for position in finished.positions(State.WRITTEN, State.VERIFIED):
            sizes[position] = int(finished.slides["n_instances"][position])
            labels[position] = finished.labels[position]
    lay_out(
        destination,
        plan.slide_ids,
        sizes=sizes,
        labels=labels,
        width=plan.width,
        dtype=plan.dtype,
        source=plan.source.path,
        finished=finished,
    )


def _write_all(plan: RepackPlan, index: PackedIndex, *, progress: bool) -> int:
    """Write what is not in the file; what cannot be read joins the broken slides."""
    n_new = 0
    pending = index.positions(State.PENDING, State.LEFT_OUT)
    readable = [p for p in pending if index.slide_ids[p] in plan.shapes]
    if not readable:
        return n_new
    with writing(index.path), open_packed(index.path, mode="r+") as file:
        for position in with_bar(readable, "writing", progress=progress):
            slide_id = index.slide_ids[position]
            try:
                stored = _read(plan, slide_id)
            except (ValueError, OSError) as error:
                plan.broken[slide_id] = str(error)
                continue
            write_slide(file, position, _cast(stored, plan.dtype))
            n_new += 1
    return n_new


def _read(plan: RepackPlan, slide_id: str) -> StoredBag:
    stored = plan.source.read_stored(slide_id)
    if tuple(stored.features.shape) != tuple(plan.shapes[slide_id]):
        raise ValueError(
            f"Slide {slide_id!r} must have shape {tuple(plan.shapes[slide_id])}, but has "
            f"{tuple(stored.features.shape)} now. Repack when nothing writes to the source."
        )
    for name, entry in entries_of(stored).items():
        if len(entry) != len(stored.features):
            raise ValueError(
                f"{name} must have one entry per tile, but slide {slide_id!r} has {len(entry)} for "
                f"{len(stored.features)} tiles. Extract its features again."
            )
    if not math.isfinite(_largest(stored)):
        raise ValueError(
            f"Features must be finite, but slide {slide_id!r} holds NaN or infinity. Extract its "
            "features again."
        )
    return stored


def _cast(stored: StoredBag, dtype: str) -> StoredBag:
    largest = _largest(stored)
    if largest > torch.finfo(DTYPES[dtype]).max:
        raise ValueError(
            f"float16 holds values up to 65504, but slide {stored.slide_id!r} has {largest:g}. "
            "Use --dtype float32 (and delete the float16 file that was begun)."
        )
    return replace(stored, features=stored.features.to(DTYPES[dtype]))


def _largest(stored: StoredBag) -> float:
    """Largest absolute feature; NaN if one is."""
    low, high = torch.aminmax(stored.features)
    return float(torch.maximum(-low, high))


def _verify_all(index: PackedIndex, *, progress: bool) -> None:
    written = index.positions(State.WRITTEN)
    if not written:
        return
    with writing(index.path), index.path.open("rb") as file:
        os.fsync(file.fileno())
    damaged = []
    for position in with_bar(written, "verifying", progress=progress):
        try:
            index.read_verified(position)
        except ValueError:
            damaged.append(position)
    set_state(index.path, set(written) - set(damaged), state=State.VERIFIED)
    if damaged:
        set_state(index.path, damaged, state=State.PENDING)
        names = some([index.slide_ids[position] for position in damaged], shown=3)
        raise RuntimeError(
            f"What is read back from {index.path} must be what was written, but it differs for "
            f"{names}. Check the disk; the "
            "same command writes these slides anew."
        )


def _settle_broken(plan: RepackPlan, index: PackedIndex, *, skip_broken: bool) -> None:
    n_done = len(index.positions(State.VERIFIED))
    if skip_broken and n_done:
        set_state(index.path, index.positions(State.PENDING), state=State.LEFT_OUT)
        return
    raise ValueError(
        f"All slides must be readable, but {len(plan.broken)} of {len(plan.slide_ids)} are broken; "
        f"the other {n_done} are in {index.path}. Mend them and run the same command again, or "
        f"leave them out with --skip-broken.{plan.reasons}"
    )


def _check_folder(destination: Path, source: Path) -> None:
    if source.resolve() in destination.resolve().parents:
        raise ValueError(
            f"The destination must lie outside of its source, where it would be taken for a slide, "
            f"but {destination} lies in {source}. Give another place."
        )
    if not destination.parent.is_dir():
        raise ValueError(
            f"The folder of the destination must exist, but {destination.parent} does not. "
            "Make it first."
        )
