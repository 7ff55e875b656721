import json
import uuid
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.data.bags import MicrometreCoords, PixelCoords
from mil_anchor.maps.file import SlideMap
from mil_anchor.maps.geojson import write_geojson


def _slide_map(n_instances=4, *, kind=PixelCoords, pitch=256.0, start=(0, 0), **entries):
    columns = torch.arange(n_instances)
    xy = torch.stack([columns % 3, columns // 3], dim=1) * pitch + torch.tensor(start)
    scores = torch.randn(2, n_instances, generator=torch.Generator().manual_seed(0))
    log_attention = scores.log_softmax(dim=1)
    return SlideMap(
        "a/1",
        1,
        "test",
        {None: log_attention.half(), 3: log_attention.flip(1).half()},
        **{"coords": kind(xy, pitch), **entries},
    )


def _features(slide_map, file, **arguments):
    write_geojson(slide_map, file, **arguments)
    content = json.loads(file.read_text())
    assert content["type"] == "FeatureCollection"
    return content["features"]


def _signed_area(ring):
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) / 2


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    st.integers(1, 20),
    st.floats(0.5, 5000),
    st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
)
def test_write_geojson__any_grid__keeps_the_rules_of_rfc_7946(
    tmp_path_factory, n_instances, pitch, start
):
    file = tmp_path_factory.mktemp("geojson") / "a.geojson"
    features = _features(_slide_map(n_instances, pitch=pitch, start=start), file)

    assert len(features) == n_instances
    assert len({uuid.UUID(feature["id"]) for feature in features}) == n_instances
    for feature in features:
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5
        assert ring[0] == ring[-1]
        assert _signed_area(ring) == pytest.approx(pitch**2, rel=1e-2)  # counter-clockwise


def test_write_geojson__tiles__carry_place_and_attention(tmp_path):
    slide_map = _slide_map(lesion=torch.tensor([0, 2, 0, 0]))
    features = _features(slide_map, tmp_path / "new" / "a.geojson", epoch=3, row=1)

    attention = slide_map.attention(3, row=1)
    assert [feature["properties"]["objectType"] for feature in features] == ["tile"] * 4
    measured = [feature["properties"]["measurements"] for feature in features]
    assert [values["attention"] for values in measured] == attention.tolist()
    assert [values["attention_x_n"] for values in measured] == [4 * a for a in attention.tolist()]
    assert [values["lesion"] for values in measured] == [0, 2, 0, 0]
    assert features[3]["geometry"]["coordinates"] == [
        [[0, 256], [256, 256], [256, 512], [0, 512], [0, 256]]
    ]


def test_write_geojson__instance_labels__become_classifications(tmp_path):
    labels = torch.tensor([0, 1, -1, 2])
    features = _features(_slide_map(instance_label=labels), tmp_path / "a.geojson")

    classes = [feature["properties"].get("classification") for feature in features]
    assert classes[2] is None
    assert [value["name"] for value in classes if value] == ["class 0", "class 1", "class 2"]
    colors = [tuple(value["color"]) for value in classes if value]
    assert len(set(colors)) == 3
    assert colors[1] == (0xD5, 0x5E, 0x00)


def test_write_geojson__only_lesions_known__marks_their_tiles(tmp_path):
    features = _features(_slide_map(lesion=torch.tensor([0, 2, 0, 1])), tmp_path / "a.geojson")
    names = [feature["properties"].get("classification", {}).get("name") for feature in features]
    assert names == [None, "lesion", None, "lesion"]


def test_write_geojson__nothing_known__has_no_classification(tmp_path):
    for feature in _features(_slide_map(), tmp_path / "a.geojson"):
        assert set(feature["properties"]) == {"objectType", "measurements"}
        assert set(feature["properties"]["measurements"]) == {"attention", "attention_x_n"}


def test_write_geojson__ids__repeat_for_the_same_map_and_for_no_other(tmp_path):
    def ids(**arguments):
        return {f["id"] for f in _features(_slide_map(), tmp_path / "a.geojson", **arguments)}

    assert ids(epoch=3) == ids(epoch=3)
    assert len(ids() | ids(epoch=3) | ids(row=0)) == 12


def test_write_geojson__ids_of_two_runs__do_not_collide(tmp_path):
    # QuPath holds the tiles of both on one image.
    one = _slide_map()
    other = replace(one, log_attention={None: one.log_attention[3]})
    ids = {f["id"] for m in (one, other) for f in _features(m, tmp_path / "a.geojson")}
    assert len(ids) == 8


def test_write_geojson__micrometres__become_level_0_pixels(tmp_path):
    slide_map = _slide_map(kind=MicrometreCoords, pitch=100.0)
    features = _features(slide_map, tmp_path / "a.geojson", mpp=0.25)
    assert features[1]["geometry"]["coordinates"][0][:3] == [[400, 0], [800, 0], [800, 400]]


@pytest.mark.parametrize("mpp", [None, 0.0, float("nan")])
def test_write_geojson__micrometres_without_mpp__is_refused(tmp_path, mpp):
    slide_map = _slide_map(kind=MicrometreCoords)
    with pytest.raises(ValueError, match=f"slide 'a/1', .* above 0, but mpp is {mpp}"):
        write_geojson(slide_map, tmp_path / "a.geojson", mpp=mpp)


def test_write_geojson__no_coordinates__is_refused(tmp_path):
    with pytest.raises(ValueError, match="bag 'a/1' came without coordinates"):
        write_geojson(_slide_map(coords=None), tmp_path / "a.geojson")
