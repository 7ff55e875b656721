"""Loaders of slides: a folder of features on the user's disk, or a synthetic cohort."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from typing_extensions import override

from mil_anchor.data.cohorts import COHORTS
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.data.labels import LabelTable, read_labels, table_of_rows
from mil_anchor.data.memory import MemoryBudget
from mil_anchor.data.slides import SlideBags
from mil_anchor.data.split_files import read_split
from mil_anchor.data.splits import Split, split_by_parts, stratified_fold
from mil_anchor.data.stores import Store, check_slides, names_on_disk, open_store
from mil_anchor.data.synthetic import MPP, SyntheticCohort, SyntheticStore


class SlideDataModule(BagDataModule, ABC):
    """Serves the slides of a store, read when they are needed.

    Args:
        keep_in_memory: What is kept after it was read: ``"auto"`` for half of the free memory, a
            number of GB for each process, True for all, False for nothing.
        mpp: Micrometres per level-0 pixel, which FROC needs where coordinates are in pixels.
        batch_size: Bags per batch.
        balanced: Draw training bags so that all classes are equally frequent.
        num_workers: Worker processes per loader.
        seed: Seed of the split, and of its deal over processes.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        keep_in_memory: bool | float | int | str = "auto",
        mpp: float | int | None = None,
        batch_size: int = 1,
        balanced: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, balanced=balanced, num_workers=num_workers, seed=seed
        )
        if mpp is not None and not 0 < mpp < float("inf"):
            raise ValueError(
                f"mpp must be a number of micrometres per pixel above 0, but {mpp} came. "
                "Use 0.25 for slides at 40x, or null where it is unknown."
            )
        self.mpp = mpp
        self.keep_in_memory = keep_in_memory
        self.classes: list[str] = []

    @abstractmethod
    def open(self) -> tuple[Store, LabelTable, Split]:
        """The store, what is known of its slides, and one split of them."""

    @property
    @override
    def n_classes(self) -> int:
        """Number of classes of the table, whether or not each is in the split."""
        return len(self.classes) or super().n_classes

    @override
    def setup(self, stage: str) -> None:
        # The Trainer calls this before every stage.
        if len(self.train_bags):
            return
        n_processes = 1 if self.trainer is None else self.trainer.num_devices
        budget = MemoryBudget(keep_in_memory=self.keep_in_memory, n_processes=n_processes)
        store, table, split = self.open()
        self.classes = table.classes
        if len(set(table.cases)) < len(table.cases):
            self.cases = dict(zip(table.slide_ids, table.cases, strict=True))
        parts = [
            SlideBags(
                store,
                [table.slide_ids[index] for index in own],
                [table.labels[index] for index in own],
                keep=budget,
            )
            if own
            else self.test_bags
            for own in (split.train, split.val, split.test)
        ]
        self.train_bags, self.val_bags, self.test_bags = parts
        if self.num_workers:
            # Workers share what was read before they are forked, and keep nothing themselves.
            for bags in parts:
                if isinstance(bags, SlideBags):
                    bags.preload()
        super().setup(stage)


