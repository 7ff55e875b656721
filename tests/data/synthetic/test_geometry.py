import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mil_anchor.data.synthetic.geometry import (
    draw_clusters,
    draw_coverage,
    draw_tissue,
    draw_types,
    number_regions,
    smooth_fields,
)

_EIGHT = np.ones((3, 3))


@st.composite
def _masks(draw):
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    share = draw(st.floats(0, 1))
    return np.random.default_rng(draw(st.integers(0, 99))).random(shape) < share


@pytest.mark.parametrize("length", [1.0, 2.5, 6.0])
def test_smooth_fields__many_draws__have_the_stated_correlation(length):
    fields = smooth_fields(np.random.default_rng(0), (7, 9), n_fields=20_000, length=length)
    flat = fields.reshape(-1, 20_000).astype(np.float64)
    row, column = np.indices((7, 9)).reshape(2, -1)
    square = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    expected = np.exp(-square / (2 * length**2))
    np.testing.assert_allclose(flat @ flat.T / 20_000, expected, atol=0.04)
    assert abs(flat.mean(axis=1)).max() < 0.03


@settings(derandomize=True, deadline=None, max_examples=30)
@given(n_cells=st.integers(1, 900), seed=st.integers(0, 99))
def test_draw_tissue__any_size__has_exactly_that_many_cells(n_cells, seed):
    assert draw_tissue(np.random.default_rng(seed), n_cells).sum() == n_cells


def test_draw_types__many_slides__have_the_drawn_shares():
    observed, drawn = [], []
    for seed in range(300):
        types = draw_types(np.random.default_rng(seed), (20, 20), n_types=6)
        observed.append(np.bincount(types.ravel(), minlength=6) / types.size)
        drawn.append(np.random.default_rng(seed).dirichlet(np.ones(6)))  # the first draw
    by_share = np.argsort(drawn, axis=1)
    observed = np.take_along_axis(np.array(observed), by_share, axis=1).mean(axis=0)
    np.testing.assert_allclose(observed, np.sort(drawn, axis=1).mean(axis=0), atol=0.02)


def test_draw_types__one_slide__lie_in_patches():
    same = []
    for seed in range(20):
        types = draw_types(np.random.default_rng(seed), (40, 40), n_types=6)
        same.append(((types[1:] == types[:-1]).mean(), (types[20:] == types[:-20]).mean()))
    near, far = np.mean(same, axis=0)
    assert near > 0.85
    assert far < 0.6


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    allowed=_masks(), n_cells=st.integers(1, 90), n_foci=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_draw_clusters__any_room__fill_it_with_so_many_cells(allowed, n_cells, n_foci, seed):
    clusters = draw_clusters(np.random.default_rng(seed), allowed, n_cells=n_cells, n_foci=n_foci)
    assert not (clusters & ~allowed).any()
    assert clusters.sum() == min(n_cells, allowed.sum())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(n_cells=st.integers(1, 200), n_foci=st.integers(1, 5), seed=st.integers(0, 99))
def test_draw_clusters__open_ground__are_connected_around_their_foci(n_cells, n_foci, seed):
    clusters = draw_clusters(
        np.random.default_rng(seed), np.full((30, 30), True), n_cells=n_cells, n_foci=n_foci
    )
    assert 1 <= ndimage.label(clusters, _EIGHT)[1] <= n_foci


def test_draw_clusters__one_focus__is_compact_but_no_disc():
    filled = []
    for seed in range(20):
        cells = np.argwhere(
            draw_clusters(
                np.random.default_rng(seed), np.full((60, 60), True), n_cells=300, n_foci=1
            )
        )
        # The second moment of a region of that area is smallest, area / (2 pi), for a disc.
        filled.append(300 / (2 * np.pi) / cells.var(axis=0).sum())
    assert 0.5 < np.mean(filled) < 0.97


@settings(derandomize=True, deadline=None, max_examples=100)
@given(mask=_masks())
def test_number_regions__any_mask__agrees_with_scipy(mask):
    np.testing.assert_array_equal(number_regions(mask), ndimage.label(mask, _EIGHT)[0])


@settings(derandomize=True, deadline=None, max_examples=50)
@given(mask=_masks(), seed=st.integers(0, 99))
def test_draw_coverage__any_mask__is_whole_inside_and_partial_at_the_rim(mask, seed):
    coverage = draw_coverage(np.random.default_rng(seed), mask)
    np.testing.assert_array_equal(coverage > 0, mask)
    inside = ndimage.binary_erosion(mask)
    assert (coverage[inside] == 1).all()
    rim = coverage[mask & ~inside]
    assert ((rim >= 0.3) & (rim < 1)).all()
