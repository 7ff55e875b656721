from dataclasses import replace

import numpy as np
import pytest

from mil_anchor.data.synthetic import PRESETS
from mil_anchor.data.synthetic.world import World

_ALIKE = {"centre_gain": 0.0, "centre_offset": 0.0}


def _world(preset="bracs_like", *, width=100, **changed):
    return World(replace(PRESETS[preset], **changed), width, generator=np.random.default_rng(0))


def _mixing(world, centre=0):
    width = world.type_mean.shape[1]
    origin = world.features(np.zeros((1, width), dtype=np.float32), centre=centre)
    return world.features(np.eye(width, dtype=np.float32), centre=centre) - origin


def test_world__centres_alike__has_a_power_law_spectrum_of_mean_one():
    mixing = _mixing(_world(**_ALIKE)).astype(np.float64)
    variances = np.linalg.eigvalsh(mixing.T @ mixing)[::-1]
    expected = 1 / np.arange(1, 101)
    np.testing.assert_allclose(variances, expected / expected.mean(), rtol=1e-4)


def test_world__features__are_rotated_out_of_the_components():
    covariance = np.cov(_mixing(_world(**_ALIKE)), rowvar=False)
    columns = np.sqrt(np.diag(covariance))
    correlation = covariance / columns[:, None] / columns
    assert abs(correlation[np.triu_indices(100, 1)]).mean() > 0.1


def test_world__lesions__are_unit_directions_in_their_band():
    world = _world()
    assert world.lesion.shape == (2, 3, 100)
    for directions in (world.lesion, world.mimic):
        np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, atol=1e-6)
        used = np.flatnonzero(abs(directions).max(axis=(0, 1)))
        assert (used.min(), used.max()) == (1, 11)  # 1.5 % to 12 % of 100 components


def test_world__grades_and_mimics__lie_at_their_cosines():
    world = _world()
    grades = (world.lesion[0] * world.lesion[1]).sum(axis=-1)
    np.testing.assert_allclose(grades, 0.6, atol=1e-6)
    np.testing.assert_allclose((world.lesion * world.mimic).sum(axis=-1), 0.75, atol=1e-6)


@pytest.mark.parametrize("width", [8, 32, 384])
def test_world__variants__differ_at_any_width(width):
    variants = _world(width=width).lesion[0]
    cosines = (variants @ variants.T)[np.triu_indices(3, 1)]
    assert (abs(cosines) < 0.95).all()


def test_world__centres__differ_in_gain_and_offset():
    world = _world()
    origin = np.zeros((1, 100), dtype=np.float32)
    offsets = np.concatenate([world.features(origin, centre=centre) for centre in range(4)])
    # Mean variance 1 x 0.3 squared.
    assert 0.06 < offsets.var() < 0.12
    gains = np.log(_mixing(world, 0) / _mixing(world, 1))
    np.testing.assert_allclose(gains, np.broadcast_to(gains[0], gains.shape), atol=1e-2)
    assert 0.12 < gains[0].std() / 2**0.5 < 0.18  # a difference of two centres


def test_world__centres_alike__give_the_same_features():
    world = _world(**_ALIKE)
    components = np.random.default_rng(1).standard_normal((5, 100), dtype=np.float32)
    np.testing.assert_array_equal(
        world.features(components, centre=0), world.features(components, centre=3)
    )
