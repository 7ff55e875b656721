import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.data.stores.pitch import grid_pitch
from tests.data.stores.layouts import grid

LONE = np.array([[700, 900]])


@pytest.mark.parametrize(
    ("attributes", "pitch"),
    [
        ({"patch_size_level0": 512, "patch_size": 256, "downsample": 9}, 512),
        ({"patch_size": 256, "downsample": 2.0}, 512),
        ({"patch_size": 256, "downsample": np.array([2.0, 2.0])}, 512),
        ({"patch_size_level0": "None", "patch_size": 256, "downsample": 4}, 1024),
        ({"patch_size_level0": 512, "patch_size": 256, "overlap": 64}, 384),
        ({"patch_size_level0": 512, "patch_size": 256, "overlap": "None"}, 512),
        ({"patch_size_level0": 512, "overlap": 64}, 448),
        ({"patch_size": 256}, None),
        ({"patch_size": 256, "patch_size_level0": "None", "downsample": "None"}, None),
        ({}, None),
    ],
)
def test_grid_pitch__one_tile__is_what_the_attributes_say(attributes, pitch):
    assert grid_pitch(LONE, attributes, unit="px") == pitch


def test_grid_pitch__micrometres__takes_no_attribute_in_pixels():
    said = {"tile_size_px": 224, "patch_size_level0": 512}
    assert grid_pitch(LONE.astype(float), said, unit="um") is None
    assert grid_pitch(LONE.astype(float), said | {"tile_size_um": 256.0}, unit="um") == 256


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    pitch=st.integers(2, 2000),
    cells=st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=30, max_size=100),
    offset=st.integers(0, 5000),
    seed=st.integers(0, 99),
)
def test_grid_pitch__tissue_on_one_grid__is_the_smallest_difference(pitch, cells, offset, seed):
    xy = offset + pitch * np.random.default_rng(seed).permutation(sorted(cells))
    naive = min(np.diff(np.unique(xy[:, axis])).min() for axis in (0, 1))
    assert grid_pitch(xy, {}, unit="px") == naive == pitch


def test_grid_pitch__few_tiles_far_apart__is_the_smallest_difference():
    xy = 256 * np.array([[0, 0], [3, 0], [1, 5], [7, 2]])
    assert grid_pitch(xy, {}, unit="px") == 256


def test_grid_pitch__regions_with_a_grid_each__is_not_the_distance_of_the_grids():
    xy = np.concatenate([grid(12, step=256), grid(12, step=256) + np.array([5001, 3003])])
    assert grid_pitch(xy, {}, unit="px") == 256


@pytest.mark.parametrize("step", [256, 448, 768])
def test_grid_pitch__most_tiles_contradict_the_attributes__is_what_the_tiles_show(step):
    said = {"patch_size_level0": 512, "patch_size": 256, "overlap": 0}
    assert grid_pitch(grid(12, step=step), said, unit="px") == step


def test_grid_pitch__overlap_meant_in_level_0_pixels__is_what_the_tiles_show():
    said = {"patch_size_level0": 512, "patch_size": 256, "overlap": 64}
    assert grid_pitch(grid(12, step=384), said, unit="px") == 384
    assert grid_pitch(grid(12, step=448), said, unit="px") == 448


@pytest.mark.parametrize(
    "xy",
    [
        np.array([[0, 0], [1536, 0]]),
        np.array([[0, 0], [1024, 0], [0, 1024], [1024, 1024]]),
        np.array([[0, 0], [37, 9]]),
    ],
)
def test_grid_pitch__holes_or_few_tiles__leave_what_the_attributes_say(xy):
    assert grid_pitch(xy, {"patch_size_level0": 512}, unit="px") == 512


def test_grid_pitch__corners_rounded_to_pixels__leave_what_the_attributes_say():
    xy = np.rint(grid(60, step=505.6, columns=10)).astype(int)
    assert grid_pitch(xy, {"patch_size_level0": 505.6}, unit="px") == 505.6


def test_grid_pitch__micrometres_with_rounding_noise__is_the_step():
    noise = np.random.default_rng(0).normal(0, 1e-4, (30, 2))
    assert grid_pitch(grid(30, step=224.5) + noise, {}, unit="um") == pytest.approx(224.5, abs=0.02)


def test_grid_pitch__all_tiles_in_one_place__is_unknown():
    assert grid_pitch(np.zeros((4, 2), int), {}, unit="px") is None
