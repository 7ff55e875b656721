import re

import numpy as np
import pytest

from mil_anchor.data.stores import check_slides, check_widths, names_on_disk, open_store
from tests.data.stores import layouts


def _store(folder, *slide_ids):
    for slide_id in slide_ids:
        layouts.write_uni2(folder, slide_id)
    return open_store(folder)


def test_check_slides__all_there__is_silent(tmp_path):
    check_slides(_store(tmp_path, "a", "b"), ["b", "a"])


def test_check_slides__missing_slides__are_counted_and_listed_together(tmp_path):
    expected = f"2 of 3 are not in {tmp_path}: 'c', 'd'. On disk are 'a', 'b', ... Extract"
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_slides(_store(tmp_path, "a", "b"), ["d", "a", "c"])


def test_check_slides__many_missing_slides__lists_the_first_ten(tmp_path):
    ids = [f"s{index:02}" for index in range(30)]
    with pytest.raises(ValueError, match=r"30 of 30 .* 's08', 's09', \.\.\.\. On"):
        check_slides(_store(tmp_path, "a"), ids)


def test_check_slides__unused_slides__are_a_warning(tmp_path):
    store = _store(tmp_path, "a", "b", "c")
    with pytest.warns(UserWarning, match="2 of 3 slides in .* and are not used: 'b', 'c'"):
        check_slides(store, ["a"])


def test_names_on_disk__suffix_of_a_slide_file__is_added_where_that_is_clear(tmp_path):
    store = _store(tmp_path, "a.svs", "b.tif", "b.svs", "c", "c.svs")
    assert names_on_disk(store, ["c", "a", "b", "d", "a.svs"]) == ["c", "a.svs", "b", "d", "a.svs"]


def test_check_widths__one_width__is_it(tmp_path):
    assert check_widths(_store(tmp_path, "a", "b"), ["a"]) == layouts.WIDTH


def test_check_widths__widths_that_differ__lists_slides_of_each(tmp_path):
    layouts.write_hdf5(tmp_path / "c.h5", {"features": np.ones((2, 4), np.float32)})
    store = _store(tmp_path, "a", "b")
    expected = f"there are 4 in 1 slides 'c', {layouts.WIDTH} in 2 slides 'a', 'b'."
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_widths(store, ["a", "b", "c"])
    assert check_widths(store, ["a", "b"]) == layouts.WIDTH


def test_check_widths__broken_and_empty_slides__are_listed_together(tmp_path):
    layouts.write_hdf5(tmp_path / "c.h5", {"features": np.empty((0, 4), np.float32)})
    store = _store(tmp_path, "a", "b")
    (tmp_path / "b.h5").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 in .* slide 'b' in .*\n.*slide 'c' has"):
        check_widths(store, ["a", "b", "c"])


def test_check_widths__many_broken_slides__lists_the_first_ten(tmp_path):
    ids = [f"s{index:02}" for index in range(12)]
    store = _store(tmp_path, *ids)
    for slide_id in ids:
        (tmp_path / f"{slide_id}.h5").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"(?s)12 of 12 .*'s09'[^\n]*\n\.\.\. and 2 more$"):
        check_widths(store, ids)


def test_check_widths__missing_slides__are_listed_together(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 3 are not in .*: 'y', 'z'"):
        check_widths(_store(tmp_path, "a"), ["z", "a", "y"])


def test_check_widths__no_slide__is_refused(tmp_path):
    with pytest.raises(ValueError, match="At least one slide must be given"):
        check_widths(_store(tmp_path, "a"), [])


def test_check_widths__many_slides__shows_a_bar_that_can_be_switched_off(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    store = _store(tmp_path, "a")
    check_widths(store, ["a"] * 200, progress=False)
    check_widths(store, ["a"] * 199)
    assert capsys.readouterr().err == ""
    check_widths(store, ["a"] * 200)
    assert "Checking slides" in capsys.readouterr().err


def test_check_widths__many_slides_without_a_terminal__shows_nothing(tmp_path, capsys):
    check_widths(_store(tmp_path, "a"), ["a"] * 200)
    assert capsys.readouterr().err == ""
