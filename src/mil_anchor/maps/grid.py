"""Tiles of a slide as cells of a picture."""

import numpy as np
from jaxtyping import Float64, Int, Num
from torch import Tensor

from mil_anchor.data.bags import TileCoords

# A pitch in the wrong unit would ask for a picture of many gigabytes.
_MAX_CELLS = 20_000_000


class TileGrid:
    """The cells, one pitch wide, in which the tiles of a slide lie.

    The grid begins at the left and upper ends of the tiles. A tile off the grid (as where every
    piece of tissue was cut into tiles by itself) belongs to the nearest cell.

    Args:
        coords: Where the tiles lie, at least one of them.

    Attributes:
        shape: Cells down and across.
        extent: Left, right, lower and upper end in the unit of the coordinates; y runs down.

    Raises:
        ValueError: The tiles lie so far apart that their pitch cannot be right.

    Example:
        >>> import torch
        >>> from mil_anchor.data.bags import PixelCoords
        >>> grid = TileGrid(PixelCoords(torch.tensor([[512, 0], [700, 300]]), 256.0))
        >>> grid.picture(torch.tensor([0.25, 0.75]))
        array([[0.25,  nan],
               [ nan, 0.75]])
        >>> grid.extent
        (512.0, 1024.0, 512.0, 0.0)
    """

    def __init__(self, coords: TileCoords) -> None:
        xy = coords.xy.double().numpy()
        origin = xy.min(axis=0)
        self.pitch = float(coords.pitch)
        # Half up, not to even: neighbours half a pitch off the grid stay neighbours.
        cells = np.floor((xy - origin) / self.pitch + 0.5)
        columns, rows = (cells.max(axis=0) + 1).tolist()
        if not columns * rows <= _MAX_CELLS:
            raise ValueError(
                f"The tiles of a slide must lie on a grid of at most {_MAX_CELLS:,} cells, but a "
                f"pitch of {self.pitch:g} {coords.unit} makes {columns:,.0f} x {rows:,.0f}. Check "
                "the pitch and the unit of the coordinates."
            )
        self._cells = tuple(cells.astype(np.int64).T[::-1])
        self.shape = (int(rows), int(columns))
        left, top = origin.tolist()
        right, bottom = left + columns * self.pitch, top + rows * self.pitch
        self.extent = (left, right, bottom, top)

    def picture(self, values: Num[Tensor, " instance"]) -> Float64[np.ndarray, "row column"]:
        """The value of every cell: the largest of its tiles; NaN where there is none."""
        picture = np.full(self.shape, np.nan)
        np.fmax.at(picture, self._cells, values.double().numpy())
        return picture

    def borders(self, group: Int[Tensor, " instance"]) -> Float64[np.ndarray, "edge 2 2"]:
        """Cell edges between groups of tiles: the outlines of the groups above 0.

        Args:
            group: Group of every tile, 0 for none.

        Returns:
            Ends (x, y) of every edge in the unit of the coordinates.
        """
        groups = np.pad(np.nan_to_num(self.picture(group)), 1)
        left, _, _, top = self.extent
        row, column = np.nonzero(groups[1:-1, 1:] != groups[1:-1, :-1])
        upright = np.stack([[column, row], [column, row + 1]])
        row, column = np.nonzero(groups[1:, 1:-1] != groups[:-1, 1:-1])
        level = np.stack([[column, row], [column + 1, row]])
        # From (end, xy, edge) to (edge, end, xy).
        edges = np.concatenate([upright, level], axis=2).transpose(2, 0, 1)
        ends: Float64[np.ndarray, "edge 2 2"] = edges * self.pitch + np.array([left, top])
        return ends
