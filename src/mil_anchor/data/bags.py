"""What a bag and a batch are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, TypedDict, overload

import torch
from jaxtyping import Bool, Float, Float32, Int, Int64, Num
from torch import Tensor
from typing_extensions import NotRequired, override


@dataclass(frozen=True, eq=False)
class TileCoords:
    """Where the tiles of a slide lie. Use one of its kinds, which say in what unit.

    Args:
        xy: Top left corner (x, y) of every tile; x runs to the right and y down.
        pitch: Distance between the corners of neighbouring tiles.

    Raises:
        ValueError: If the pitch is not above 0.
    """

    unit: ClassVar[str]

    xy: Num[Tensor, "position 2"]
    pitch: float

    def __post_init__(self) -> None:
        """Refuse a grid without a size."""
        if not 0 < self.pitch < float("inf"):
            raise ValueError(
                f"The pitch of tiles must be a number above 0, but got {self.pitch}. Give the "
                "distance between the corners of neighbouring tiles."
            )

    def __len__(self) -> int:
        return len(self.xy)


class PixelCoords(TileCoords):
    """Tile corners and pitch in level-0 pixels of the slide."""

    unit = "px"


class MicrometreCoords(TileCoords):
    """Tile corners and pitch in micrometres."""

    unit = "um"


UNITS = MappingProxyType({kind.unit: kind for kind in (PixelCoords, MicrometreCoords)})


# Two bags are equal when they are the same object: comparing tensors has no single truth value.
@dataclass(frozen=True, eq=False)
class Bag:
    """One labelled set of instances, checked on construction.

    Args:
        features: Finite float32 features, at least one instance.
        label: Class index of the bag, from 0.
        bag_id: Name that errors and result files use.
        coords: Where every instance lies, in level-0 pixels or in micrometres.
        instance_label: Class index of every instance, -1 where it is unknown.
        lesion: Which lesion of the bag every instance belongs to, from 1; 0 for none.

    Raises:
        ValueError: If a bag without instances, a value that is not finite, a dtype other than
            float32, a negative label or an entry of another length came.
    """

    features: Float[Tensor, "instance width"]
    label: int
    bag_id: str
    coords: TileCoords | None = None
    instance_label: Int[Tensor, " annotation"] | None = None
    lesion: Int[Tensor, " annotated"] | None = None

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
        column = column_not_finite(self.features)
        if column is not None:
            raise ValueError(
                f"Features must be finite, but bag {self.bag_id!r} holds NaN or infinity in column "
                f"{column}. Extract its features again, or drop the bag."
            )
        if self.label < 0:
            raise ValueError(
                f"A bag label must be a class index from 0, but bag {self.bag_id!r} has "
                f"{self.label}. Map the labels to 0, 1, ... and drop bags without one."
            )
        for name in ("coords", "instance_label", "lesion"):
            entry = getattr(self, name)
            if entry is not None and len(entry) != len(self.features):
                raise ValueError(
                    f"{name} must have one entry per instance, but bag {self.bag_id!r} has "
                    f"{len(entry)} for {len(self.features)} instances. Read both from one file."
                )


class BagSequence(Sequence[Bag], ABC):
    """Bags that may lie on a disk: ids, labels and width are known without reading them."""

    @property
    @abstractmethod
    def bag_ids(self) -> list[str]:
        """Name of every bag."""

    @property
    @abstractmethod
    def labels(self) -> list[int]:
        """Class index of every bag."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Feature width of the bags.

        Raises:
            ValueError: If the bags differ in width.
        """

    @abstractmethod
    def read(self, index: int) -> Bag:
        """The bag at an index from 0."""

    @override
    def __len__(self) -> int:
        return len(self.bag_ids)

    @overload
    def __getitem__(self, index: int) -> Bag: ...
    @overload
    def __getitem__(self, index: slice) -> list[Bag]: ...
    @override
    def __getitem__(self, index: int | slice) -> Bag | list[Bag]:
        if isinstance(index, slice):
            return [self.read(position) for position in range(len(self))[index]]
        return self.read(range(len(self))[index])


class BagList(BagSequence):
    """Bags in memory.

    Args:
        bags: The bags.
    """

    def __init__(self, bags: Sequence[Bag] = ()) -> None:
        self._bags = list(bags)

    @property
    @override
    def bag_ids(self) -> list[str]:
        return [bag.bag_id for bag in self._bags]

    @property
    @override
    def labels(self) -> list[int]:
        return [bag.label for bag in self._bags]

    @property
    @override
    def width(self) -> int:
        return shared_width(self._bags)

    @override
    def read(self, index: int) -> Bag:
        return self._bags[index]

    @override
    def __len__(self) -> int:
        return len(self._bags)


class Batch(TypedDict):
    """Bags of one width, padded to the longest. The mask is True where an instance is real."""

    features: Float32[Tensor, "bag instance width"]
    mask: Bool[Tensor, "bag instance"]
    label: Int64[Tensor, " bag"]
    bag_id: list[str]
    coords: NotRequired[Num[Tensor, "bag instance 2"]]
    pitch: NotRequired[list[float]]
    unit: NotRequired[list[str]]
    instance_label: NotRequired[Int[Tensor, "bag instance"]]
    lesion: NotRequired[Int[Tensor, "bag instance"]]


def collate_bags(bags: Sequence[Bag]) -> Batch:
    """Pad bags into a batch; a batch of one is a view, not a copy.

    Args:
        bags: At least one bag.

    Returns:
        The batch. Padding is 0, and -1 in ``instance_label``. ``coords`` (with their ``pitch`` and
        ``unit``), ``instance_label`` and ``lesion`` are there only if every bag has them.

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
        batch["coords"] = _pad([own.xy for own in coords], fill=0)
        batch["pitch"] = [float(own.pitch) for own in coords]
        batch["unit"] = [own.unit for own in coords]
    instance_label = [bag.instance_label for bag in bags if bag.instance_label is not None]
    if len(instance_label) == len(bags):
        batch["instance_label"] = _pad(instance_label, fill=-1)
    lesion = [bag.lesion for bag in bags if bag.lesion is not None]
    if len(lesion) == len(bags):
        batch["lesion"] = _pad(lesion, fill=0)
    return batch


