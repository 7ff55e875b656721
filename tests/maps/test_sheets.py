import itertools

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from mil_anchor.data.bags import MicrometreCoords, PixelCoords
from mil_anchor.maps.sheets import Panel, draw_sheet
from mil_anchor.maps.slide import SlideMap
from mil_anchor.maps.thumbnail import Thumbnail


def _slide_map(
    *, n_rows=8, n_columns=12, pitch=256.0, start=(1024, 512), kind=PixelCoords, **entries
):
    cells = torch.cartesian_prod(torch.arange(n_columns), torch.arange(n_rows))
    cells = cells[cells.sum(dim=1) != 3]  # a gap in the tissue
    scores = torch.randn(4, 2, len(cells), generator=torch.Generator().manual_seed(0))
    maps = dict(zip((0, 1, 2, None), (2 * scores).log_softmax(dim=2).half(), strict=True))
    coords = kind(cells * pitch + torch.tensor(start), pitch)
    return SlideMap(
        **{"bag_id": "s_$1$/a", "label": 1, "part": "test", "log_attention": maps}
        | {"coords": coords}
        | entries
    )


def _with_truth(**settings):
    n_instances = len(_slide_map(**settings).known_coords)
    label = torch.zeros(n_instances, dtype=torch.int64)
    label[20:30], label[50:53], label[0] = 1, 2, -1
    return _slide_map(**settings, instance_label=label, lesion=(label > 0).long())


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws a sheet and gives the figure, laid out, which would have been written."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))

    def drawing(panels, **settings):
        draw_sheet(panels, tmp_path / "new" / "sheet.png", **settings)
        saved[-1].draw_without_rendering()
        return saved[-1]

    return drawing


def _panels(figure):
    """Axes with a title, which are not the colour bar's and not empty."""
    return [axis for axis in figure.axes if axis.get_title()]


