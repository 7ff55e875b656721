import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.data.bags import MicrometreCoords, PixelCoords
from mil_anchor.maps.grid import TileGrid

_CELLS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=1, max_size=40)


def _grid(cells, *, pitch=1.0, start=(0.0, 0.0)):
    xy = torch.tensor(cells, dtype=torch.float64) * pitch + torch.tensor(start)
    return TileGrid(MicrometreCoords(xy, pitch))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    _CELLS,
    st.floats(0.1, 1000),
    st.tuples(st.floats(-1e4, 1e5), st.floats(-1e4, 1e5)),
    st.sampled_from([-0.499, -0.2, 0.0, 0.2, 0.499]),
)
def test_tile_grid__any_tiles__lie_in_their_nearest_cell(cells, pitch, start, off):
    # One tile marks the corner; others are off the grid by less than half a pitch, but not over it.
    cells = [(0, 0), *cells]
    xy = torch.tensor(cells, dtype=torch.float64) * pitch + torch.tensor(start)
    xy += off * pitch * (torch.tensor(cells) > 0)
    values = torch.rand(len(cells), generator=torch.Generator().manual_seed(len(cells)))
    grid = TileGrid(MicrometreCoords(xy, pitch))

    naive = {}
    for (column, row), value in zip(cells, values.tolist(), strict=True):
        naive[row, column] = max(value, naive.get((row, column), 0))
    picture = grid.picture(values)
    assert picture.shape == grid.shape == tuple(max(axis) + 1 for axis in zip(*naive, strict=True))
    for place in np.ndindex(picture.shape):
        assert picture[place] == naive[place] if place in naive else np.isnan(picture[place])
    left, right, bottom, top = grid.extent
    assert [left, top] == pytest.approx(xy[0].tolist())
    assert right - left == pytest.approx(picture.shape[1] * pitch)
    assert bottom - top == pytest.approx(picture.shape[0] * pitch)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(_CELLS, st.integers(0, 2**31))
def test_tile_grid__borders__are_the_edges_between_unequal_cells(cells, seed):
    cells = list(dict.fromkeys([(0, 0), *cells]))
    group = torch.randint(0, 3, (len(cells),), generator=torch.Generator().manual_seed(seed))
    of_cell = dict(zip(cells, group.tolist(), strict=True))
    edges = _grid(cells, pitch=2.0, start=(10.0, 20.0)).borders(group)

    naive = set()
    for column in range(-1, 13):
        for row in range(-1, 10):
            own = of_cell.get((column, row), 0)
            x, y = 10 + 2 * column, 20 + 2 * row
            if own != of_cell.get((column + 1, row), 0):
                naive.add((x + 2, y, x + 2, y + 2))
            if own != of_cell.get((column, row + 1), 0):
                naive.add((x, y + 2, x + 2, y + 2))
    assert len(edges) == len(naive)
    assert {tuple(edge.ravel().tolist()) for edge in edges} == naive


def test_tile_grid__no_group__has_no_border():
    assert _grid([(0, 0), (1, 0)]).borders(torch.tensor([0, 0])).shape == (0, 2, 2)


def test_tile_grid__integer_pixels__are_read():
    coords = PixelCoords(torch.tensor([[1024, 512], [1280, 512]], dtype=torch.int32), 256.0)
    grid = TileGrid(coords)
    assert grid.shape == (1, 2)
    assert grid.extent == (1024, 1536, 768, 512)


def test_tile_grid__pitch_in_the_wrong_unit__is_refused():
    coords = PixelCoords(torch.tensor([[0, 0], [90_000, 60_000]]), 0.5)
    with pytest.raises(ValueError, match=r"a pitch of 0\.5 px makes 180,001 x 120,001"):
        TileGrid(coords)
