import csv
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from mil_anchor.data.labels import read_labels
from mil_anchor.data.split_files import read_split
from mil_anchor.data.stores import open_store
from mil_anchor.data.synthetic import SyntheticCohort, write_cohort


@pytest.fixture
def cohort():
    return SyntheticCohort("camelyon_like", n_slides=24)


def _contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_write_cohort__clam__has_the_layout_of_clam(cohort, tmp_path):
    assert write_cohort(cohort, tmp_path / "a" / "b", progress=False) == tmp_path / "a" / "b"
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == [
        "cohort.json",
        "h5_files",
        "labels.csv",
        "splits_0.csv",
    ]
    assert len(list((folder / "h5_files").iterdir())) == 24
    stored = cohort.read_stored(5)
    with h5py.File(folder / "h5_files" / "slide_0005.h5") as file:
        features, coords = file["features"], file["coords"]
        assert (features.dtype, features.shape) == (np.float32, tuple(stored.features.shape))
        assert (features.chunks, coords.chunks) == ((32, 32), (32, 2))
        assert (coords.dtype, coords.shape) == (np.int32, (len(stored.features), 2))
        for name, entry in (
            ("features", stored.features),
            ("coords", stored.coords.xy),
            ("instance_label", stored.instance_label),
            ("lesion", stored.lesion),
            ("coverage", stored.coverage),
        ):
            np.testing.assert_array_equal(file[name], entry)


def test_write_cohort__tables__are_those_of_clam(cohort, tmp_path):
    write_cohort(cohort, tmp_path, progress=False)
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case_id", "slide_id", "label"]
    assert rows[4] == ["case_0003", "slide_0003", "positive"]
    with (tmp_path / "splits_0.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["", "train", "val", "test"]


def test_write_cohort__read_back_by_the_readers__is_the_cohort(cohort, tmp_path):
    store = open_store(write_cohort(cohort, tmp_path, progress=False))
    assert store.slide_ids == cohort.bag_ids
    for index, slide_id in enumerate(cohort.bag_ids):
        bag, stored = cohort.read(index), store.read(slide_id)
        assert torch.equal(stored.features, bag.features)
        assert torch.equal(stored.coords.xy, bag.coords.xy)
        assert (stored.coords.unit, stored.coords.pitch) == ("px", 256)
    table = read_labels(tmp_path / "labels.csv")
    assert replace(table, parts=cohort.table.parts) == cohort.table
    assert read_split(tmp_path / "splits_0.csv", table, val_fraction=0.2, seed=0) == cohort.parts


def test_write_cohort__packed__is_a_packed_store(cohort, tmp_path):
    path = write_cohort(cohort, tmp_path, layout="packed", progress=False)
    assert path == tmp_path / "features.h5"
    store = open_store(path)
    assert store.slide_ids == cohort.bag_ids
    stored, drawn = store.read("slide_0005"), cohort.read_stored(5)
    torch.testing.assert_close(stored.features, drawn.features, atol=0, rtol=2**-10)
    assert torch.equal(stored.lesion, drawn.lesion)
    assert torch.equal(stored.coverage, drawn.coverage)
    assert store.label("slide_0005") == "positive"
    assert (tmp_path / "labels.csv").exists()


def test_write_cohort__stopped_and_started_again__is_as_if_never_stopped(
    cohort, tmp_path, monkeypatch
):
    write_cohort(cohort, tmp_path / "whole", progress=False)
    part, opened = tmp_path / "part", []

    class Stopping(h5py.File):
        def create_dataset(self, name, **arguments):
            opened.append(self.filename)
            if len(set(opened)) == 10 and name == "lesion":
                raise OSError("disk full")
            return super().create_dataset(name, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(h5py, "File", Stopping)
        with pytest.raises(OSError, match="disk full"):
            write_cohort(cohort, part, progress=False)
    first = part / "h5_files" / "slide_0000.h5"
    assert len(list((part / "h5_files").glob("*.h5"))) == 9
    changed = first.stat().st_mtime_ns
    write_cohort(cohort, part, progress=False)
    assert first.stat().st_mtime_ns == changed
    assert _contents(part) == _contents(tmp_path / "whole")


def test_write_cohort__killed_before_the_first_file__starts_again(cohort, tmp_path):
    (tmp_path / "cohort.json.partial").write_text("{")
    write_cohort(cohort, tmp_path, progress=False)
    assert not (tmp_path / "cohort.json.partial").exists()


def test_write_cohort__both_layouts__share_a_folder(cohort, tmp_path):
    write_cohort(cohort, tmp_path, progress=False)
    write_cohort(cohort, tmp_path, layout="packed", progress=False)
    assert {"h5_files", "features.h5"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "other",
    [
        SyntheticCohort("camelyon_like", n_slides=24, seed=1),
        SyntheticCohort("camelyon_like", n_slides=25),
        SyntheticCohort("bracs_like", n_slides=24),
        SyntheticCohort("camelyon_like", "small", n_slides=24),
    ],
)
def test_write_cohort__folder_of_another_cohort__is_refused(cohort, tmp_path, other):
    write_cohort(cohort, tmp_path, progress=False)
    before = _contents(tmp_path)
    with pytest.raises(ValueError, match=r"same cohort, but .*cohort\.json describes another one"):
        write_cohort(other, tmp_path, progress=False)
    assert _contents(tmp_path) == before


def test_write_cohort__folder_of_something_else__is_refused(cohort, tmp_path):
    (tmp_path / "labels.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"it holds \['labels.csv'\]. Give another folder"):
        write_cohort(cohort, tmp_path, progress=False)
    assert (tmp_path / "labels.csv").read_text() == "mine"


def test_write_cohort__unknown_layout__is_refused(cohort, tmp_path):
    with pytest.raises(ValueError, match="layout must be 'clam' or 'packed', but 'pt' came"):
        write_cohort(cohort, tmp_path / "new", layout="pt", progress=False)
    assert not (tmp_path / "new").exists()


def test_write_cohort__too_small_to_split__is_refused(tmp_path):
    with pytest.raises(ValueError, match="val"):
        write_cohort(SyntheticCohort(n_slides=6), tmp_path, progress=False)


def test_write_cohort__progress__goes_to_standard_error(cohort, tmp_path, capsys):
    write_cohort(cohort, tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "writing slides" in captured.err
