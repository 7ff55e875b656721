import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mil_anchor.data.bags import MicrometreCoords, PixelCoords
from mil_anchor.data.repack import repack
from mil_anchor.data.stores import open_store
from mil_anchor.data.stores.base import StoredBag
from mil_anchor.data.stores.packed import PackedStore, is_packed
from tests.data.stores.memory_store import MemoryStore, assert_same, make_slide, varied_slides

_MAPS = Path("/proc/self/maps")


def _pack(folder, slides, *, labels=None, **options):
    source = MemoryStore(folder / "source", slides)
    source.labels = labels or {}
    repack(source, folder / "packed.h5", progress=False, **options)
    return folder / "packed.h5"


def _flip_bit(path, dataset, byte):
    with h5py.File(path) as file:
        end = file[dataset].id.get_offset() + file[dataset].nbytes
    content = bytearray(path.read_bytes())
    content[end + byte] ^= 0x40
    path.write_bytes(content)


def _mapped_file(tensor):
    """The file whose pages a tensor's memory is."""
    for line in _MAPS.read_text().splitlines():
        start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.partition("/")[1] + line.partition("/")[2]
    return ""


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_packed_store__slides_with_different_entries__come_back_exactly(tmp_path, dtype):
    slides = varied_slides()
    store = PackedStore(_pack(tmp_path, slides, dtype=dtype))
    assert store.slide_ids == sorted(slides)
    for slide_id, slide in slides.items():
        assert store.shape(slide_id) == tuple(slide.features.shape)
        stored = store.read_stored(slide_id)
        assert stored.features.dtype == getattr(torch, dtype)
        assert_same(stored, slide)
        read = store.read(slide_id)
        assert read.features.dtype == torch.float32
        assert torch.equal(read.features, stored.features.float())


coords = st.sampled_from(
    [
        None,
        (PixelCoords, torch.int32),
        (PixelCoords, torch.int64),
        (PixelCoords, torch.float32),
        (MicrometreCoords, torch.float64),
        (MicrometreCoords, torch.float16),
    ]
)
entries = st.fixed_dictionaries(
    {
        "n": st.integers(1, 6),
        "coords": coords,
        "pitch": st.floats(1e-3, 1e6),
        "instance_label": st.sampled_from([None, torch.int64, torch.int8, torch.int32]),
        "lesion": st.sampled_from([None, torch.int64, torch.int16]),
        "coverage": st.sampled_from([None, torch.float32, torch.float64, torch.float16]),
    }
)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(st.text("äß/.\\ x1\U0001f52c", min_size=1), entries, min_size=1, max_size=5))
def test_packed_store__any_ids_and_entries__is_the_source(tmp_path, drawn):
    generator = torch.Generator().manual_seed(0)
    slides = {}
    for slide_id, choice in drawn.items():
        n = choice["n"]
        kind, dtype = choice["coords"] or (None, None)
        draws = {
            name: torch.randint(0, 9, (n,), generator=generator).to(choice[name])
            for name in ("instance_label", "lesion", "coverage")
            if choice[name] is not None
        }
        if kind is not None:
            xy = 1000 * torch.rand(n, 2, generator=generator)
            draws["coords"] = kind(xy.to(dtype), choice["pitch"])
        features = torch.randn(n, 3, generator=generator)
        slides[slide_id] = StoredBag(slide_id, features, **draws)
    (tmp_path / "packed.h5").unlink(missing_ok=True)
    store = PackedStore(_pack(tmp_path, slides, dtype="float32"))
    assert store.slide_ids == sorted(slides)
    for slide_id, slide in slides.items():
        assert_same(store.read_stored(slide_id), slide)


def test_packed_store__file__is_plain_contiguous_hdf5(tmp_path):
    slides = varied_slides()
    path = _pack(tmp_path, slides)
    with h5py.File(path) as file:
        assert file.attrs["format"] == "mil_anchor"
        assert file["features"].shape == (13, 3)
        assert file["features"].dtype == np.float16
        assert file["coords"].shape == (13, 2)
        assert file["features"].id.get_offset() % 64 == 0
        file.visititems(lambda _, item: pytest.fail(item.name) if item.chunks else None)
        ids = list(file["slide_id"].asstr()[:])
        start = file["index"]["start"][ids.index("truth")]
        expected = slides["truth"].features.half().numpy()
        assert (file["features"][start : start + 4] == expected).all()


def test_packed_store__no_slide_with_an_entry__has_no_dataset_of_it(tmp_path):
    with h5py.File(_pack(tmp_path, {"a": make_slide("a")})) as file:
        assert set(file) == {"features", "index", "label", "slide_id"}


def test_packed_store__label_in_source__is_kept(tmp_path):
    slides = {name: make_slide(name) for name in "ab"}
    store = PackedStore(_pack(tmp_path, slides, labels={"a": "tumör"}))
    assert store.label("a") == "tumör"
    assert store.label("b") is None


