"""Labelled bags that are read from a store when they are asked for."""

from collections.abc import Sequence

import torch
from torch.utils.data import get_worker_info
from typing_extensions import override

from mil_anchor.data.bags import Bag, BagSequence
from mil_anchor.data.memory import MemoryBudget
from mil_anchor.data.stores.base import Store, StoredBag
from mil_anchor.data.stores.checks import check_widths
from mil_anchor.data.stores.progress import with_bar


class SlideBags(BagSequence):
    """Slides of a store with their labels, read when they are asked for.

    Bags are kept after their first read, in the dtype of the store, while the budget has room.
    Workers of a data loader keep nothing, as they end with the epoch: `preload` reads before they
    are forked, and they share its memory. Spawned workers read every bag from disk.

    Args:
        store: The store.
        slide_ids: The slides, in order.
        labels: Class index of every slide, from 0.
        keep: What bags are kept in; None keeps nothing. Give all parts of a split the same budget.

    Raises:
        ValueError: If labels and slides differ in number, or slides are missing, broken or differ
            in width.
    """

    def __init__(
        self,
        store: Store,
        slide_ids: Sequence[str],
        labels: Sequence[int],
        *,
        keep: MemoryBudget | None = None,
    ) -> None:
        if len(slide_ids) != len(labels):
            raise ValueError(
                f"Every slide needs one label, but {len(labels)} labels came for "
                f"{len(slide_ids)} slides. Give both in the same order."
            )
        self._store = store
        self._slide_ids = list(slide_ids)
        self._labels = list(labels)
        self._width = check_widths(store, slide_ids)
        self._budget = MemoryBudget(keep_in_memory=False) if keep is None else keep
        self._kept: dict[int, StoredBag] = {}
        self._checked: dict[int, Bag] = {}

    @property
    @override
    def bag_ids(self) -> list[str]:
        return self._slide_ids

    @property
    @override
    def labels(self) -> list[int]:
        return self._labels

    @property
    @override
    def width(self) -> int:
        return self._width

    @override
    def read(self, index: int) -> Bag:
        if index in self._checked:
            return self._checked[index]
        stored = self._kept.get(index) or self._read_stored(index)
        bag = Bag(
            stored.features.float(),
            label=self._labels[index],
            bag_id=self._slide_ids[index],
            coords=stored.coords,
            instance_label=stored.instance_label,
            lesion=stored.lesion,
        )
        # The very tensors that are kept: a look at each of their values once will do.
        if index in self._kept and bag.features is stored.features:
            self._checked[index] = bag
        return bag

    def preload(self, *, progress: bool = True) -> int:
        """Read bags, in their order, until the budget has no room for the next.

        Args:
            progress: Whether to show a progress bar.

        Returns:
            Number of bags that are kept now.
        """
        for index in with_bar(range(len(self)), "Reading slides", progress=progress):
            if index not in self._kept:
                if not self._budget.has_room:
                    break
                self._read_stored(index)
                if index not in self._kept:
                    break
        return len(self._kept)

    def _read_stored(self, index: int) -> StoredBag:
        slide_id = self._slide_ids[index]
        if not self._budget.has_room or get_worker_info() is not None:
            return self._store.read(slide_id)
        stored = self._store.read_stored(slide_id)
        if self._budget.take(_n_bytes(stored)):
            self._kept[index] = stored
        return stored

    def __getstate__(self) -> dict[str, object]:
        # A spawned process would get a copy of all kept bags.
        return {**self.__dict__, "_kept": {}, "_checked": {}}


def _n_bytes(stored: StoredBag) -> int:
    entries: list[torch.Tensor | None] = [
        stored.features,
        None if stored.coords is None else stored.coords.xy,
        stored.instance_label,
        stored.lesion,
        stored.coverage,
    ]
    return sum(entry.nbytes for entry in entries if entry is not None)
