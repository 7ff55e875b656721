import pickle

import h5py
import numpy as np
import pytest

from mil_anchor.data.stores import open_store
from tests.data.stores import layouts


def test_grouped_store__acmil_file__has_shapes_coords_and_raw_labels(tmp_path):
    store = open_store(layouts.write_acmil(tmp_path / "a.h5", {"b.1": 4, "a": 1}, label=6))
    assert store.slide_ids == ["a", "b.1"]
    assert store.shape("b.1") == (4, layouts.WIDTH)
    assert store.label("b.1") == "6"
    stored = store.read_stored("b.1")
    assert stored.features.numpy().dtype == np.float16
    assert stored.coords.pitch == 256
    assert store.read("a").features.shape == (1, layouts.WIDTH)
    assert store.file("a") == tmp_path / "a.h5"


def test_grouped_store__arrays_beside_the_groups__are_no_slides(tmp_path):
    path = layouts.write_acmil(tmp_path / "a.h5", {"s": 2})
    with h5py.File(path, "a") as file:
        file["statistics"] = np.ones(3)
    assert open_store(path).slide_ids == ["s"]


def test_grouped_store__slide_without_label__has_none(tmp_path):
    path = layouts.write_acmil(tmp_path / "a.h5", {"s": 2})
    with h5py.File(path, "a") as file:
        del file["s"].attrs["label"]
    assert open_store(path).label("s") is None


def test_grouped_store__broken_slide__is_named(tmp_path):
    path = layouts.write_acmil(tmp_path / "a.h5", {"s": 2})
    with h5py.File(path, "a") as file:
        file["t/feat"] = np.empty((0, layouts.WIDTH), np.float16)
        file.create_group("u")
    store = open_store(path)
    with pytest.raises(ValueError, match="at least one tile, but slide 't'"):
        store.shape("t")
    with pytest.raises(ValueError, match=r"but slide 'u' has \[\] in"):
        store.read("u")


def test_grouped_store__pickled_after_a_read__reads(tmp_path):
    store = open_store(layouts.write_acmil(tmp_path / "a.h5", {"s": 2}))
    store.read("s")
    copy = pickle.loads(pickle.dumps(store))
    assert np.array_equal(copy.read("s").features, store.read("s").features)
