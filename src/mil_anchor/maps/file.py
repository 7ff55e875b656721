"""The attention maps of a run: one HDF5 file with the attention of kept bags in every epoch."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mil_anchor.data.bags import UNITS, Bag
from mil_anchor.maps.slide import SlideMap

MAPS_FILE = "attention.h5"

# A row of log-attention must sum to one within this: a slip (raw scores, a lost padding) is larger.
_SUM_TOLERANCE = 0.01


class MapWriter:
    """Writes the attention of some bags, epoch by epoch, into one HDF5 file.

    Layout: a group ``bags/<number>`` for each bag, with the attributes ``bag_id`` (a JSON string:
    HDF5 has no place for some characters), ``part``, ``label``, ``n_instances`` and, where known,
    ``pitch`` and ``unit``; the datasets ``xy (instance, 2)``, ``instance_label`` and ``lesion``
    where known; ``epochs/<epoch>`` and ``best``, each float16 ``(row, instance)``: the log of the
    attention in an epoch and with the chosen checkpoint. Epochs count from 0, as ``epoch`` in
    ``attention.csv`` and the Trainer's ``current_epoch``.

    float16 keeps a log above -16 within 2^-8, so a weight above 1.2e-7 to 0.4 %. A weight itself it
    would keep so well above 6e-5 only: the mean weight of 16,000 instances. A weight of exactly 0
    is kept, as -inf.

    Every call opens and closes the file. While it is open it is called ``attention.h5.partial``, so
    a file that a killed process has left half-written is known by its name: the next call sets it
    aside as ``attention.h5.broken``, warns, and begins a new file. Writers must not write at once:
    of a distributed run, one process writes.

    Args:
        path: The file; made by the first call.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f"{path.name}.partial")

    def add_bag(self, bag: Bag, part: str) -> None:
        """Keep a bag. One that is there already keeps its maps, as a resumed run needs it.

        Args:
            bag: The bag; its features are not written.
            part: "val" or "test".

        Raises:
            ValueError: The file holds maps of a bag with this id and another number of instances.
        """
        n_instances = len(bag.features)
        with self._open() as file:
            bags = file.require_group("bags")
            group = _find(bags, bag.bag_id)
            if group is not None and group.attrs["n_instances"] != n_instances:
                if len(group["epochs"]):
                    raise ValueError(
                        f"A bag must keep its instances within a run, but bag {bag.bag_id!r} came "
                        f"with {n_instances} and has maps of {group.attrs['n_instances']} in "
                        f"{self.path}. Start the run anew, or restore the features."
                    )
                del bags[group.name]
                group = None
            if group is None:
                number = 1 + max(map(int, bags), default=-1)
                # Linked when it is whole: Ctrl-C leaves no half of a bag.
                bags[str(number)] = _write_bag(bags, bag, part)

    def add_epoch(
        self, bag_id: str, epoch: int, log_attention: Float[Tensor, "row instance"]
    ) -> None:
        """Write the attention of a kept bag in an epoch, in place of an earlier one.

        Args:
            bag_id: A bag of `add_bag`.
            epoch: Epoch from 0.
            log_attention: Log of a distribution over the instances for each row.

        Raises:
            ValueError: The bag is not kept, or this is no log-attention over its instances.
        """
        if epoch < 0:
            raise ValueError(f"Epochs are counted from 0, but {epoch} came for bag {bag_id!r}.")
        self._write(bag_id, f"epochs/{epoch}", log_attention)

    def add_best(self, bag_id: str, log_attention: Float[Tensor, "row instance"]) -> None:
        """Write the attention of a kept bag with the chosen checkpoint. As `add_epoch`."""
        self._write(bag_id, "best", log_attention)

    def drop_epochs_from(self, epoch: int) -> None:
        """Forget what a resumed run repeats: this epoch, all after it, and the best. Makes no file.

        Args:
            epoch: First epoch that the run will write.
        """
        if not self.path.exists() and not self._partial.exists():
            return
        with self._open() as file:
            for group in file.require_group("bags").values():
                for name in [name for name in group["epochs"] if int(name) >= epoch]:
                    del group["epochs"][name]
                if "best" in group:
                    del group["best"]

    def _write(self, bag_id: str, name: str, log_attention: Float[Tensor, "row instance"]) -> None:
        _check_distribution(bag_id, log_attention)
        with self._open() as file:
            bags = file.require_group("bags")
            group = _find(bags, bag_id)
            if group is None:
                kept = [_bag_id(member) for member in bags.values()]
                raise ValueError(
                    f"Attention is written of kept bags only, but {bag_id!r} is none of {kept} in "
                    f"{self.path}. Call add_bag first."
                )
            n_instances = group.attrs["n_instances"]
            if log_attention.shape[1] != n_instances:
                raise ValueError(
                    f"Log-attention must have one column per instance, but bag {bag_id!r} has "
                    f"{n_instances} instances and {log_attention.shape[1]} columns came. Remove "
                    "padding before writing."
                )
            if name in group:
                del group[name]
            group[name] = log_attention.detach().cpu().numpy().astype(np.float16)

    @contextmanager
    def _open(self) -> Iterator[h5py.File]:
        """The file under its partial name; it gets its own name back when it is whole again."""
        partial = self._partial
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            self._set_aside("its writer was stopped while writing")
        if self.path.exists():
            self.path.rename(partial)
        # Without HDF5's lock: a reader must not stop a training, and many cluster disks have none.
        try:
            file = h5py.File(partial, "a", locking=False)
        except OSError as error:
            # What the operating system refuses has a number; a damaged file has none.
            if error.errno is not None or "already open" in str(error):
                if partial.exists():
                    partial.rename(self.path)
                raise
            self._set_aside(str(error))
            file = h5py.File(partial, "a", locking=False)
        with file:
            refusal: BaseException | None = None
            try:
                yield file
            # Raised above before anything is written, or Ctrl-C, after which the file is closed.
            except (ValueError, KeyboardInterrupt) as error:
                refusal = error
        # Not reached after any other error: what is half-written keeps its partial name.
        partial.rename(self.path)
        if refusal is not None:
            raise refusal

    def _set_aside(self, why: str) -> None:
        broken = self.path.with_name(f"{self.path.name}.broken")
        self._partial.replace(broken)
        warnings.warn(
            f"{self.path} cannot be continued ({why}). It is now {broken.name}; a new file begins, "
            "without the attention maps of earlier epochs. Nothing else of the run is touched.",
            stacklevel=4,
        )