def test_packed_store__what_is_read__can_be_changed_without_changing_the_file(tmp_path):
    path = _pack(tmp_path, varied_slides(), dtype="float32")
    before = path.read_bytes()
    stored = PackedStore(path).read_stored("truth")
    for entry in (stored.features, stored.coords.xy, stored.lesion):
        entry.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_packed_store__read__is_what_a_copy_holds_and_changes_no_file(tmp_path, dtype):
    path = _pack(tmp_path, varied_slides(), dtype=dtype)
    before = path.read_bytes()
    store = PackedStore(path)
    for slide_id in store.slide_ids:
        read, copied = store.read(slide_id).features, store.read_stored(slide_id).features
        assert read.dtype == torch.float32
        assert torch.equal(read, copied.float())
        assert read.data_ptr() % 16 == copied.data_ptr() % 16 == 0
        read.zero_()
    assert path.read_bytes() == before


def test_packed_store__bag_that_outlives_its_file__stays_as_it_was(tmp_path):
    slides = {name: make_slide(name, 500, width=64) for name in "ab"}
    path = _pack(tmp_path, slides, dtype="float32")
    features = PackedStore(path).read("b").features
    path.unlink()
    _pack(tmp_path, {name: make_slide(name, 400, width=64) for name in "ab"}, dtype="float32")
    assert torch.equal(features, slides["b"].features)


@pytest.mark.skipif(not _MAPS.exists(), reason="only Linux tells what is mapped where")
def test_packed_store__float32_file__is_read_without_a_copy(tmp_path):
    path = _pack(tmp_path, {"a": make_slide("a", 3000, width=64)}, dtype="float32")
    store = PackedStore(path)
    features, kept = store.read("a").features, store.read_stored("a").features
    assert _mapped_file(features) == str(path)
    assert _mapped_file(kept) != str(path)


def test_packed_store__pickled__is_small_and_reads(tmp_path):
    slides = {"big": make_slide("big", 2000, width=64)}
    store = PackedStore(_pack(tmp_path, slides, dtype="float32"))
    store.read("big")
    content = pickle.dumps(store)
    assert len(content) < 10_000
    assert_same(pickle.loads(content).read_stored("big"), slides["big"])


class _Slides:
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store.slide_ids)

    def __getitem__(self, index):
        return self.store.read(self.store.slide_ids[index]).features


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_packed_store__read_by_workers_after_the_parent__is_the_same(tmp_path, context):
    slides = {f"s{index}": make_slide(f"s{index}", 50 + index) for index in range(6)}
    store = PackedStore(_pack(tmp_path, slides, dtype="float32"))
    expected = [store.read(slide_id).features for slide_id in store.slide_ids]
    loader = DataLoader(
        _Slides(store), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    for features, wanted in zip(loader, expected, strict=True):
        assert torch.equal(features, wanted)


def test_packed_store__slide_it_lacks__is_refused_by_name(tmp_path):
    store = PackedStore(_pack(tmp_path, varied_slides()))
    for read in (store.shape, store.read, store.read_stored, store.read_verified, store.label):
        with pytest.raises(ValueError, match=r"'x' is not in .*packed\.h5, which holds"):
            read("x")


# A bit that survives the cast to the dtype of the source, in the file's last row.
@pytest.mark.parametrize(
    ("dataset", "byte"),
    [("features", -2), ("coords", -2), ("instance_label", -8), ("lesion", -8), ("coverage", -2)],
)
def test_read_verified__one_flipped_bit__names_the_slide(tmp_path, dataset, byte):
    path = _pack(tmp_path, varied_slides())
    PackedStore(path).read_verified("truth")
    _flip_bit(path, dataset, byte)
    store = PackedStore(path)
    store.read_verified("bare")
    with pytest.raises(ValueError, match=r"'truth' must be what was written .* checksum differs"):
        store.read_verified("truth")


def test_is_packed__other_things__are_not(tmp_path):
    assert is_packed(_pack(tmp_path, varied_slides()))
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"] = np.zeros((2, 3))
    (tmp_path / "text.h5").write_text("features")
    for path in (tmp_path, tmp_path / "none.h5", tmp_path / "clam.h5", tmp_path / "text.h5"):
        assert not is_packed(path)
        with pytest.raises(ValueError, match="must be a packed file, but it is none"):
            PackedStore(path)


def test_packed_store__other_version__is_refused(tmp_path):
    path = _pack(tmp_path, varied_slides())
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(ValueError, match="must have version 1, but has 2"):
        PackedStore(path)


def test_packed_store__truncated_file__is_refused(tmp_path):
    path = _pack(tmp_path, varied_slides())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 40])
    with pytest.raises(ValueError, match=r"packed\.h5 must be"):
        PackedStore(path)


def test_packed_store__file_cut_after_it_was_opened__is_an_error_and_no_crash(tmp_path):
    path = _pack(tmp_path, {"a": make_slide("a", 5000)})
    store = PackedStore(path)
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        store.read("a")


def test_open_store__packed_file__is_recognised(tmp_path):
    slides = varied_slides()
    store = open_store(_pack(tmp_path, slides))
    assert isinstance(store, PackedStore)
    for slide_id, slide in slides.items():
        assert_same(store.read_stored(slide_id), slide)
