"""Loaders of bags for the Trainer."""

from collections import Counter
from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)
from typing_extensions import override

from mil_anchor.data.bags import Bag, BagList, BagSequence, Batch, collate_bags
from mil_anchor.data.classic import load_classic
from mil_anchor.data.splits import stratified_fold
from mil_anchor.data.standardize import Standardizer


class BagDataModule(LightningDataModule):
    """Serves three lists of bags; a subclass may fill them in ``setup``.

    On several processes every process trains on its own share of the bags and evaluates all bags,
    so run the Trainer with ``use_distributed_sampler=False``.

    Args:
        train_bags: Bags that are trained on, in a new order every epoch.
        val_bags: Bags that choose the model, in the given order.
        test_bags: Bags that only the final figure sees, in the given order.
        batch_size: Bags per batch.
        balanced: Draw training bags with replacement so that all classes are equally frequent.
        num_workers: Worker processes per loader.
        seed: Seed of the split over processes; on one process, the order follows torch's global
            random state, so that a run which restores that state resumes exactly.

    Attributes:
        mpp: Micrometres per level-0 pixel of the bags' coordinates; None if it is unknown.
        cases: The case (patient) of bags by their ids; empty where every bag is its own.

    Raises:
        ValueError: If ``batch_size`` or ``num_workers`` is out of range.
    """

    def __init__(
        self,
        train_bags: Sequence[Bag] = (),
        val_bags: Sequence[Bag] = (),
        *,
        test_bags: Sequence[Bag] = (),
        batch_size: int = 1,
        balanced: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.mpp: float | int | None = None
        self.cases: dict[str, str] = {}
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but {batch_size} came. Use 1.")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, but {num_workers} came. Use 0.")
        self.train_bags = _as_sequence(train_bags)
        self.val_bags = _as_sequence(val_bags)
        self.test_bags = _as_sequence(test_bags)
        self.batch_size = batch_size
        self.balanced = balanced
        self.num_workers = num_workers
        self.seed = seed

    @property
    def in_features(self) -> int:
        """Feature width of the bags.

        Raises:
            ValueError: If the bags differ in width.
        """
        widths = {part: bags.width for part, bags in self.parts.items()}
        if len(set(widths.values())) > 1:
            found = ", ".join(
                f"{width} in {part} ({bags.bag_ids[0]!r}, ...)"
                for (part, bags), width in zip(self.parts.items(), widths.values(), strict=True)
            )
            raise ValueError(
                f"All bags must have one feature width, but there are {found}. "
                "Use features of one encoder only."
            )
        return next(iter(widths.values()))

    @property
    def n_classes(self) -> int:
        """Number of classes: the largest label plus one."""
        return 1 + max(label for bags in self.parts.values() for label in bags.labels)

    @override
    def setup(self, stage: str) -> None:
        _ = self.in_features

    @override
    def train_dataloader(self) -> DataLoader[Bag]:
        return self._loader(self.train_bags, sampler=self._train_sampler())

    @override
    def val_dataloader(self) -> DataLoader[Bag]:
        return self._loader(self.val_bags, sampler=None)

    @override
    def test_dataloader(self) -> DataLoader[Bag]:
        return self._loader(self.test_bags, sampler=None)

    @override
    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        # It is there already; Lightning would look at every entry, down to the ids of the bags.
        if device.type == "cpu":
            return batch
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    @property
    def parts(self) -> dict[str, BagSequence]:
        """The bags of train, val and test; a part without bags is left out."""
        if not len(self.train_bags):
            raise RuntimeError(
                "A data module needs training bags, but it has none. "
                "Call setup('fit') first, or give train_bags."
            )
        parts = {"train": self.train_bags, "val": self.val_bags, "test": self.test_bags}
        return {part: bags for part, bags in parts.items() if len(bags)}

    def _train_sampler(self) -> Sampler[int]:
        if self.trainer is not None and self.trainer.world_size > 1:
            if self.balanced:
                raise MisconfigurationException(
                    "balanced=True must run on one process, but the Trainer has "
                    f"{self.trainer.world_size}. Use one device, or balanced=False."
                )
            sampler: DistributedSampler[int] = DistributedSampler(
                self.train_bags,  # type: ignore[arg-type]  # a sequence is a map-style data set
                num_replicas=self.trainer.world_size,
                rank=self.trainer.global_rank,
                seed=self.seed,
            )
            # A resumed fit draws its first epoch's order before Lightning tells the sampler which.
            sampler.set_epoch(self.trainer.current_epoch)
            return sampler
        if self.balanced:
            labels = self.train_bags.labels
            count = Counter(labels)
            weights = [1 / count[label] for label in labels]
            return WeightedRandomSampler(weights, num_samples=len(weights))
        return RandomSampler(self.train_bags)

    def _loader(self, bags: BagSequence, *, sampler: Sampler[int] | None) -> DataLoader[Bag]:
        return DataLoader(
            bags,  # type: ignore[arg-type]  # a sequence is a map-style data set
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate_bags,
        )


class ClassicDataModule(BagDataModule):
    """One fold of a classic data set, standardized by its training bags.

    Args:
        name: A key of ``CLASSIC``.
        fold: The test fold, from 0.
        n_folds: Number of folds.
        val_fraction: Share of the bags outside the test fold that goes to validation.
        batch_size: Bags per batch.
        balanced: Draw training bags so that all classes are equally frequent.
        num_workers: Worker processes per loader.
        seed: Seed of the folds, and of the split over processes.
    """

    name: str

    def __init__(
        self,
        name: str,
        *,
        fold: int = 0,
        n_folds: int = 10,
        val_fraction: float = 0.2,
        batch_size: int = 1,
        balanced: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, balanced=balanced, num_workers=num_workers, seed=seed
        )
        self.name = name
        self.fold = fold
        self.n_folds = n_folds
        self.val_fraction = val_fraction

    @override
    def setup(self, stage: str) -> None:
        # The Trainer calls this before every stage.
        if self.train_bags:
            return
        bags = load_classic(self.name)
        split = stratified_fold(
            [bag.label for bag in bags],
            n_folds=self.n_folds,
            fold=self.fold,
            val_fraction=self.val_fraction,
            seed=self.seed,
        )
        standardize = Standardizer.fit([bags[index] for index in split.train])
        self.train_bags = BagList([standardize(bags[index]) for index in split.train])
        self.val_bags = BagList([standardize(bags[index]) for index in split.val])
        self.test_bags = BagList([standardize(bags[index]) for index in split.test])
        super().setup(stage)


def _as_sequence(bags: Sequence[Bag]) -> BagSequence:
    return bags if isinstance(bags, BagSequence) else BagList(bags)
