"""Features on one scale, by the statistics of the training bags alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from mil_anchor.data.bags import Bag, shared_width


@dataclass(frozen=True, eq=False)
class Standardizer:
    """Maps a bag's features to ``(features - mean) / scale``.

    Args:
        mean: Mean of every column.
        scale: Standard deviation of every column, 1 where the column is constant.
    """

    mean: Float64[Tensor, " width"]
    scale: Float64[Tensor, " width"]

    @classmethod
    def fit(cls, bags: Sequence[Bag]) -> "Standardizer":
        """Measure mean and standard deviation over all instances of the training bags.

        Args:
            bags: The training bags; validation and test bags must stay out.

        Returns:
            The standardizer. It maps a column that is constant in training to exactly 0 there.

        Raises:
            ValueError: If the bags differ in width.
        """
        shared_width(bags)
        instances = torch.cat([bag.features for bag in bags]).double()
        sd, mean = torch.std_mean(instances, dim=0, correction=0)
        # A constant column has exactly sd 0: the float64 sum of equal float32 values is exact.
        return cls(mean=mean, scale=sd.where(sd > 0, 1.0))

    def __call__(self, bag: Bag) -> Bag:
        """Standardize one bag.

        Args:
            bag: A bag of the training bags' width.

        Returns:
            The bag with other features and all else kept.

        Raises:
            ValueError: If the bag has another width.
        """
        if bag.features.shape[1] != len(self.mean):
            raise ValueError(
                f"A bag must have the {len(self.mean)} columns of the training bags, but bag "
                f"{bag.bag_id!r} has {bag.features.shape[1]}. Use features of one encoder only."
            )
        return replace(bag, features=((bag.features.double() - self.mean) / self.scale).float())
