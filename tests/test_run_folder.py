import pytest
import torch

from mil_anchor.data.bags import Bag
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.data.labels import read_labels
from mil_anchor.run_folder import prepare_folder, read_cases, write_parts

_LEFT = ("attention.h5", "predictions.csv", "heatmaps/a.png", "checkpoints/best.ckpt")


def _left_in(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left")
    return folder


@pytest.mark.parametrize(("resume", "begun"), [(True, ()), (False, ("checkpoints/last.ckpt",))])
def test_prepare_folder__run_that_is_not_continued__leaves_nothing_behind(tmp_path, resume, begun):
    prepare_folder(tmp_path, {"resume": True, "data": "one"})
    _left_in(tmp_path, *_LEFT, *begun)

    assert prepare_folder(tmp_path, {"resume": resume, "data": "other"}) is None

    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert "other" in (tmp_path / "config.yaml").read_text()


def test_prepare_folder__run_with_a_checkpoint__keeps_what_it_wrote(tmp_path):
    prepare_folder(tmp_path, {"resume": True, "data": "one"})
    names = (*_LEFT, "checkpoints/last.ckpt")
    _left_in(tmp_path, *names)

    assert prepare_folder(tmp_path, {"resume": True, "data": "one"}) is None

    assert all((tmp_path / name).exists() for name in names)


def test_prepare_folder__folder_that_is_no_runs__keeps_what_is_in_it(tmp_path):
    _left_in(tmp_path, *_LEFT)
    prepare_folder(tmp_path, {"resume": True})
    assert all((tmp_path / name).exists() for name in _LEFT)


def _data(train, val):
    bags = [
        [Bag(torch.zeros(1, 2), index, name) for index, name in enumerate(names)]
        for names in (train, val)
    ]
    return BagDataModule(*bags)


def test_write_parts__bags_of_patients__are_read_back_with_them(tmp_path):
    data = _data("ab", "cd")
    write_parts(tmp_path / "split.csv", data)
    assert read_cases(tmp_path) == {}

    data.cases = {"a": "p", "b": "p", "c": "q", "d": "r"}
    write_parts(tmp_path / "split.csv", data)

    assert read_cases(tmp_path) == data.cases
    assert read_labels(tmp_path / "split.csv").cases == ["p", "p", "q", "r"]


def test_write_parts__run_to_be_continued_with_other_parts__is_refused(tmp_path):
    file = tmp_path / "split.csv"
    write_parts(file, _data("ab", "cd"))
    write_parts(file, _data("ab", "ce"))  # nothing was trained yet
    assert file.read_text() == "slide_id,label,split\na,0,train\nb,1,train\nc,0,val\ne,1,val\n"

    _left_in(tmp_path, "checkpoints/last.ckpt")
    write_parts(file, _data("ab", "ce"))
    with pytest.raises(ValueError, match=r"begun with, but those of the data differ from .*split"):
        write_parts(file, _data("ac", "be"))
    assert "b,1,train" in file.read_text()
