import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import h5py
import pytest
import torch

from mil_anchor.data.bags import PixelCoords
from mil_anchor.data.repack import repack, verify
from mil_anchor.data.stores.base import StoredBag
from mil_anchor.data.stores.packed import PackedStore
from tests.data.stores.memory_store import MemoryStore, assert_same, make_slide, varied_slides

ROOT = Path(__file__).parents[2]
BROKEN = ValueError("the file is truncated")


def _source(folder, slides=None):
    return MemoryStore(folder / "source", varied_slides() if slides is None else slides)


def _named(*names, **options):
    return {name: make_slide(name, 2 + index, **options) for index, name in enumerate(names)}


def _with_nan(slide):
    features = slide.features.clone()
    features[1, 2] = float("nan")
    return StoredBag(slide.slide_id, features)


def test_repack__report__counts_what_the_file_holds(tmp_path):
    report = repack(_source(tmp_path), tmp_path / "packed.h5", progress=False)
    assert (report.n_slides, report.n_new, report.n_instances, report.width) == (4, 4, 13, 3)
    assert report.n_bytes == (tmp_path / "packed.h5").stat().st_size
    assert "4 slides, 13 tiles x 3 float16" in str(report)
    assert "Every slide was read back from the file and agrees with its checksum." in str(report)
    assert [file.name for file in tmp_path.iterdir()] == ["packed.h5"]


def test_repack__progress__is_shown_on_standard_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    repack(_source(tmp_path), tmp_path / "packed.h5")
    shown = capsys.readouterr()
    assert shown.out == ""
    for verb in ("looking", "writing", "verifying"):
        assert verb in shown.err


def test_repack__finished_file__is_left_as_it_is(tmp_path):
    source, path = _source(tmp_path), tmp_path / "packed.h5"
    repack(source, path, progress=False)
    before, changed = path.read_bytes(), path.stat().st_mtime_ns
    source.reads.clear()
    report = repack(source, path, progress=False)
    assert (report.n_slides, report.n_new, source.reads) == (4, 0, [])
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, changed)


def test_repack__some_slides__holds_only_these(tmp_path):
    path = tmp_path / "packed.h5"
    repack(_source(tmp_path), path, slide_ids=["truth", "bare"], progress=False)
    assert PackedStore(path).slide_ids == ["bare", "truth"]


class _StopError(Exception):
    pass


def test_repack__stopped_and_run_again__goes_on_after_the_last_slide(tmp_path):
    slides = varied_slides()
    source, path = _source(tmp_path, slides), tmp_path / "packed.h5"

    class Stopping(MemoryStore):
        def read_stored(self, slide_id):
            if slide_id == "one":
                raise _StopError("by hand")
            return super().read_stored(slide_id)

    with pytest.raises(_StopError, match="by hand"):
        repack(Stopping(source.path, slides), path, progress=False)
    again = f"repack {tmp_path / 'source'} {path} --dtype float16"
    with pytest.raises(ValueError, match=rf"4 of its 4 slides are not .* '.*{again}'"):
        PackedStore(path)
    report = repack(source, path, progress=False)
    assert (source.reads, report.n_new, report.n_slides) == (["one", "truth"], 2, 4)
    for slide_id, slide in slides.items():
        stored = PackedStore(path).read(slide_id)
        assert torch.equal(stored.features, slide.features.half().float())


# Kills the run at every write to the file in turn, and lets a second run finish.
KILLED = """
import os, signal, sys
from pathlib import Path

import h5py, torch

from mil_anchor.data.repack import repack, verify
from mil_anchor.data.stores.packed import PackedStore
from tests.data.stores.memory_store import MemoryStore, assert_same, varied_slides

torch.set_num_threads(1)
folder, slides = Path(sys.argv[1]), varied_slides()
source = MemoryStore(folder / "source", slides)
write, flush = h5py.Dataset.__setitem__, h5py.File.flush
calls = 0

def dying(function):
    def call(*arguments):
        global calls
        calls += 1
        if calls == survived:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*arguments)
        if calls == survived - 1:
            flush(arguments[0].file)  # as much as possible is on the disk when the next call dies
    return call

for survived in range(1, 100):
    path = folder / f"{survived}.h5"
    child = os.fork()
    if child == 0:
        h5py.Dataset.__setitem__ = dying(write)
        h5py.File.flush = dying(flush)
        repack(source, path, dtype="float32", progress=False)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    if path.exists():
        try:
            PackedStore(path)
        except ValueError as error:
            if "must be finished" not in str(error):
                raise
        else:
            raise RuntimeError("an unfinished file was taken for a finished one")
    source.reads.clear()
    report = repack(source, path, dtype="float32", progress=False)
    if len(source.reads) != report.n_new or verify(path, progress=False) != len(slides):
        raise RuntimeError("the second run is wrong")
    store = PackedStore(path)
    for slide_id, slide in slides.items():
        assert_same(store.read_stored(slide_id), slide)
    print(report.n_new)
"""


