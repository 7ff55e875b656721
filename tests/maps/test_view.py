from dataclasses import replace

import numpy as np
import pytest
import torch

from mil_anchor.data.bags import MicrometreCoords, PixelCoords
from mil_anchor.maps.slide import SlideMap
from mil_anchor.maps.thumbnail import Thumbnail
from mil_anchor.maps.view import view_slide


def _slide_map(n_instances=4, *, bag_id="a", coords=PixelCoords, **entries):
    """Tiles in a row."""
    xy = torch.stack([torch.arange(n_instances) * 100, torch.zeros(n_instances).long()], dim=1)
    log_attention = torch.zeros(1, n_instances).log_softmax(dim=1).half()
    return SlideMap(bag_id, 1, "test", {None: log_attention}, coords=coords(xy, 100.0), **entries)


def _image(side=100, **settings):
    return Thumbnail(np.zeros((side, side, 3), dtype=np.uint8), downsample=4.0, **settings)


@pytest.mark.parametrize(
    ("entries", "classes", "n_edges"),
    [
        ({}, None, 0),
        ({"instance_label": [0, 1, 1, -1]}, [0, 1, 1, -1], 6),
        ({"instance_label": [0, 1, 2, -1]}, [0, 1, 2, -1], 7),
        ({"lesion": [0, 1, 2, 2]}, [0, 1, 1, 1], 9),
        ({"instance_label": [0, 1, 1, 1], "lesion": [0, 1, 2, 0]}, [0, 1, 1, 1], 10),
        ({"instance_label": [0, 1, 2, 2], "lesion": [0, 1, 1, 2]}, [0, 1, 2, 2], 10),
        ({"instance_label": [-1, -1, -1, -1], "lesion": [0, 1, 1, 0]}, [-1, -1, -1, -1], 6),
    ],
)
def test_view_slide__annotation__gives_classes_and_outlines(entries, classes, n_edges):
    entries = {name: torch.tensor(values) for name, values in entries.items()}
    slide = view_slide([_slide_map(**entries)], None)
    assert (None if slide.classes is None else slide.classes.tolist()) == classes
    assert len(slide.edges) == n_edges


def test_view_slide__image__has_a_size_in_the_unit_of_the_tiles():
    assert view_slide([_slide_map()], None).image_size == (0, 0)
    assert view_slide([_slide_map()], _image()).image_size == (400, 400)
    slide = view_slide([_slide_map(1, coords=MicrometreCoords)], _image(mpp=0.5))
    assert slide.image_size == (200, 200)


def test_view_slide__tile_over_the_border_by_less_than_its_size__is_on_the_image():
    view_slide([_slide_map(5)], _image())
    with pytest.raises(ValueError, match=r"slide 'a' .* reach from \(0, 0\) to \(600, 100\)"):
        view_slide([_slide_map(6)], _image())


def test_view_slide__two_slides__are_refused():
    with pytest.raises(ValueError, match=r"one slide, but there are maps of \['a', 'b'\]"):
        view_slide([_slide_map(), _slide_map(bag_id="b")], None)


def test_view_slide__other_tiles__are_refused():
    with pytest.raises(ValueError, match=r"4 tiles every 100 px and with 5 tiles every 100 px"):
        view_slide([_slide_map(), _slide_map(5)], None)
    wider = replace(_slide_map(), coords=PixelCoords(_slide_map().coords.xy, 200.0))
    with pytest.raises(ValueError, match=r"4 tiles every 100 px and with 4 tiles every 200 px"):
        view_slide([_slide_map(), wider], None)
