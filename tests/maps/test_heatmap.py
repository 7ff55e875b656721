import json
import sys

import matplotlib.image
import numpy as np
import pytest
import tifffile
import torch

from mil_anchor.data.bags import Bag, MicrometreCoords, PixelCoords
from mil_anchor.maps import heatmap as heatmaps
from mil_anchor.maps.file import MapWriter
from mil_anchor.maps.heatmap import heatmap

_CONFIG = """\
names: {{model: {model}, plugin: {plugin}, data: camelyon16}}
seed: {seed}
data: {{fold: 0}}
"""


def _write_run(
    folder, *, model="abmil", plugin="none", seed=0, slide="a/1", best=True, coords=None
):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(_CONFIG.format(model=model, plugin=plugin, seed=seed))
    xy = torch.cartesian_prod(torch.arange(6), torch.arange(4)) * 128
    coords = PixelCoords(xy, 128.0) if coords is None else coords
    bag = Bag(torch.ones(24, 2), 1, slide, coords=coords)
    writer = MapWriter(folder / "attention.h5")
    writer.add_bag(bag, "test")
    for epoch in range(3):
        scores = torch.randn(2, 24, generator=torch.Generator().manual_seed(epoch))
        writer.add_epoch(slide, epoch, scores.log_softmax(dim=1))
    if best:
        writer.add_best(slide, scores.log_softmax(dim=1))
        (folder / "metrics.json").write_text(json.dumps({"best_epoch": 2}))
    return folder


@pytest.fixture
def sheets(monkeypatch):
    """What was drawn: the titles of all panels, and the settings."""
    drawn = []

    def draw(panels, file, **settings):
        drawn.append(([[panel.title for panel in row] for row in panels], file, settings))

    monkeypatch.setattr(heatmaps, "draw_sheet", draw)
    return drawn


def test_heatmap__one_run__draws_the_chosen_checkpoint_into_its_folder(tmp_path):
    folder = _write_run(tmp_path / "run", slide="slide_1")
    (file,) = heatmap([folder], "slide_1")
    assert file == folder / "heatmaps" / "slide_1.png"
    assert matplotlib.image.imread(file).shape[2] == 4


def test_heatmap__complete_run__names_the_chosen_epoch(tmp_path, sheets):
    heatmap([_write_run(tmp_path / "run")], "a/1")
    assert sheets[0][0] == [["abmil, best (epoch 2)"]]


def test_heatmap__run_that_goes_on__draws_the_last_epoch(tmp_path, sheets):
    heatmap([_write_run(tmp_path / "run", best=False)], "a/1")
    assert sheets[0][0] == [["abmil, epoch 2"]]


