import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.data.stores.tiles import RawCoords, bag_shape, checked_bag, label_text


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9))
def test_bag_shape__bag_with_or_without_leading_axis__is_tiles_and_width(n_instances, width):
    for shape in ((n_instances, width), (1, n_instances, width)):
        assert bag_shape(shape, "s", source="s.h5") == (n_instances, width)


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 8), (2, 1, 8)])
def test_bag_shape__other_axes__are_refused(shape):
    with pytest.raises(ValueError, match=r"\(tiles, width\) or \(1, tiles, width\), but slide 's'"):
        bag_shape(shape, "s", source="s.h5")


def test_bag_shape__features_without_width__are_refused():
    with pytest.raises(ValueError, match=r"slide 's' has features of shape \(3, 0\) in s.h5"):
        bag_shape((3, 0), "s", source="s.h5")


def test_checked_bag__nothing_beside_the_features__is_a_bag_of_features():
    stored = checked_bag("s", torch.ones(1, 1, 4), coords=None, source="s.h5")
    assert stored.features.shape == (1, 4)
    assert stored.coords is None
    assert stored.instance_label is None


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3)])
def test_checked_bag__instance_labels_of_any_shape__are_one_per_tile(shape):
    stored = checked_bag(
        "s",
        torch.ones(3, 4),
        coords=None,
        annotation={"instance_label": np.array([0.0, 1.0, -1.0]).reshape(shape)},
        source="s.h5",
    )
    assert stored.instance_label.tolist() == [0, 1, -1]
    assert stored.instance_label.dtype == torch.int64


def test_checked_bag__centres__become_corners_on_whole_pixels():
    centres = np.array([[128, 128], [383, 128], [128, 383]])
    stored = checked_bag(
        "s", torch.ones(3, 4), coords=RawCoords(centres, centred=True), source="s.h5"
    )
    assert stored.coords.pitch == 255
    assert stored.coords.xy.tolist() == [[0, 0], [256, 0], [0, 256]]


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        (3, "3"),
        (np.int64(0), "0"),
        (np.array([[2]]), "2"),
        (1.0, "1"),
        (0.5, "0.5"),
        ("tumor", "tumor"),
        (b"tumor", "tumor"),
        (np.array([]), None),
        (np.array([1, 0]), None),
    ],
)
def test_label_text__stored_labels__are_text_if_they_are_one_value(stored, text):
    assert label_text(stored) == text
