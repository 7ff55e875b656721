"""What a bag and a batch are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Float32, Int, Int64, Num
from torch import Tensor
from typing_extensions import NotRequired


# Two bags are equal when they are the same object: comparing tensors has no single truth value.
@dataclass(frozen=True, eq=False)
class Bag:
    """One labelled set of instances, checked on construction.

    Args:
        features: Finite float32 features, at least one instance.
        label: Class index of the bag, from 0.
        bag_id: Name that errors and result files use.
        coords: Position of every instance, in any unit.
        instance_label: Class index of every instance, -1 where it is unknown.

    Raises:
        ValueError: If a bag without instances, a value that is not finite, a dtype other than
            float32, a negative label or an entry of another length came.
    """

    features: Float[Tensor, "instance width"]
    label: int
    bag_id: str
    coords: Num[Tensor, "position 2"] | None = None
    instance_label: Int[Tensor, " annotation"] | None = None

    def __post_init__(self) -> None:
        """Refuse what would only fail, or silently spoil a result, later in training."""
        if self.features.dtype != torch.float32:
            raise ValueError(
                f"Features must be float32, but bag {self.bag_id!r} has {self.features.dtype}. "
                "Convert them with .float()."
            )
        if len(self.features) == 0:
            raise ValueError(
                f"Every bag needs at least one instance, but bag {self.bag_id!r} has none. "
                "Drop slides without tiles."
            )
        finite = self.features.isfinite()
        if not finite.all():
            column = int((~finite).any(dim=0).nonzero()[0])
            raise ValueError(
                f"Features must be finite, but bag {self.bag_id!r} holds NaN or infinity in column "
                f"{column}. Extract its features again, or drop the bag."
            )
        if self.label < 0:
            raise ValueError(
                f"A bag label must be a class index from 0, but bag {self.bag_id!r} has "
                f"{self.label}. Map the labels to 0, 1, ... and drop bags without one."
            )
        for name, entry in (("coords", self.coords), ("instance_label", self.instance_label)):
            if entry is not None and len(entry) != len(self.features):
                raise ValueError(
                    f"{name} must have one entry per instance, but bag {self.bag_id!r} has "
                    f"{len(entry)} for {len(self.features)} instances. Read both from one file."
                )


class Batch(TypedDict):
    """Bags of one width, padded to the longest. The mask is True where an instance is real."""

    features: Float32[Tensor, "bag instance width"]
    mask: Bool[Tensor, "bag instance"]
    label: Int64[Tensor, " bag"]
    bag_id: list[str]
    coords: NotRequired[Num[Tensor, "bag instance 2"]]
    instance_label: NotRequired[Int[Tensor, "bag instance"]]


def collate_bags(bags: Sequence[Bag]) -> Batch:
    """Pad bags into a batch; a batch of one is a view, not a copy.

    Args:
        bags: At least one bag.

    Returns:
        The batch. Padding is 0, and -1 in ``instance_label``. ``coords`` and ``instance_label``
        are there only if every bag has them.

    Raises:
        ValueError: If the bags differ in width.

    Example:
        >>> batch = collate_bags([Bag(torch.ones(2, 5), 0, "a"), Bag(torch.ones(3, 5), 1, "b")])
        >>> batch["features"].shape, batch["mask"].sum(dim=1)
        (torch.Size([2, 3, 5]), tensor([2, 3]))
    """
    shared_width(bags)
    longest = max(len(bag.features) for bag in bags)
    lengths = torch.tensor([len(bag.features) for bag in bags])
    batch = Batch(
        features=_pad([bag.features for bag in bags], fill=0),
        mask=torch.arange(longest) < lengths.unsqueeze(1),
        label=torch.tensor([bag.label for bag in bags]),
        bag_id=[bag.bag_id for bag in bags],
    )
    coords = [bag.coords for bag in bags if bag.coords is not None]
    if len(coords) == len(bags):
        batch["coords"] = _pad(coords, fill=0)
    instance_label = [bag.instance_label for bag in bags if bag.instance_label is not None]
    if len(instance_label) == len(bags):
        batch["instance_label"] = _pad(instance_label, fill=-1)
    return batch


def shared_width(bags: Sequence[Bag]) -> int:
    """The feature width that all bags have.

    Args:
        bags: At least one bag.

    Returns:
        The width.

    Raises:
        ValueError: If the bags differ in width; the message names bags of every width.
    """
    ids_of_width: dict[int, list[str]] = {}
    for bag in bags:
        ids_of_width.setdefault(bag.features.shape[1], []).append(bag.bag_id)
    if len(ids_of_width) > 1:
        found = ", ".join(f"{width} in {ids[:3]}" for width, ids in sorted(ids_of_width.items()))
        raise ValueError(
            f"All bags must have one feature width, but there are {found}. "
            "Use features of one encoder only."
        )
    return next(iter(ids_of_width))


def _pad(
    entries: Sequence[Num[Tensor, "_ *trailing"]], *, fill: int
) -> Num[Tensor, "bag instance *trailing"]:
    if len(entries) == 1:
        return entries[0].unsqueeze(0)
    return torch.nn.utils.rnn.pad_sequence(list(entries), batch_first=True, padding_value=fill)
