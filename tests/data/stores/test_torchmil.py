import numpy as np
import pytest
from torchmil.datasets import ProcessedMILDataset

from mil_anchor.data.stores import open_store
from tests.data.stores import layouts


@pytest.mark.parametrize(
    ("writer", "suffix"),
    [(layouts.write_torchmil, ".npy"), (layouts.write_torchmil_h5_folders, ".h5")],
)
def test_torchmil_store__against_torchmil__gives_the_same(writer, suffix, tmp_path):
    for slide_id, n_instances in (("a.1", 4), ("b", 1)):
        writer(tmp_path, slide_id, n_instances)
    names = ("features", "labels", "inst_labels", "coords")
    theirs = ProcessedMILDataset(
        **{f"{name}_path": f"{tmp_path / name}/" for name in names},
        bag_names=["a.1", "b"],
        bag_keys=["X", "Y", "y_inst", "coords"],
        file_ext=suffix,
        verbose=False,
    )
    store = open_store(tmp_path)
    for index, slide_id in enumerate(["a.1", "b"]):
        stored = store.read(slide_id)
        assert np.array_equal(stored.features, theirs[index]["X"])
        assert np.array_equal(stored.instance_label, theirs[index]["y_inst"].ravel())
        assert store.label(slide_id) == str(int(theirs[index]["Y"]))
    assert np.array_equal(store.read("a.1").coords.xy, theirs[0]["coords"])


def test_torchmil_store__features_alone__are_enough(tmp_path):
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "s.npy", layouts.features_of("s"))
    store = open_store(tmp_path)
    stored = store.read("s")
    assert stored.coords is None
    assert stored.instance_label is None
    assert store.label("s") is None


def test_torchmil_store__arrays_in_one_folder__are_read(tmp_path):
    np.save(tmp_path / "s.npy", layouts.features_of("s").astype(">f2"))
    assert np.array_equal(open_store(tmp_path).read("s").features, layouts.features_of("s"))


def test_torchmil_store__broken_array__names_slide_and_file(tmp_path):
    path = layouts.write_torchmil(tmp_path, "s", 90)
    store = open_store(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:20], whole[:-1]):
        path.write_bytes(content)
        for look in (store.shape, store.read):
            with pytest.raises(
                ValueError, match=r"without pickle, but slide 's' in .*s.npy is not"
            ):
                look("s")


def test_torchmil_store__pickled_objects__are_refused(tmp_path):
    path = layouts.write_torchmil(tmp_path, "s")
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"without pickle, but slide 's'"):
        open_store(tmp_path).read("s")


def test_torchmil_store__text__is_no_array_of_numbers(tmp_path):
    path = layouts.write_torchmil(tmp_path, "s")
    np.save(path, np.array([["a", "b"]]))
    with pytest.raises(ValueError, match=r"must hold numbers, but slide 's' has <U1"):
        open_store(tmp_path).read("s")


def test_torchmil_store__hdf5_without_its_data_set__names_slide_and_file(tmp_path):
    layouts.write_torchmil_h5_folders(tmp_path, "s")
    layouts.write_hdf5(tmp_path / "coords" / "s.h5", {"places": np.ones((5, 2))})
    with pytest.raises(ValueError, match=r"slide 's' in .*coords/s.h5 is not"):
        open_store(tmp_path).read("s")


def test_torchmil_store__coords_of_other_length__names_the_slide(tmp_path):
    layouts.write_torchmil(tmp_path, "s")
    np.save(tmp_path / "coords" / "s.npy", np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"slide 's' has shape \(4, 2\) for 5 tiles"):
        open_store(tmp_path).read("s")