def bags_of(batch: Batch) -> list[Bag]:
    """Take a batch apart again, on the CPU and without its padding: the inverse of `collate_bags`.

    Example:
        >>> batch = collate_bags([Bag(torch.ones(2, 5), 0, "a"), Bag(torch.ones(3, 5), 1, "b")])
        >>> [len(bag.features) for bag in bags_of(batch)]
        [2, 3]
    """
    bags = []
    for row, bag_id in enumerate(batch["bag_id"]):
        n_instances = int(batch["mask"][row].sum())  # padding stands at the end
        own: dict[str, Tensor] = {
            name: entry[row, :n_instances].cpu()
            for name, entry in batch.items()
            if name in ("features", "coords", "instance_label", "lesion")
            and isinstance(entry, Tensor)
        }
        xy = own.pop("coords", None)
        coords = None if xy is None else UNITS[batch["unit"][row]](xy, batch["pitch"][row])
        label = int(batch["label"][row])
        bags.append(Bag(own.pop("features"), label, bag_id, coords=coords, **own))
    return bags


def column_not_finite(features: Float[Tensor, "instance width"]) -> int | None:
    """The first column with NaN or infinity; None if all values are finite.

    Example:
        >>> column_not_finite(torch.tensor([[0.0, torch.inf]])), column_not_finite(torch.ones(2, 3))
        (1, None)
    """
    # Sums are 20 times cheaper than a look at each value; they may overflow, though, and one over
    # all float16 values often would.
    if features.sum(dim=1).isfinite().all():
        return None
    columns = (~features.isfinite()).any(dim=0).nonzero()
    return int(columns[0]) if len(columns) else None


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