@pytest.mark.slow
def test_repack__killed_at_any_write__is_finished_by_the_next_run(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    n_new = [int(line) for line in done.stdout.split()]
    # The later it is killed, the less is left to write.
    assert n_new == sorted(n_new, reverse=True)
    assert set(n_new) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"dtype": "float32"}, "its features are float16, not float32"),
        ({"slide_ids": ["one", "bare"]}, r"it is for other slides \(2 differ: 'a\.b/ü c', 'truth'"),
        ({"source": "other"}, "it was made from .*source, not .*other"),
        ({"width": 5}, "its features have width 3, not 5"),
        ({"n": 9}, "the source has another number of tiles now in 'bare'"),
    ],
)
def test_repack__destination_of_another_repack__is_refused(tmp_path, change, found):
    source, path = _source(tmp_path), tmp_path / "packed.h5"
    repack(source, path, progress=False)
    before = path.read_bytes()
    if "source" in change:
        source = MemoryStore(tmp_path / change.pop("source"), source.slides)
    if "width" in change:
        source = _source(tmp_path, _named(*source.slides, width=change.pop("width")))
    if "n" in change:
        source.slides["bare"] = make_slide("bare", change.pop("n"))
    with pytest.raises(ValueError, match=f"hold a part of the same repack, but {found}.*delete"):
        repack(source, path, progress=False, **change)
    assert path.read_bytes() == before


