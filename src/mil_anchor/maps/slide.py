"""What is kept of a model's attention on one slide."""

from dataclasses import dataclass

from jaxtyping import Float16, Float32, Int
from torch import Tensor

from mil_anchor.data.bags import TileCoords


@dataclass(frozen=True, eq=False)
class SlideMap:
    """The attention on one bag in all kept epochs, and what is known of its instances.

    Args:
        bag_id: Name of the bag.
        label: Class index of the bag.
        part: "val" or "test".
        log_attention: Log-attention by epoch from 0; None: with the chosen checkpoint.
        coords: Where every instance lies.
        instance_label: Class index of every instance, -1 where it is unknown.
        lesion: Which lesion of the bag every instance belongs to, from 1; 0 for none.
    """

    bag_id: str
    label: int
    part: str
    log_attention: dict[int | None, Float16[Tensor, "row instance"]]
    coords: TileCoords | None = None
    instance_label: Int[Tensor, " instance"] | None = None
    lesion: Int[Tensor, " instance"] | None = None

    @property
    def epochs(self) -> list[int]:
        """The kept epochs, from 0."""
        return sorted(epoch for epoch in self.log_attention if epoch is not None)

    @property
    def n_rows(self) -> int:
        """Rows of the attention; 0 if none is kept yet."""
        return next((len(kept) for kept in self.log_attention.values()), 0)

    @property
    def has_best(self) -> bool:
        """Whether the attention with the chosen checkpoint is kept: the run is complete."""
        return None in self.log_attention

    @property
    def known_coords(self) -> TileCoords:
        """Where the instances lie.

        Raises:
            ValueError: That is not known.
        """
        if self.coords is None:
            raise ValueError(
                f"A map needs to know where the tiles lie, but bag {self.bag_id!r} came without "
                "coordinates. Use a store that keeps them, and run anew."
            )
        return self.coords

    def attention(self, epoch: int | None, row: int | None = None) -> Float32[Tensor, " instance"]:
        """The attention on every instance.

        Args:
            epoch: Epoch from 0; None: with the chosen checkpoint.
            row: A row (head, class branch) of the attention; None: the mean over rows.

        Returns:
            Attention that sums to one within 0.4 %.

        Raises:
            ValueError: The epoch is not kept, or there is no such row.
        """
        if epoch not in self.log_attention:
            wanted = "the chosen checkpoint" if epoch is None else f"epoch {epoch}"
            best = "and the chosen checkpoint" if self.has_best else "and no chosen checkpoint yet"
            raise ValueError(
                f"An epoch must be one of those kept of bag {self.bag_id!r}, but {wanted} came and "
                f"there are {self.epochs} {best}. Choose one of them."
            )
        weights = self.log_attention[epoch].float().exp()
        if row is None:
            return weights.mean(dim=0)
        if not 0 <= row < len(weights):
            raise ValueError(
                f"A row must be one of 0..{len(weights) - 1} of the attention on bag "
                f"{self.bag_id!r}, but {row} came. Choose one of them, or the mean over rows."
            )
        return weights[row]