class KeptBag(NamedTuple):
    """What a file of maps holds of one bag."""

    bag_id: str
    part: str
    label: int
    n_instances: int
    epochs: list[int]
    has_best: bool


def read_maps(path: Path) -> list[KeptBag]:
    """Which bags a file of maps holds, in the order in which they were added.

    Raises:
        ValueError: There is no such file, or it cannot be read.
    """
    with _opened(path) as file:
        return [
            KeptBag(
                _bag_id(group),
                str(group.attrs["part"]),
                int(group.attrs["label"]),
                int(group.attrs["n_instances"]),
                sorted(map(int, group["epochs"])),
                "best" in group,
            )
            for group in _groups(file)
        ]


def read_map(path: Path, bag_id: str) -> SlideMap:
    """The attention on one bag.

    Raises:
        ValueError: There is no such file or bag, or the file cannot be read.
    """
    with _opened(path) as file:
        groups = {_bag_id(group): group for group in _groups(file)}
        if bag_id not in groups:
            raise ValueError(
                f"A slide must be one of those whose attention {path} keeps, but {bag_id!r} came "
                f"and there are {list(groups)}. Choose one of them."
            )
        group = groups[bag_id]
        log_attention: dict[int | None, Tensor] = {
            int(epoch): torch.from_numpy(values[()]) for epoch, values in group["epochs"].items()
        }
        if "best" in group:
            log_attention[None] = torch.from_numpy(group["best"][()])
        annotation = {
            name: torch.from_numpy(group[name][()])
            for name in ("instance_label", "lesion")
            if name in group
        }
        coords = None
        if "xy" in group:
            kind = UNITS[str(group.attrs["unit"])]
            coords = kind(torch.from_numpy(group["xy"][()]), float(group.attrs["pitch"]))
        return SlideMap(
            bag_id,
            int(group.attrs["label"]),
            str(group.attrs["part"]),
            log_attention,
            coords=coords,
            **annotation,
        )


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.exists():
        raise ValueError(
            f"A run must hold its attention maps in {path}, but there is no such file. Name the "
            "folder of a run that keeps maps; if it is being written just now, try again."
        )
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (OSError, KeyError) as error:
        raise ValueError(
            f"{path} must be a file of attention maps, but it cannot be read ({error}). If its run "
            "is writing just now, try again; otherwise run it anew."
        ) from error


def _groups(file: h5py.File) -> list[h5py.Group]:
    bags = file["bags"]
    return [bags[name] for name in sorted(bags, key=int)]


def _bag_id(group: h5py.Group) -> str:
    bag_id: str = json.loads(group.attrs["bag_id"])
    return bag_id


def _find(bags: h5py.Group, bag_id: str) -> h5py.Group | None:
    return next((group for group in bags.values() if _bag_id(group) == bag_id), None)


def _write_bag(bags: h5py.Group, bag: Bag, part: str) -> h5py.Group:
    """A group without a name, for the caller to link."""
    group = bags.create_group(None)
    group.attrs["bag_id"] = json.dumps(bag.bag_id)
    group.attrs["part"] = part
    group.attrs["label"] = bag.label
    group.attrs["n_instances"] = len(bag.features)
    group.create_group("epochs")
    if bag.coords is not None:
        group["xy"] = bag.coords.xy.cpu().numpy()
        group.attrs["pitch"] = bag.coords.pitch
        group.attrs["unit"] = bag.coords.unit
    for name in ("instance_label", "lesion"):
        entry = getattr(bag, name)
        if entry is not None:
            group[name] = entry.cpu().numpy()
    return group


def _check_distribution(bag_id: str, log_attention: Float[Tensor, "row instance"]) -> None:
    sums = log_attention.double().exp().sum(dim=1)
    # Written so that NaN fails as well.
    wrong = ~((sums - 1).abs() <= _SUM_TOLERANCE)
    if wrong.any() or len(sums) == 0:
        raise ValueError(
            f"Every row of log-attention must be the log of weights that sum to 1, but for bag "
            f"{bag_id!r} they sum to {[round(total, 4) for total in sums.tolist()]}. Give the "
            "log-softmax of the scores over the real instances."
        )
