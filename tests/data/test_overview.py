import io
import re

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console

from mil_anchor.data.bags import PixelCoords
from mil_anchor.data.labels import LabelTable
from mil_anchor.data.overview import ClassCount, inspect_data
from mil_anchor.data.repack import repack
from mil_anchor.data.stores.packed import PackedStore
from tests.data.stores.memory_store import MemoryStore, make_slide, varied_slides


def _table(*rows):
    slide_ids, labels, cases = (list(column) for column in zip(*rows, strict=True))
    return LabelTable(
        slide_ids, labels, classes=["normal", "tumor"], cases=cases, parts=[None] * len(rows)
    )


def _printed(overview):
    console = Console(file=io.StringIO(), width=200)
    console.print(overview)
    # Columns are as wide as their content: one space between them is enough here.
    return re.sub(r"(?<=\S) +", " ", console.file.getvalue())


def test_inspect_data__sound_store__counts_what_it_holds(tmp_path):
    slides = varied_slides()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.h5").write_bytes(b"12345")
    store = MemoryStore(tmp_path, slides)
    overview = inspect_data(store, progress=False)
    assert overview.ok
    assert (overview.layout, overview.n_slides, overview.checksums) == ("memory", 4, False)
    assert overview.n_instances == {name: len(slide.features) for name, slide in slides.items()}
    assert overview.bytes_on_disk == 5
    assert overview.bytes_in_memory == sum(slide.features.nbytes for slide in slides.values())
    assert overview.widths == {3: 4}
    assert overview.dtypes == {"float32": 4}
    assert overview.grids == {None: 1, ("px", 256.0): 1, ("px", 1.0): 1, ("um", 112.5): 1}
    assert overview.entries == {"instance_label": 1, "lesion": 1, "coverage": 1}
    assert overview.classes is None
    assert sorted(store.reads) == sorted(slides)


def test_inspect_data__names_with_the_suffix_of_slides_on_disk__match_the_table(tmp_path):
    store = MemoryStore(tmp_path, {"a.svs": make_slide("a.svs"), "b": make_slide("b")})
    overview = inspect_data(store, _table(("a", 0, "p"), ("b", 1, "q")), progress=False)
    assert overview.ok
    assert overview.unlisted == []
    assert [entry.n_readable for entry in overview.classes] == [1, 1]


def test_quantiles__many_slides__are_those_of_numpy(tmp_path):
    sizes = [1, 2, 3, 5, 8, 13, 21, 34, 55]
    slides = {f"s{n}": make_slide(f"s{n}", n) for n in sizes}
    overview = inspect_data(MemoryStore(tmp_path, slides), progress=False)
    expected = np.percentile(sizes, [0, 5, 25, 50, 75, 95, 100])
    assert list(overview.quantiles.values()) == pytest.approx(list(expected))
    assert "tiles 142 in all; per slide min 1, 5 % 1, 25 % 3, 50 % 8, " in _printed(overview)


def test_inspect_data__table__counts_classes_and_finds_what_does_not_match(tmp_path):
    slides = {name: make_slide(name) for name in ("a", "b", "c", "extra")}
    slides["c"] = ValueError("cut off")
    table = _table(("a", 0, "p1"), ("b", 1, "p2"), ("c", 1, "p2"), ("gone", 1, "p3"))
    overview = inspect_data(MemoryStore(tmp_path, slides), table, progress=False)
    assert overview.classes == [
        ClassCount("normal", n_slides=1, n_cases=1, n_readable=1),
        ClassCount("tumor", n_slides=3, n_cases=2, n_readable=1),
    ]
    assert (overview.missing, overview.unlisted) == (["gone"], ["extra"])
    assert overview.broken == {"c": "cut off"}
    assert not overview.ok
    printed = _printed(overview)
    for line in (
        "slides 4, of which 1 broken",
        "tumor 3 2 1",
        "1 missing on disk:\n  gone\n",
        "1 in no row of the table:\n  extra\n",
        "1 broken:\n  c: cut off\n",
    ):
        assert line in printed


@pytest.mark.parametrize(
    ("names", "rows", "ok"),
    [
        (["a"], [("a", 0, "p")], True),
        (["a", "b"], [("a", 0, "p")], True),  # a slide more than the table does no harm
        (["a"], [("a", 0, "p"), ("b", 0, "p")], False),
    ],
)
def test_ok__table__demands_all_of_its_slides(tmp_path, names, rows, ok):
    slides = {name: make_slide(name) for name in names}
    assert inspect_data(MemoryStore(tmp_path, slides), _table(*rows), progress=False).ok is ok


def test_ok__widths_that_differ__is_false_and_slides_are_named(tmp_path):
    slides = {"a": make_slide("a"), "b": make_slide("b", width=5), "c": make_slide("c", width=5)}
    overview = inspect_data(MemoryStore(tmp_path, slides), progress=False)
    assert not overview.ok
    assert "width 5 (2 slides), 3 (1 slides)" in _printed(overview)
    assert re.search(r"1 of another width:\n *a: 3\n", _printed(overview))


def test_inspect_data__all_broken__says_so(tmp_path):
    overview = inspect_data(MemoryStore(tmp_path, {"a": OSError("no permission")}), progress=False)
    assert not overview.ok
    assert overview.quantiles == {}
    assert "1 broken:\n  a: no permission" in _printed(overview)


def test_inspect_data__packed_file__compares_checksums(tmp_path):
    path = tmp_path / "packed.h5"
    slides = {name: make_slide(name) for name in "ab"}
    repack(MemoryStore(tmp_path / "source", slides), path, progress=False)
    overview = inspect_data(PackedStore(path), progress=False)
    assert overview.ok
    assert overview.bytes_on_disk == path.stat().st_size
    assert "checksums 2 of 2 slides agree" in _printed(overview)
    with h5py.File(path, "r+") as file:
        file["features"][-1, -1] += 1
    overview = inspect_data(PackedStore(path), progress=False)
    assert not overview.ok
    assert "checksums 1 of 2 slides agree" in _printed(overview)
    assert "b: Slide 'b' must be what was written" in _printed(overview)


def test_inspect_data__names_like_markup__are_printed_as_they_are(tmp_path):
    coords = PixelCoords(torch.zeros(4, 2), 1.0)
    slides = {"[red]": make_slide("[red]", coords=coords), "[bold]": ValueError("[/x] is missing")}
    table = _table(("[blue]", 0, "p"))
    overview = inspect_data(MemoryStore(tmp_path, slides), table, progress=False)
    printed = _printed(overview)
    assert "  [red]\n" in printed
    assert "  [blue]\n" in printed
    assert "  [bold]: [/x] is missing\n" in printed


def test_inspect_data__progress__is_shown_on_standard_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    inspect_data(MemoryStore(tmp_path, varied_slides()))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "reading" in shown.err
