import os
import pickle
import re

import h5py
import numpy as np
import pytest

from mil_anchor.data.repack import repack
from mil_anchor.data.stores import open_store
from mil_anchor.data.stores.hdf5 import ProcessFile, contents
from tests.data.stores import layouts


def _store(folder, *, slide_id="s.1", **entries):
    layouts.write_hdf5(folder / f"{slide_id}.h5", entries)
    return open_store(folder)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (1, 0, 8)])
def test_hdf5_store__slide_without_tiles__is_refused_by_name(shape, tmp_path):
    store = _store(tmp_path, features=np.empty(shape, np.float32), coords=np.empty((0, 2), int))
    for look in (store.shape, store.read):
        with pytest.raises(ValueError, match=r"at least one tile, but slide 's.1' .*s.1.h5"):
            look("s.1")


def test_hdf5_store__features_of_a_slide_among_bags__are_refused_by_name(tmp_path):
    layouts.write_uni2(tmp_path, "a")
    store = _store(tmp_path, features=np.ones(8, np.float32))
    with pytest.raises(ValueError, match=r"slide 's.1' has shape \(8,\) in .* one embedding"):
        store.read("s.1")


def test_hdf5_store__repacked_file_among_bags__is_no_slide(tmp_path):
    layouts.write_uni2(tmp_path, "a")
    repack(open_store(tmp_path), tmp_path.with_suffix(".h5"), progress=False)
    tmp_path.with_suffix(".h5").rename(tmp_path / "packed.h5")
    store = open_store(tmp_path)
    for read in (store.shape, store.read):
        with pytest.raises(ValueError, match=r"packed\.h5 is a repacked file of many"):
            read("packed")


def test_hdf5_store__two_bags_in_one_file__are_refused_by_name(tmp_path):
    store = _store(tmp_path, features=np.ones((2, 3, 8), np.float32))
    with pytest.raises(ValueError, match=r"slide 's.1' has shape \(2, 3, 8\)"):
        store.shape("s.1")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_hdf5_store__value_not_finite__names_slide_column_and_file(value, dtype, tmp_path):
    features = np.ones((4, 8), dtype)
    features[2, 5] = value
    store = _store(tmp_path, features=features)
    with pytest.raises(ValueError, match=r"slide 's.1' holds NaN or infinity in column 5 in .*h5"):
        store.read("s.1")


@pytest.mark.parametrize(("dtype", "value"), [(np.float16, 65504), (np.float32, 3e38)])
def test_hdf5_store__values_whose_sum_overflows__are_read(dtype, value, tmp_path):
    features = np.full((4, 8), value, dtype)
    stored = _store(tmp_path, features=features).read_stored("s.1")
    assert np.array_equal(stored.features.numpy(), features)
    assert stored.features.numpy().dtype == dtype


def test_hdf5_store__double_beyond_float32__is_refused(tmp_path):
    store = _store(tmp_path, features=np.full((4, 8), 1e300))
    with pytest.raises(ValueError, match=r"slide 's.1' holds NaN or infinity"):
        store.read("s.1")


def test_hdf5_store__whole_numbers__are_no_features(tmp_path):
    store = _store(tmp_path, features=np.ones((4, 8), np.int32))
    with pytest.raises(ValueError, match=r"floating point numbers, but slide 's.1' has int32"):
        store.read("s.1")


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (4,), (2, 4, 2)])
def test_hdf5_store__coords_that_do_not_fit__are_refused_by_name(shape, tmp_path):
    store = _store(tmp_path, features=np.ones((4, 8), np.float32), coords=np.ones(shape, int))
    expected = f"slide 's.1' has shape {shape} for 4 tiles in"
    with pytest.raises(ValueError, match=re.escape(expected)):
        store.read("s.1")


def test_hdf5_store__coords_not_finite__are_refused_by_name(tmp_path):
    store = _store(
        tmp_path, features=np.ones((2, 8), np.float32), coords=np.array([[0, 0], [np.nan, 1]])
    )
    with pytest.raises(ValueError, match=r"Coordinates must be finite, but slide 's.1'"):
        store.read("s.1")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"inst_labels": np.ones(3)}, r"one value per tile, but slide 's.1' .* \(3,\) for 4 tiles"),
        ({"instance_label": np.full(4, 0.5)}, "whole numbers, but slide 's.1' .* holds fractions"),
        ({"lesion": np.full(4, np.nan)}, "lesion must be whole numbers, but slide 's.1'"),
        ({"coverage": np.full(4, 1.5)}, r"a share in \[0, 1\], but slide 's.1'"),
        ({"coverage": np.full(4, np.nan)}, r"a share in \[0, 1\], but slide 's.1'"),
    ],
)
def test_hdf5_store__annotation_that_does_not_fit__is_refused_by_name(entry, message, tmp_path):
    store = _store(tmp_path, features=np.ones((4, 8), np.float32), **entry)
    with pytest.raises(ValueError, match=message):
        store.read("s.1")