class FolderDataModule(SlideDataModule):
    """Slides of a folder of features, in any layout that `open_store` knows.

    Labels come from a table, from the rule of a public cohort, or from the store itself. The split
    comes from a file; else from the column ``split`` of the table, or the rule; else it is a fold
    of a stratified cross-validation that keeps cases together.

    Args:
        root: The folder or file of features.
        labels: The table of labels; None if the rule or the store tells them.
        splits: The file of a split, or a folder of such files.
        cohort: A key of ``COHORTS``: a public cohort whose rule tells labels and parts.
        label: Column of the labels; None: ``label``.
        classes: The labels in the order of their class indices, or the class of every label.
        fold: The fold, from 0.
        n_folds: Number of folds where the split is made here.
        val_fraction: Share of the slides outside the test part that goes to validation where the
            split does not say it.
        keep_in_memory: As `SlideDataModule`.
        mpp: As `SlideDataModule`.
        batch_size: Bags per batch.
        balanced: Draw training bags so that all classes are equally frequent.
        num_workers: Worker processes per loader.
        seed: Seed of the split, and of its deal over processes.

    Raises:
        ValueError: If an argument is out of range, or says something that nothing here asks for.
    """

    def __init__(
        self,
        root: str | Path,
        labels: str | Path | None = None,
        *,
        splits: str | Path | None = None,
        cohort: str | None = None,
        label: str | None = None,
        classes: Sequence[str | int]
        | Mapping[str, str | int]
        | Mapping[int, str | int]
        | None = None,
        fold: int = 0,
        n_folds: int = 5,
        val_fraction: float = 0.1,
        keep_in_memory: bool | float | int | str = "auto",
        mpp: float | int | None = None,
        batch_size: int = 1,
        balanced: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            keep_in_memory=keep_in_memory,
            mpp=mpp,
            batch_size=batch_size,
            balanced=balanced,
            num_workers=num_workers,
            seed=seed,
        )
        if cohort is not None and cohort not in COHORTS:
            raise ValueError(
                f"The cohort must be one of {sorted(COHORTS)} or null, but {cohort!r} came. "
                "Use data=folder with a table of labels for any other."
            )
        if cohort is not None and (label is not None or classes is not None):
            raise ValueError(
                f"The rule of cohort {cohort!r} tells the classes, so label and classes must be "
                f"null, but {label!r} and {classes!r} came. Remove them, or use data=folder with a "
                "table of labels."
            )
        if label is not None and labels is None:
            raise ValueError(
                f"label names a column of the table of labels, but {label!r} came without a table. "
                "Give the table as data.labels, or remove data.label."
            )
        # No shell expands the ~ of data.root=~/features.
        self.root = Path(root).expanduser()
        self.labels = None if labels is None else Path(labels).expanduser()
        self.splits = None if splits is None else Path(splits).expanduser()
        self.cohort = cohort
        self.label = label
        self.classes_given = classes
        self.fold = fold
        self.n_folds = n_folds
        self.val_fraction = val_fraction

    @override
    def open(self) -> tuple[Store, LabelTable, Split]:
        store = open_store(self.root)
        table = self._table(store)
        stored = replace(table, slide_ids=names_on_disk(store, table.slide_ids))
        check_slides(store, stored.slide_ids)
        return store, stored, self._split(table)

    def _table(self, store: Store) -> LabelTable:
        if self.cohort is not None:
            return COHORTS[self.cohort](_files_below(store), self.labels)
        if self.labels is not None:
            return read_labels(self.labels, label=self.label, classes=self.classes_given)
        rows = [
            {"slide_id": slide_id, "label": store.label(slide_id) or ""}
            for slide_id in store.slide_ids
        ]
        if not any(row["label"] for row in rows):
            raise ValueError(
                f"Slides need labels, but {store.path} ({store.layout}) holds none. Give a table "
                "with the columns slide_id and label: data.labels=labels.csv."
            )
        return table_of_rows(rows, store.path, classes=self.classes_given)

    def _split(self, table: LabelTable) -> Split:
        seed, val_fraction = self.seed, self.val_fraction
        if self.splits is not None:
            return read_split(
                self.splits, table, fold=self.fold, val_fraction=val_fraction, seed=seed
            )
        if any(table.parts):
            if self.fold:
                raise ValueError(
                    "The parts of these slides are given, so they have one split, but fold "
                    f"{self.fold} came. Use data.fold=0; another seed draws other validation "
                    "slides where none are named."
                )
            return split_by_parts(table, val_fraction=val_fraction, seed=seed)
        if self.cohort is not None:
            raise ValueError(
                f"Slides of cohort {self.cohort!r} need their official parts, for names tell no "
                f"patients, but neither folders below {self.root} nor a column split tell any. "
                "Add the column to the table of labels, or give data.splits."
            )
        return stratified_fold(
            table.labels,
            n_folds=self.n_folds,
            fold=self.fold,
            val_fraction=val_fraction,
            seed=seed,
            cases=table.cases,
            classes=table.classes,
        )


def _files_below(store: Store) -> dict[str, Path | None]:
    """The file of every slide below the store, whose own folders say nothing of its slides."""
    return {
        slide_id: None if store.path.is_file() else store.file(slide_id).relative_to(store.path)
        for slide_id in store.slide_ids
    }


class SyntheticDataModule(SlideDataModule):
    """A synthetic cohort, drawn slide by slide when it is first read.

    Args:
        preset: What the slides are like: ``camelyon_like`` or ``bracs_like``.
        size: How many and how large: ``tiny``, ``small``, ``medium`` or ``full``.
        world: Seed of the cohort.
        fold: Added to the seed of the cohort: every fold is another world.
        keep_in_memory: As `SlideDataModule`.
        batch_size: Bags per batch.
        balanced: Draw training bags so that all classes are equally frequent.
        num_workers: Worker processes per loader.
        seed: Seed of the deal of slides over processes.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        preset: str = "camelyon_like",
        size: str = "small",
        *,
        world: int = 0,
        fold: int = 0,
        keep_in_memory: bool | float | int | str = "auto",
        batch_size: int = 1,
        balanced: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            keep_in_memory=keep_in_memory,
            mpp=MPP,
            batch_size=batch_size,
            balanced=balanced,
            num_workers=num_workers,
            seed=seed,
        )
        self.cohort = SyntheticCohort(preset, size, seed=world + fold)

    @override
    def open(self) -> tuple[Store, LabelTable, Split]:
        return SyntheticStore(self.cohort), self.cohort.table, self.cohort.parts