def test_repack__destination_that_is_something_else__is_refused_and_kept(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    for destination in (path, tmp_path):
        with pytest.raises(ValueError, match="but it holds something else"):
            repack(_source(tmp_path), destination, progress=False)
    assert path.read_text() == "mine"


def test_repack__destination_inside_the_source__is_refused(tmp_path):
    for place in ("packed.h5", "deeper/packed.h5"):
        with pytest.raises(ValueError, match=r"must lie outside of its source, .*packed\.h5 lies"):
            repack(_source(tmp_path), tmp_path / "source" / place, progress=False)


def test_repack__folder_missing__is_refused_before_reading(tmp_path):
    source = _source(tmp_path)
    with pytest.raises(ValueError, match=r"folder of the destination must exist, but .*none does"):
        repack(source, tmp_path / "none" / "packed.h5", progress=False)
    assert source.reads == []


def test_repack__file_that_another_process_writes__is_refused(tmp_path):
    path = tmp_path / "packed.h5"
    repack(_source(tmp_path), path, progress=False)
    hold = f"import h5py; f = h5py.File({str(path)!r}, 'r+'); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match=r"packed\.h5 must be .* no repack is writing it"):
            repack(_source(tmp_path), path, progress=False)
        other.communicate("\n")


def test_repack__disk_too_small__is_refused_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 30, 70))
    with pytest.raises(RuntimeError, match=r"needs 7\.8e-08 GB, but its disk has 7e-08 GB free"):
        repack(_source(tmp_path), tmp_path / "packed.h5", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == []


def test_repack__writing_fails__keeps_what_was_finished(tmp_path, monkeypatch):
    slides, path = varied_slides(), tmp_path / "packed.h5"
    source, write = _source(tmp_path, slides), h5py.Dataset.__setitem__

    def full(dataset, rows, values):
        if dataset.name == "/lesion":
            raise OSError(28, "No space left on device")
        write(dataset, rows, values)

    with monkeypatch.context() as patch:
        patch.setattr(h5py.Dataset, "__setitem__", full)
        with pytest.raises(RuntimeError, match=r"No space left on device.* run the same command"):
            repack(source, path, progress=False)
    source.reads.clear()
    assert repack(source, path, progress=False).n_slides == 4
    assert source.reads == ["truth"]


def test_repack__broken_slides__are_reported_together_and_the_others_kept(tmp_path):
    slides = {**_named(*"abcdef"), "nan": _with_nan(make_slide("nan")), "cut": BROKEN}
    slides["short"] = make_slide("short", 4, lesion=torch.zeros(3, dtype=torch.int64))
    source, path = _source(tmp_path, slides), tmp_path / "packed.h5"
    with pytest.raises(
        ValueError, match=r"(?s)3 of 9 are broken; the other 6 .*--skip-broken"
    ) as e:
        repack(source, path, progress=False)
    for reason in (
        "\n  nan: slide 'nan' holds NaN",
        "\n  cut: the file is truncated",
        "\n  short: lesion must have one entry per tile, but slide 'short' has 3 for 4 tiles",
    ):
        assert reason in str(e.value)
    with pytest.raises(ValueError, match="3 of its 9 slides are not written"):
        PackedStore(path)


def test_repack__broken_slides_mended__are_added_without_reading_the_others(tmp_path):
    slides = {**_named(*"abc"), "nan": _with_nan(make_slide("nan")), "cut": BROKEN}
    source, path = _source(tmp_path, slides), tmp_path / "packed.h5"
    with pytest.raises(ValueError, match="2 of 5 are broken"):
        repack(source, path, progress=False)
    coords = PixelCoords(torch.arange(14).reshape(7, 2), 2.0)
    source.slides["cut"] = make_slide("cut", 7, coords=coords)  # no place for it was known
    source.slides["nan"] = make_slide("nan", 9)  # the place was for 4
    source.reads.clear()
    assert repack(source, path, progress=False).n_slides == 5
    assert source.reads == ["cut", "nan"]
    store = PackedStore(path)
    for slide_id, slide in source.slides.items():
        half = StoredBag(slide_id, slide.features.half().float(), coords=slide.coords)
        assert_same(half, store.read(slide_id))
    assert [file.name for file in tmp_path.iterdir()] == ["packed.h5"]


def test_repack__slides_broken_later__do_not_matter_once_they_are_in_the_file(tmp_path):
    source, path = _source(tmp_path), tmp_path / "packed.h5"
    repack(source, path, progress=False)
    source.slides["one"] = BROKEN
    assert repack(source, path, progress=False).n_slides == 4


def test_repack__skip_broken__finishes_without_them_until_they_are_mended(tmp_path):
    slides = {**_named(*"abc"), "nan": _with_nan(make_slide("nan")), "cut": BROKEN}
    source, path = _source(tmp_path, slides), tmp_path / "packed.h5"
    report = repack(source, path, skip_broken=True, progress=False)
    assert set(report.left_out) == {"nan", "cut"}
    assert "Left out 2 slides:\n  cut: the file is truncated\n  nan: slide" in str(report)
    store = PackedStore(path)
    assert store.slide_ids == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"'nan' is not in .*which holds \['a', 'b', 'c'\]"):
        store.read("nan")
    assert verify(path, progress=False) == 3
    source.slides["nan"] = make_slide("nan")
    assert repack(source, path, skip_broken=True, progress=False).n_new == 1
    assert PackedStore(path).slide_ids == ["a", "b", "c", "nan"]


def test_repack__no_readable_slide__is_refused(tmp_path):
    path = tmp_path / "packed.h5"
    for skip_broken in (False, True):
        with pytest.raises(ValueError, match=r"(?s)none of 1 is.*cut: the file is truncated"):
            repack(
                _source(tmp_path, {"cut": BROKEN}), path, skip_broken=skip_broken, progress=False
            )
    assert not path.exists()
    nan = {"nan": _with_nan(make_slide("nan"))}
    with pytest.raises(ValueError, match="1 of 1 are broken; the other 0"):
        repack(_source(tmp_path, nan), path, skip_broken=True, progress=False)


@pytest.mark.parametrize("value", [65505.0, -65520.0, 1e30])
def test_repack__value_beyond_float16__is_refused_by_name(tmp_path, value):
    slides = _named("a", "b")
    slides["b"].features[2, 1] = value
    source = _source(tmp_path, slides)
    with pytest.raises(ValueError, match=r"up to 65504, but slide 'b' has .* --dtype float32"):
        repack(source, tmp_path / "half.h5", progress=False, skip_broken=True)
    repack(source, tmp_path / "full.h5", dtype="float32", progress=False)
    read = PackedStore(tmp_path / "full.h5").read("b")
    assert torch.equal(read.features, slides["b"].features)