def test_hdf5_store__annotation_of_tiles__is_read_beside_the_features(tmp_path):
    entries = {"instance_label": [0, 2, -1], "lesion": [0, 1, 0], "coverage": [0, 0.5, 0]}
    arrays = {name: np.array(values) for name, values in entries.items()}
    stored = _store(tmp_path, features=np.ones((3, 8), np.float32), **arrays).read("s.1")
    assert {name: getattr(stored, name).tolist() for name in entries} == entries


@pytest.mark.parametrize("key", ["features", "feats", "feat", "patch_embeddings"])
def test_hdf5_store__each_name_of_features__is_read(key, tmp_path):
    store = _store(tmp_path, **{key: layouts.features_of("s.1")})
    assert np.array_equal(store.read("s.1").features, layouts.features_of("s.1"))


def test_hdf5_store__one_file_without_features__names_the_slide(tmp_path):
    layouts.write_uni2(tmp_path, "a")
    store = _store(tmp_path, embedding=np.ones((4, 8)))
    with pytest.raises(ValueError, match=r"slide 's.1' has \['embedding'\] in .*s.1.h5"):
        store.read("s.1")


def test_hdf5_store__file_cut_off__names_slide_and_file(tmp_path):
    path = layouts.write_clam_h5(tmp_path, "s.1", 400)
    layouts.write_clam_h5(tmp_path, "a")
    store = open_store(tmp_path)
    whole = path.read_bytes()
    for size in (0, 7, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for look in (store.shape, store.read):
            with pytest.raises(ValueError, match=r"readable HDF5, but slide 's.1' in .*s.1.h5 is"):
                look("s.1")


def test_hdf5_store__damage_inside__names_slide_and_file(tmp_path):
    path = tmp_path / "s.1.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=np.ones((50, 8), np.float32), compression="gzip")
        offset = file["features"].id.get_chunk_info(0).byte_offset
    layouts.write_uni2(tmp_path, "a")
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 30)
    with pytest.raises(ValueError, match=r"readable HDF5, but slide 's.1' in .*s.1.h5 is not"):
        open_store(tmp_path).read("s.1")


@pytest.mark.parametrize("overlap", [64, "None"])
def test_hdf5_store__trident_overlap__is_taken_off_the_pitch(overlap, tmp_path):
    layouts.write_trident(tmp_path, "s", 1, overlap=overlap)
    assert open_store(tmp_path).read("s").coords.pitch == (384 if overlap == 64 else 512)


def test_hdf5_store__stamp_without_unit__reads_without_coords_and_warns(tmp_path):
    layouts.write_stamp(tmp_path, "s", unit=None)
    with pytest.warns(UserWarning, match="must have a file attribute unit='um'"):
        stored = open_store(tmp_path).read("s")
    assert stored.coords is None
    assert len(stored.features) == 5


def test_hdf5_store__unknown_unit__is_refused(tmp_path):
    layouts.write_stamp(tmp_path, "s", unit="mm")
    with pytest.raises(ValueError, match=r"must be 'um' or 'px', but it is 'mm' in .*s.h5"):
        open_store(tmp_path).read("s")


def test_hdf5_store__float16__is_read_as_stored_and_as_float32(tmp_path):
    layouts.write_trident(tmp_path, "s", dtype=np.float16)
    store = open_store(tmp_path)
    assert str(store.read_stored("s").features.dtype) == "torch.float16"
    assert str(store.read("s").features.dtype) == "torch.float32"


def test_process_file__same_process__opens_once(tmp_path):
    file = ProcessFile(layouts.write_acmil(tmp_path / "a.h5", {"s": 2}))
    assert file.handle() is file.handle()


def test_process_file__pickled__opens_anew(tmp_path):
    file = ProcessFile(layouts.write_acmil(tmp_path / "a.h5", {"s": 2}))
    handle = file.handle()
    copy = pickle.loads(pickle.dumps(file))
    assert copy.handle() is not handle
    assert list(copy.handle()) == ["s"]


def test_process_file__other_process__closes_the_inherited_handle(tmp_path, monkeypatch):
    file = ProcessFile(layouts.write_acmil(tmp_path / "a.h5", {"s": 2}))
    inherited = file.handle()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert file.handle() is not inherited
    assert not inherited
    assert list(file.handle()) == ["s"]


def test_contents__each_kind_of_file__is_told_by_its_entries(tmp_path):
    bag = layouts.write_uni2(tmp_path, "a")
    assert contents(bag) == "bag"
    assert contents(layouts.write_clam_patches(tmp_path, "a")) == "coords"
    assert contents(layouts.write_acmil(tmp_path / "b.h5", {"s": 2})) == "groups"
    assert contents(layouts.write_trident_slide_embedding(tmp_path, "a")) == "slide embedding"
    assert contents(layouts.write_hdf5(tmp_path / "c.h5", {"x": 1})) == "unknown"
