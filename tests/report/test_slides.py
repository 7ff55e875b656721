import base64
import io
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from mil_anchor.maps.file import read_map
from mil_anchor.report import slides as module
from mil_anchor.report.slides import color_stops, slides
from mil_anchor.results import read_runs
from tests.report.run_folders import N_EPOCHS, write_map, write_run

SIDE = 5


def _pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGBA"))


def test_slides__two_plugins__have_a_panel_each_of_the_slides_both_have_kept(tmp_path, caplog):
    write_run(tmp_path, slides=["a", "b"])
    write_run(tmp_path, plugin="anchor", slides=["b", "c"])

    (slide,) = slides(read_runs(tmp_path)).shown

    assert not caplog.records
    assert (slide["bag"], slide["data"], slide["model"], slide["seed"]) == (
        "b",
        "synthetic",
        "abmil",
        0,
    )
    assert [panel["plugin"] for panel in slide["panels"]] == ["anchor", "none"]
    assert slide["epochs"] == list(range(N_EPOCHS))
    for panel in slide["panels"]:
        assert {scale: len(own) for scale, own in panel["images"].items()} == {
            "percentile": N_EPOCHS,
            "log": N_EPOCHS,
        }


def test_slides__picture__ranks_the_tiles_and_leaves_holes_clear(tmp_path):
    folder = write_run(tmp_path)
    slide_map = read_map(folder / "attention.h5", "slide_a")

    (slide,) = slides(read_runs(tmp_path)).shown

    pixels = _pixels(slide["panels"][0]["images"]["percentile"][2])
    attention = slide_map.attention(2)
    column, row = (slide_map.coords.xy[attention.argmax()] // 256).tolist()
    assert pixels.shape == (SIDE, SIDE, 4)
    assert (pixels[..., 3] == 255).all()
    # Tiles of 25: the highest has the percentile 98.
    wanted = np.array(colormaps["viridis"](0.98, bytes=True)[:3]).astype(int)
    assert np.abs(pixels[row, column, :3].astype(int) - wanted).max() <= 3
    assert slide["panels"][0]["largest"][2] == pytest.approx(attention.max().item(), rel=1e-3)


def test_slides__tiles_with_a_hole__are_transparent_there(tmp_path, monkeypatch):
    folder = write_run(tmp_path, keeps=())
    full = torch.cartesian_prod
    monkeypatch.setattr(torch, "cartesian_prod", lambda *axes: full(*axes).roll(1, 0) * 2)
    write_map(folder, "holes", generator=torch.Generator(), side=2)

    (slide,) = slides(read_runs(tmp_path)).shown

    clear = _pixels(slide["panels"][0]["images"]["log"][0])[..., 3] == 0
    assert clear.tolist() == [[False, True, False], [True] * 3, [False, True, False]]


def test_slides__log_scale__is_one_for_all_panels_and_epochs(tmp_path):
    folder = write_run(tmp_path)
    other = write_run(tmp_path, plugin="anchor")
    (slide,) = slides(read_runs(tmp_path)).shown

    of_color: dict[bytes, list[float]] = {}
    for panel, run in zip(slide["panels"], (other, folder), strict=True):
        slide_map = read_map(run / "attention.h5", "slide_a")
        for epoch, image in enumerate(panel["images"]["log"]):
            pixels = _pixels(image)
            for (x, y), weight in zip(
                (slide_map.coords.xy // 256).tolist(), slide_map.attention(epoch), strict=True
            ):
                of_color.setdefault(pixels[y, x].tobytes(), []).append(float(weight))

    spans = sorted((min(weights), max(weights)) for weights in of_color.values())
    assert len(spans) > 50
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


def test_slides__known_tiles__are_outlined(tmp_path):
    write_run(tmp_path, keeps=())
    folder = write_run(tmp_path, seed=1)

    (slide,) = slides(read_runs(tmp_path)).shown

    assert slide["seed"] == 1
    assert folder.exists()
    edges = {frozenset(edge.split("L")) for edge in slide["outline"].split("M")[1:]}
    corners = ["1 1", "2 1", "2 2", "1 2"]
    assert edges == {frozenset((corners[i], corners[(i + 1) % 4])) for i in range(4)}


def test_slides__too_many__are_counted_and_every_data_set_keeps_its_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_SLIDES", 3)
    for data in ("one", "two"):
        for seed in (0, 1):
            write_run(tmp_path, data=data, seed=seed, slides=["a", "b"])

    drawn = slides(read_runs(tmp_path))

    names = [(slide["data"], slide["seed"], slide["bag"]) for slide in drawn.shown]
    assert names == [("one", 0, "a"), ("two", 0, "a"), ("one", 0, "b")]
    assert drawn.n_left_out == 5


def test_slides__too_many_bytes__are_left_out_but_not_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_BYTES", 1)
    write_run(tmp_path, slides=["a", "b"])

    drawn = slides(read_runs(tmp_path))

    assert [slide["bag"] for slide in drawn.shown] == ["a"]
    assert drawn.n_left_out == 1


def test_slides__long_training__shows_some_epochs_with_both_ends(tmp_path):
    folder = write_run(tmp_path, keeps=())
    write_map(folder, "long", generator=torch.Generator(), n_epochs=70, side=2)

    (slide,) = slides(read_runs(tmp_path)).shown

    assert len(slide["epochs"]) == len(slide["panels"][0]["largest"]) == 20
    assert (slide["epochs"][0], slide["epochs"][-1]) == (0, 69)


def test_slides__file_that_cannot_be_read__is_a_warning(tmp_path, caplog):
    folder = write_run(tmp_path)
    write_run(tmp_path, plugin="anchor")
    (folder / "attention.h5").write_bytes(b"no HDF5")

    with caplog.at_level(logging.WARNING):
        (slide,) = slides(read_runs(tmp_path)).shown

    assert [panel["plugin"] for panel in slide["panels"]] == ["anchor"]
    assert "cannot be read" in caplog.text


def test_slides__other_tiles_of_one_slide__are_not_compared(tmp_path, caplog):
    write_run(tmp_path, slides=["other", "same"])
    folder = write_run(tmp_path, plugin="anchor", keeps=())
    generator = torch.Generator()
    write_map(folder, "other", generator=generator, side=4)
    write_map(folder, "same", generator=generator)

    with caplog.at_level(logging.WARNING):
        drawn = slides(read_runs(tmp_path))

    assert [slide["bag"] for slide in drawn.shown] == ["same"]
    assert "must show the same tiles" in caplog.text


def test_color_stops__span_the_maps_colors():
    stops = color_stops()
    assert stops[0] == "#440154"
    assert stops[-1] == "#fde725"