def test_repack__largest_float16__is_kept(tmp_path):
    slides = _named("a")
    slides["a"].features[0] = torch.tensor([65504.0, -65504.0, 2.0**-24])
    path = tmp_path / "packed.h5"
    repack(_source(tmp_path, slides), path, progress=False)
    assert torch.equal(PackedStore(path).read("a").features[0], slides["a"].features[0])


def test_repack__half_precision_source__fits_both_dtypes(tmp_path):
    slide = StoredBag("a", torch.tensor([[1.5, 65504.0]], dtype=torch.float16))
    for dtype in ("float16", "float32"):
        path = tmp_path / f"{dtype}.h5"
        repack(_source(tmp_path, {"a": slide}), path, dtype=dtype, progress=False)
        assert torch.equal(PackedStore(path).read("a").features, slide.features.float())


def test_repack__infinite_value_that_a_store_lets_through__is_a_broken_slide(tmp_path):
    class Careless(MemoryStore):
        def read_stored(self, slide_id):
            return self.slides[slide_id]

    for value in (float("inf"), -float("inf"), float("nan")):
        slides = _named("a", "b")
        slides["b"].features[0, 0] = value
        with pytest.raises(ValueError, match="slide 'b' holds NaN or infinity"):
            repack(Careless(tmp_path / "s", slides), tmp_path / f"{value}.h5", progress=False)


def test_repack__widths_that_differ__names_slides_of_each(tmp_path):
    slides = {**_named("a", "b"), "wide": make_slide("wide", width=5)}
    with pytest.raises(ValueError, match="but there are 3 in 'a', 'b', 5 in 'wide'"):
        repack(_source(tmp_path, slides), tmp_path / "packed.h5", progress=False)


def test_repack__slides_that_are_not_in_the_source__are_listed(tmp_path):
    wanted = ["one", "x", "y"]
    with pytest.raises(ValueError, match="2 of 3 are not: 'x', 'y'"):
        repack(_source(tmp_path), tmp_path / "packed.h5", slide_ids=wanted, progress=False)
    with pytest.raises(ValueError, match="At least one slide must be asked for"):
        repack(_source(tmp_path, {}), tmp_path / "packed.h5", progress=False)


def test_repack__unknown_dtype__is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of \['float16', 'float32'\], but 'int8' came"):
        repack(_source(tmp_path), tmp_path / "packed.h5", dtype="int8", progress=False)


def test_repack__slide_that_changes_meanwhile__is_a_broken_one(tmp_path):
    class Growing(MemoryStore):
        def read_stored(self, slide_id):
            return make_slide(slide_id, 9)

    with pytest.raises(ValueError, match=r"'a' must have shape \(2, 3\), but has \(9, 3\) now"):
        repack(Growing(tmp_path / "s", _named("a")), tmp_path / "packed.h5", progress=False)


def test_repack__disk_that_returns_other_values__is_noticed_and_mended(tmp_path, monkeypatch):
    source, path = _source(tmp_path), tmp_path / "packed.h5"
    write = h5py.Dataset.__setitem__

    def wrong(dataset, rows, values):
        write(dataset, rows, values + 1 if dataset.name == "/lesion" else values)

    with monkeypatch.context() as patch:
        patch.setattr(h5py.Dataset, "__setitem__", wrong)
        with pytest.raises(RuntimeError, match=r"it differs for 'truth'. Check the disk"):
            repack(source, path, progress=False)
    source.reads.clear()
    assert repack(source, path, progress=False).n_slides == 4
    assert source.reads == ["truth"]


def test_verify__damaged_slides__are_all_named(tmp_path):
    path = tmp_path / "packed.h5"
    repack(_source(tmp_path, _named("a", "b", "c")), path, progress=False)
    assert verify(path, progress=False) == 3
    with h5py.File(path, "r+") as file:
        file["features"][0, 0] += 1
        file["features"][-1, -1] += 1
    with pytest.raises(ValueError, match="2 are damaged: 'a', 'c'"):
        verify(path, progress=False)