def test_draw_sheet__one_map__shows_the_value_of_every_tile(draw):
    slide_map = _slide_map()
    figure = draw([[Panel("abmil, epoch 1", slide_map, 1, 0)]], scale="linear")

    (axis,) = _panels(figure)
    (image,) = axis.get_images()
    attention = slide_map.attention(1, row=0)
    shown = np.ma.filled(image.get_array(), np.nan)
    assert shown.shape == (8, 12)
    for (x, y), value in zip(slide_map.coords.xy.tolist(), attention.tolist(), strict=True):
        cell = shown[int(y - 512) // 256, int(x - 1024) // 256]
        assert cell == pytest.approx(value * len(attention))
    assert np.isnan(shown).sum() == 4
    assert tuple(image.get_extent()) == (1024, 1024 + 12 * 256, 512 + 8 * 256, 512)
    largest = float(attention.max()) * len(attention)
    assert axis.get_title() == f"abmil, epoch 1\nlargest {largest:.0f} times uniform"


def test_draw_sheet__names_that_would_be_no_formula__are_drawn_as_they_are(draw):
    figure = draw([[Panel(r"lr=$\frac$", _slide_map(bag_id=r"$\frac$"))]])
    assert figure.get_suptitle().startswith(r"$\frac$")


def test_draw_sheet__png__has_the_colours_of_the_tiles(tmp_path):
    slide_map = _slide_map()
    draw_sheet([[Panel("abmil", slide_map)]], tmp_path / "sheet.png")

    pixels = matplotlib.image.imread(tmp_path / "sheet.png")[..., :3].reshape(-1, 3)
    for color in (to_rgba("#ececec"), matplotlib.colormaps["viridis"](0.5 / 92)):
        assert (np.abs(pixels - color[:3]).max(axis=1) < 0.01).mean() > 0.001


@pytest.mark.parametrize(
    ("scale", "label"),
    [
        ("percentile", "percentile of attention within each panel"),
        ("linear", "attention times N, linear (1 is uniform)"),
        ("log", "attention times N, log (1 is uniform)"),
    ],
)
def test_draw_sheet__scale__is_named_at_the_colour_bar(draw, scale, label):
    figure = draw([[Panel("abmil", _slide_map())]], scale=scale)
    (bar,) = [axis for axis in figure.axes if axis.get_ylabel()]
    assert bar.get_ylabel() == label


def test_draw_sheet__known_tiles__are_shown_beside_the_map_and_outlined_in_it(draw):
    slide_map = _with_truth()
    known, attention = _panels(draw([[Panel("abmil", slide_map)]]))

    assert known.get_title() == "ground truth"
    (image,) = known.get_images()
    colors = np.asarray(image.get_array())
    classes = slide_map.instance_label.tolist()
    expected = {-1: "#ffffff", 0: "#999999", 1: "#D55E00", 2: "#56B4E9"}
    for (x, y), label in zip(slide_map.coords.xy.tolist(), classes, strict=True):
        cell = colors[int(y - 512) // 256, int(x - 1024) // 256]
        np.testing.assert_allclose(cell, to_rgba(expected[label]))
    casing, outline = attention.collections
    assert len(outline.get_segments()) == len(casing.get_segments()) > 0
    figure = known.get_figure()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "unknown (1 tiles)",
        "class 0 (78 tiles)",
        "class 1 (10 tiles)",
        "class 2 (3 tiles)",
        "ground truth in all panels",
    ]


def test_draw_sheet__only_lesions_known__outlines_each(draw):
    lesion = torch.zeros(92, dtype=torch.int64)
    lesion[40], lesion[41] = 1, 2  # neighbours
    slide_map = _slide_map(lesion=lesion)
    known, attention = _panels(draw([[Panel("abmil", slide_map)]]))

    assert len(attention.collections[0].get_segments()) == 7
    texts = [text.get_text() for text in known.get_figure().legends[0].get_texts()]
    assert texts[:2] == ["no lesion (90 tiles)", "lesion (2 tiles)"]


def test_draw_sheet__nothing_known__has_no_other_panel(draw):
    figure = draw([[Panel("abmil", _slide_map())]])
    assert len(_panels(figure)) == 1
    assert figure.legends == []


def test_draw_sheet__rows_and_columns__keep_their_places(draw):
    slide_map = _with_truth()
    rows = [[Panel(f"{run}, epoch {epoch}", slide_map, epoch) for epoch in (0, 1)] for run in "ab"]
    places = {}
    for axis in _panels(draw(rows)):
        spec = axis.get_subplotspec()
        places[axis.get_title().split("\n")[0]] = (spec.rowspan.start, spec.colspan.start)
    assert places == {
        "ground truth": (0, 0),
        "a, epoch 0": (0, 1),
        "a, epoch 1": (0, 2),
        "b, epoch 0": (1, 1),
        "b, epoch 1": (1, 2),
    }


@pytest.mark.parametrize("kind", [PixelCoords, MicrometreCoords])
def test_draw_sheet__image__lies_under_the_tiles(draw, kind):
    mpp = 0.25
    unit = mpp if kind is MicrometreCoords else 1.0
    slide_map = _slide_map(kind=kind, pitch=256 * unit, start=(1024 * unit, 512 * unit))
    thumbnail = Thumbnail(np.full((100, 150, 3), 200, dtype=np.uint8), downsample=32.0, mpp=mpp)
    slide, attention = _panels(draw([[Panel("abmil", slide_map)]], image=thumbnail))

    assert slide.get_title() == "slide"
    under, over = attention.get_images()
    assert tuple(under.get_extent()) == (0, 150 * 32 * unit, 100 * 32 * unit, 0)
    left, bottom = 1024 * unit, (512 + 8 * 256) * unit
    assert tuple(over.get_extent()) == (left, (1024 + 12 * 256) * unit, bottom, 512 * unit)
    assert over.get_alpha() == 0.6
    assert attention.get_xlim() == tuple(over.get_extent()[:2])
    assert [text.get_text() for text in slide.texts] == ["200 µm"]


@pytest.mark.parametrize(
    ("kind", "pitch", "mpp", "name"),
    [
        (PixelCoords, 256.0, None, "1,000 px"),
        (PixelCoords, 256.0, 0.5, "500 µm"),
        (MicrometreCoords, 128.0, 0.5, "500 µm"),
        (MicrometreCoords, 600.0, None, "2 mm"),
    ],
)
def test_draw_sheet__scale_bar__has_the_length_that_it_says(draw, kind, pitch, mpp, name):
    figure = draw([[Panel("abmil", _slide_map(kind=kind, pitch=pitch))]], mpp=mpp)
    (axis,) = _panels(figure)
    (bar,) = axis.lines
    length = np.ptp(bar.get_xdata())
    assert [text.get_text() for text in axis.texts] == [name]
    amount, unit = name.replace(",", "").split()
    pixel = mpp if kind is PixelCoords and mpp is not None else 1
    assert length * pixel == pytest.approx(float(amount) * (1000 if unit == "mm" else 1))
    assert 12 * pitch / 8 < length <= 12 * pitch / 3


@pytest.mark.parametrize(
    ("n_rows", "n_columns", "shape"),
    [(8, 12, (1, 1)), (8, 12, (3, 6)), (40, 9, (1, 6)), (9, 50, (5, 1)), (30, 30, (2, 2))],
)
def test_draw_sheet__any_shape__has_no_text_on_text_or_outside(draw, n_rows, n_columns, shape):
    slide_map = _with_truth(n_rows=n_rows, n_columns=n_columns)
    rows = [
        [
            Panel(f"transmil + anchor_nsf, seed {row}, epoch {column}", slide_map, column % 3)
            for column in range(shape[1])
        ]
        for row in range(shape[0])
    ]
    figure = draw(rows, scale="log")

    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    # Tick labels of panels, whose axes are off.
    hidden = {
        id(text)
        for axis in figure.axes
        if not axis.get_ylabel()
        for text in (*axis.get_xticklabels(), *axis.get_yticklabels())
    }
    boxes = {text.get_text(): text.get_window_extent() for text in texts if id(text) not in hidden}
    assert len(boxes) > shape[0] * shape[1]
    for (one, first), (two, second) in itertools.combinations(boxes.items(), 2):
        assert not first.shrunk(0.98, 0.9).overlaps(second), (one, two)
    for text, box in boxes.items():
        inside = figure.bbox.padded(1)
        assert inside.contains(box.x0, box.y0), text
        assert inside.contains(box.x1, box.y1), text


def test_draw_sheet__no_panel__is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one slide, but there are maps of \[\]"):
        draw_sheet([[]], tmp_path / "sheet.png")


def test_draw_sheet__two_slides__are_refused(tmp_path):
    rows = [[Panel("a", _slide_map()), Panel("b", _slide_map(bag_id="other"))]]
    with pytest.raises(ValueError, match=r"one slide, but there are maps of .*'other'"):
        draw_sheet(rows, tmp_path / "sheet.png")


@pytest.mark.parametrize("other", [{"pitch": 512.0}, {"kind": MicrometreCoords}, {"n_rows": 9}])
def test_draw_sheet__other_tiles__are_refused(tmp_path, other):
    rows = [[Panel("a", _slide_map()), Panel("b", _slide_map(**other))]]
    with pytest.raises(ValueError, match=r"same tiles, but slide .* 92 tiles every 256 px"):
        draw_sheet(rows, tmp_path / "sheet.png")


def test_draw_sheet__no_coordinates__is_refused(tmp_path):
    with pytest.raises(ValueError, match="came without coordinates"):
        draw_sheet([[Panel("a", _slide_map(coords=None))]], tmp_path / "sheet.png")


def test_draw_sheet__image_of_another_slide__is_refused(tmp_path):
    thumbnail = Thumbnail(np.zeros((10, 10, 3), dtype=np.uint8), downsample=32.0)
    with pytest.raises(ValueError, match=r"must lie on its image.* and the image to \(320, 320\)"):
        draw_sheet([[Panel("a", _slide_map())]], tmp_path / "sheet.png", image=thumbnail)


def test_draw_sheet__micrometres_on_an_image_without_resolution__are_refused(tmp_path):
    thumbnail = Thumbnail(np.zeros((900, 900, 3), dtype=np.uint8), downsample=32.0)
    rows = [[Panel("a", _slide_map(kind=MicrometreCoords))]]
    with pytest.raises(ValueError, match="must say its micrometres per pixel, but it does not"):
        draw_sheet(rows, tmp_path / "sheet.png", image=thumbnail)