def test_heatmap__several_runs_and_epochs__are_rows_and_columns(tmp_path, sheets, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [
        _write_run(tmp_path / "one"),
        _write_run(tmp_path / "two", model="transmil", plugin="anchor_nsf"),
    ]
    (file,) = heatmap(runs, "a/1", epochs=[0, 2], scale="log")
    titles, drawn, settings = sheets[0]
    assert titles == [
        ["abmil, epoch 0", "abmil, epoch 2"],
        ["transmil + anchor_nsf, epoch 0", "transmil + anchor_nsf, epoch 2"],
    ]
    assert file == drawn
    assert file.parent.resolve() == tmp_path
    assert settings == {"scale": "log", "image": None, "mpp": None}


def test_heatmap__rows__have_a_line_of_panels_each(tmp_path, sheets):
    folder = _write_run(tmp_path / "run")
    heatmap([folder], "a/1", epochs=[0, 1], rows="all", out=tmp_path / "all.pdf")
    heatmap([folder], "a/1", epochs=[0], rows=[1])
    assert sheets[0][:2] == (
        [
            ["abmil, epoch 0, row 0", "abmil, epoch 1, row 0"],
            ["abmil, epoch 0, row 1", "abmil, epoch 1, row 1"],
        ],
        tmp_path / "all.pdf",
    )
    assert sheets[1][0] == [["abmil, epoch 0, row 1"]]


def test_heatmap__runs_of_one_cell__are_told_apart(tmp_path, sheets):
    seeds = [_write_run(tmp_path / f"seed={seed}", seed=seed) for seed in (0, 1)]
    heatmap(seeds, "a/1", out=tmp_path / "a.png")
    overridden = [_write_run(tmp_path / f"lr={lr}") for lr in (1, 2)]
    heatmap(overridden, "a/1", out=tmp_path / "a.png")
    assert [title for (title,) in sheets[0][0]] == [
        "abmil, seed 0, best (epoch 2)",
        "abmil, seed 1, best (epoch 2)",
    ]
    assert [title for (title,) in sheets[1][0]] == [
        "abmil, lr=1, best (epoch 2)",
        "abmil, lr=2, best (epoch 2)",
    ]


def test_heatmap__ids_that_are_no_file_names__stay_apart(tmp_path, sheets):
    ids = ["a/1", "a_1", "a 1", "..", ".", "é" * 300, "é" * 301, "x" * 300, "a.b-c"]
    files = [heatmap([_write_run(tmp_path / str(i), slide=s)], s)[0] for i, s in enumerate(ids)]
    names = [file.name for file in files]
    assert len(set(names)) == len(ids)
    assert names[1] == "a_1.png"
    assert names[-1] == "a.b-c.png"
    for file, run in zip(files, range(len(ids)), strict=True):
        assert file.resolve().parent == tmp_path / str(run) / "heatmaps"
        assert len(file.name.encode()) < 255
        assert not file.name.startswith(".")


def test_heatmap__image_and_geojson__use_the_slides_resolution(tmp_path):
    xy = torch.cartesian_prod(torch.arange(6), torch.arange(4)) * 64.0
    folder = _write_run(tmp_path / "run", coords=MicrometreCoords(xy, 64.0))
    with tifffile.TiffWriter(tmp_path / "slide.tif") as tiff:
        tiff.write(
            np.full((512, 768, 3), 230, dtype=np.uint8),
            tile=(128, 128),
            photometric="rgb",
            resolution=(20_000, 20_000),  # 0.5 um per pixel
            resolutionunit="CENTIMETER",
        )
    sheet, *exported = heatmap(
        [folder], "a/1", epochs=[0, 1], rows=[1], image=tmp_path / "slide.tif", geojson=True
    )
    assert sheet.exists()
    stem = sheet.stem
    assert [file.name for file in exported] == [
        f"{stem}_epoch0_row1.geojson",
        f"{stem}_epoch1_row1.geojson",
    ]
    last = json.loads(exported[0].read_text())["features"][-1]
    assert last["geometry"]["coordinates"][0][2] == pytest.approx([768, 512])


def test_heatmap__geojson_of_several_runs__lies_in_their_folders(tmp_path, sheets):
    runs = [_write_run(tmp_path / "one"), _write_run(tmp_path / "two", plugin="anchor")]
    _, *exported = heatmap(runs, "a/1", geojson=True, out=tmp_path / "sheet.png")
    assert [file.parent for file in exported] == [run / "heatmaps" for run in runs]
    assert exported[0].name.endswith("_best.geojson")


def test_heatmap__no_run__is_refused():
    with pytest.raises(ValueError, match="at least one run, but none came"):
        heatmap([], "a/1")


def test_heatmap__no_run_folder__is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold the config.yaml .*nowhere does not"):
        heatmap([tmp_path / "nowhere"], "a/1")


def test_heatmap__run_without_maps__is_refused(tmp_path):
    folder = _write_run(tmp_path / "run")
    (folder / "attention.h5").unlink()
    with pytest.raises(ValueError, match=r"run/attention.h5, but there is no such file"):
        heatmap([folder], "a/1")


def test_heatmap__unknown_slide__lists_the_kept_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'b' came and there are \['a/1'\]"):
        heatmap([_write_run(tmp_path / "run")], "b")


def test_heatmap__epoch_that_one_run_lacks__names_the_run(tmp_path):
    folder = _write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: An epoch must be .* epoch 7 came .* \[0, 1, 2\]"):
        heatmap([folder], "a/1", epochs=[0, 7])


def test_heatmaps__no_matplotlib__says_what_to_install(monkeypatch):
    for module in ("heatmap", "sheets", "colors"):
        monkeypatch.delitem(sys.modules, f"mil_anchor.maps.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[figures\]'"):
        __import__("mil_anchor.maps.heatmap")


@pytest.mark.parametrize(
    ("in_config", "given", "known"), [(None, None, None), (0.5, None, 0.5), (0.5, 0.25, 0.25)]
)
def test_heatmap__size_of_a_pixel__is_given_or_that_of_the_run(
    tmp_path, sheets, in_config, given, known
):
    folder = _write_run(tmp_path / "run")
    if in_config is not None:
        config = (folder / "config.yaml").read_text()
        config = config.replace("{fold: 0}", f"{{fold: 0, mpp: {in_config}}}")
        (folder / "config.yaml").write_text(config)
    heatmap([folder], "a/1", mpp=given)
    assert sheets[0][2]["mpp"] == known


def test_heatmap__micrometres_without_an_image__are_exported_with_the_given_size(tmp_path, sheets):
    xy = torch.cartesian_prod(torch.arange(6), torch.arange(4)) * 64.0
    folder = _write_run(tmp_path / "run", coords=MicrometreCoords(xy, 64.0))
    with pytest.raises(ValueError, match=r"but mpp is None\. Give the slide's image, or mpp"):
        heatmap([folder], "a/1", geojson=True)
    _, exported = heatmap([folder], "a/1", geojson=True, mpp=0.5)
    last = json.loads(exported.read_text())["features"][-1]
    assert last["geometry"]["coordinates"][0][2] == pytest.approx([768, 512])


def test_heatmap__image_without_resolution__is_placed_with_the_given_size(tmp_path):
    xy = torch.cartesian_prod(torch.arange(6), torch.arange(4)) * 64.0
    folder = _write_run(tmp_path / "run", coords=MicrometreCoords(xy, 64.0))
    image = tmp_path / "slide.tif"
    with tifffile.TiffWriter(image) as tiff:
        pixels = np.full((512, 768, 3), 230, dtype=np.uint8)
        tiff.write(pixels, tile=(128, 128), photometric="rgb")
    with pytest.raises(ValueError, match=r"must say its micrometres per pixel, .* Give mpp"):
        heatmap([folder], "a/1", image=image)
    assert heatmap([folder], "a/1", image=image, mpp=0.5)[0].exists()
    with pytest.raises(ValueError, match=r"must lie on its image, .* the image to \(76.8, 51.2\)"):
        heatmap([folder], "a/1", image=image, mpp=0.1)


@pytest.mark.parametrize("mpp", [0.0, -0.5, float("nan"), float("inf")])
def test_heatmap__size_of_a_pixel_not_above_zero__is_refused(tmp_path, mpp):
    with pytest.raises(ValueError, match="mpp must be a number above 0"):
        heatmap([_write_run(tmp_path / "run")], "a/1", mpp=mpp)
