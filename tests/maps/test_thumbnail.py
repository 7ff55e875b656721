import sys

import numpy as np
import pytest
import tifffile

from mil_anchor.maps import thumbnail as thumbnails
from mil_anchor.maps.thumbnail import open_thumbnail


def _write_slide(file, *, height=512, width=1024, mpp=0.5, levels=(1, 4)):
    """A slide whose right half is red below a green strip, everything else white."""
    image = np.full((height, width, 3), 255, dtype=np.uint8)
    image[:, width // 2 :] = (255, 0, 0)
    image[: height // 4] = (0, 255, 0)
    resolution = {} if mpp is None else {"resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(file) as tiff:
        for level in levels:
            if mpp is not None:
                resolution["resolution"] = (10_000 / (mpp * level),) * 2
            tiff.write(
                image[::level, ::level],
                tile=(128, 128),
                photometric="rgb",
                compression="zlib",
                subifds=0 if level > 1 else None,
                subfiletype=0 if level == 1 else 1,
                **resolution,
            )
    return file


def test_open_thumbnail__pyramidal_tiff__shows_every_place_where_it_lies(tmp_path):
    thumbnail = open_thumbnail(_write_slide(tmp_path / "a.tif"), 128)

    assert thumbnail.image.shape == (64, 128, 3)
    assert thumbnail.downsample == 8
    assert thumbnail.mpp == pytest.approx(0.5)
    for (x, y), color in {
        (100, 300): (255, 255, 255),
        (900, 300): (255, 0, 0),
        (900, 60): (0, 255, 0),
        (100, 60): (0, 255, 0),
    }.items():
        seen = thumbnail.image[int(y / thumbnail.downsample), int(x / thumbnail.downsample)]
        assert tuple(seen) == color


def test_open_thumbnail__odd_ratio__is_measured_across_the_longer_side(tmp_path):
    thumbnail = open_thumbnail(_write_slide(tmp_path / "a.tif", height=130, width=1000), 90)
    assert thumbnail.image.shape == (12, 90, 3)
    assert thumbnail.downsample == pytest.approx(1000 / 90)


def test_open_thumbnail__small_slide__is_not_blown_up(tmp_path):
    thumbnail = open_thumbnail(_write_slide(tmp_path / "a.tif", height=128, width=256), 4000)
    assert thumbnail.image.shape == (128, 256, 3)
    assert thumbnail.downsample == 1


def test_open_thumbnail__no_resolution_in_the_file__has_no_mpp(tmp_path):
    assert open_thumbnail(_write_slide(tmp_path / "a.tif", mpp=None), 128).mpp is None


def test_open_thumbnail__no_file__says_so(tmp_path):
    with pytest.raises(ValueError, match=r"none.tif does not exist"):
        open_thumbnail(tmp_path / "none.tif", 128)


def test_open_thumbnail__no_slide__says_what_can_be_read(tmp_path):
    (tmp_path / "a.tif").write_text("no slide")
    with pytest.raises(ValueError, match=r"OpenSlide reads, but .*a.tif is none \(Unsupported"):
        open_thumbnail(tmp_path / "a.tif", 128)


def test_open_thumbnail__large_slide_of_one_level__is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(thumbnails, "_MAX_PIXELS_READ", 100_000)
    single = _write_slide(tmp_path / "single.tif", levels=(1,))
    with pytest.raises(ValueError, match=r"single.tif 1024 x 512 pixels would be read for 128"):
        open_thumbnail(single, 128)
    assert open_thumbnail(_write_slide(tmp_path / "levels.tif"), 128).downsample == 8


def test_open_thumbnail__max_side_0__is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1 pixel, but 0 came"):
        open_thumbnail(tmp_path / "a.tif", 0)


def test_open_thumbnail__no_openslide__says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[wsi\]'"):
        open_thumbnail(tmp_path / "a.tif", 128)
