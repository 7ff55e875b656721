import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mil_anchor.data.bags import MicrometreCoords
from mil_anchor.localization.detections import (
    AllTiles,
    Components,
    Detections,
    NonMaximumSuppression,
)

PITCH = 128.0
DETECTORS = [AllTiles(), NonMaximumSuppression(), Components()]


@st.composite
def _tiles(draw):
    """Scores on some cells of a grid; they tie, or not."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    cells = torch.cartesian_prod(torch.arange(width), torch.arange(height))
    kept = torch.randperm(len(cells), generator=generator)[: draw(st.integers(1, len(cells)))]
    scores = torch.randint(0, 5, (len(kept),), generator=generator).float()
    if draw(st.booleans()):
        scores += torch.rand(len(kept), generator=generator)
    return scores, MicrometreCoords(cells[kept] * PITCH, PITCH)


def _as_set(detections):
    return {
        (*xy, score) for xy, score in zip(detections.xy_um.tolist(), detections.scores, strict=True)
    }


def _pairs(scores, coords):
    return {
        (*xy, float(score))
        for xy, score in zip((coords.xy + PITCH / 2).tolist(), scores, strict=True)
    }


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_tiles())
def test_all_tiles__any_tiles__are_detected_at_their_centres(tiles):
    detections = AllTiles()(*tiles)
    assert len(detections.scores) == len(tiles[0])
    assert _as_set(detections) == _pairs(*tiles)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_tiles(), st.sampled_from([100.0, 128.0, 275, 500.0]))
def test_non_maximum_suppression__any_tiles__agrees_with_the_definition(tiles, radius):
    left = sorted(_pairs(*tiles), key=lambda tile: (-tile[2], tile[1], tile[0]))
    expected = set()
    while left:
        x, y, score = left[0]
        expected.add((x, y, score))
        left = [tile for tile in left if (tile[0] - x) ** 2 + (tile[1] - y) ** 2 > radius**2]
    assert _as_set(NonMaximumSuppression(radius_um=radius)(*tiles)) == expected


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_tiles(), st.sampled_from([0, 0.3, 0.5, 0.9]))
def test_components__tiles_of_one_grid__agree_with_labels_of_its_image(tiles, threshold):
    scores, coords = tiles
    columns, rows = (coords.xy / PITCH).long().T.numpy()
    image = np.full((9, 9), -np.inf)
    image[rows, columns] = scores.double().numpy()
    low, high = scores.double().aminmax()
    above = image > float(low + threshold * (high - low))
    labels, n_components = ndimage.label(above, structure=np.ones((3, 3)))
    detections = Components(threshold=threshold)(scores, coords)
    assert len(detections.scores) == n_components
    found = labels[tuple((detections.xy_um[:, ::-1] // PITCH).astype(int).T)]
    assert sorted(found) == list(range(1, n_components + 1))
    for label, score in zip(found, detections.scores, strict=True):
        assert score == image[labels == label].max()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(_tiles(), st.randoms(use_true_random=False), st.sampled_from(DETECTORS))
def test_detector__tiles_in_another_order__detects_the_same(tiles, random, detector):
    scores, coords = tiles
    order = random.sample(range(len(scores)), len(scores))
    shuffled = detector(scores[order], MicrometreCoords(coords.xy[order], PITCH))
    assert _as_set(shuffled) == _as_set(detector(scores, coords))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(_tiles(), st.sampled_from(DETECTORS))
def test_detector__scores_transformed__detects_the_same_places(tiles, detector):
    scores, coords = tiles
    # Float32 values, moved by powers of two in float64: nothing is rounded.
    moved = detector(4 * scores.double() - 8, coords)
    back = Detections(moved.scores / 4 + 2, moved.xy_um)
    assert _as_set(back) == _as_set(detector(scores, coords))


@pytest.mark.parametrize(("detector", "expected"), list(zip(DETECTORS, [9, 1, 0], strict=True)))
def test_detector__equal_scores__finds_all_one_in_a_radius_or_none(detector, expected):
    cells = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    # Nine tiles of 64 um: the first is within 181 um of all.
    detections = detector(torch.full((9,), 0.7), MicrometreCoords(64 * cells, 64.0))
    assert len(detections.scores) == expected


def test_components__pieces_on_shifted_grids__touch_within_half_a_pitch():
    near = MicrometreCoords(torch.tensor([[0.0, 0], [190, 60], [900, 0]]), PITCH)
    far = MicrometreCoords(torch.tensor([[0.0, 0], [200, 60], [900, 0]]), PITCH)
    scores = torch.tensor([0.9, 1.0, 0.0])
    assert Components()(scores, near).scores.tolist() == [1.0]
    assert sorted(Components()(scores, far).scores.round(3)) == [0.9, 1.0]


@pytest.mark.parametrize(
    ("detector", "text"),
    [
        (AllTiles(), "all tiles"),
        (NonMaximumSuppression(), "nms, radius 275 um"),
        (NonMaximumSuppression(radius_um=99.5), "nms, radius 99.5 um"),
        (Components(), "components above 0.5 of each slide's range"),
    ],
)
def test_detector__as_text__says_how(detector, text):
    assert str(detector) == text


@pytest.mark.parametrize("radius", [0, -1.0, float("inf"), float("nan")])
def test_non_maximum_suppression__radius_is_none__is_refused(radius):
    with pytest.raises(ValueError, match=f"radius_um must be a number above 0, but {radius} came"):
        NonMaximumSuppression(radius_um=radius)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_components__threshold_out_of_range__is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\), but .* came"):
        Components(threshold=threshold)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_detections__value_not_finite__is_refused(value):
    with pytest.raises(ValueError, match="must be finite, but NaN or infinity came"):
        Detections(np.array([0.5, value]), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="must be finite, but NaN or infinity came"):
        Detections(np.zeros(1), np.array([[value, 0.0]]))


def test_detections__other_lengths__are_refused():
    with pytest.raises(ValueError, match="2 scores and 3 positions came"):
        Detections(np.zeros(2), np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("detector", "module"),
    [
        (NonMaximumSuppression(), "scipy.spatial"),
        (Components(), "scipy.sparse"),
        (Components(), "scipy.sparse.csgraph"),
    ],
)
def test_detector__scipy_missing__names_the_extra(monkeypatch, detector, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"scipy.*install 'mil_anchor\[localization\]'"):
        detector(torch.tensor([0.0, 1.0]), MicrometreCoords(torch.zeros(2, 2), PITCH))
