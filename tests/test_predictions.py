import numpy as np
import pytest

from mil_anchor.module import Prediction
from mil_anchor.predictions import read_predictions, read_tested, write_predictions

_ROWS = [
    ("val", Prediction("b", 1, [0.25, 0.75])),
    ("test", Prediction("b", 0, [0.1 + 0.2, 0.7])),
    ("test", Prediction("a, right", 1, [0.0, 1.0])),
]


def test_read_predictions__what_a_run_writes__comes_back_exactly(tmp_path):
    file = tmp_path / "predictions.csv"
    write_predictions(file, _ROWS)

    read = read_predictions(file)

    assert read.bag_ids == ["b", "b", "a, right"]
    assert read.labels.tolist() == [1, 0, 1]
    assert read.parts == ["val", "test", "test"]
    assert read.probabilities.dtype == np.float64
    assert read.probabilities.tolist() == [[0.25, 0.75], [0.1 + 0.2, 0.7], [0.0, 1.0]]


def test_of_part__bags_in_any_order__are_sorted_by_id(tmp_path):
    file = tmp_path / "predictions.csv"
    write_predictions(file, _ROWS)

    tested = read_predictions(file).of_part("test")

    assert tested.bag_ids == ["a, right", "b"]
    assert tested.parts == ["test", "test"]
    assert tested.labels.tolist() == [1, 0]
    assert tested.probabilities.tolist() == [[0.0, 1.0], [0.1 + 0.2, 0.7]]
    nothing = read_predictions(file).of_part("train")
    assert (nothing.bag_ids, nothing.labels.tolist()) == ([], [])
    assert nothing.probabilities.shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("bag_id,label,split,prob_0,prob_1\n", "needs a header and a row"),
        ("bag_id,label,split,prob_0\na,0,test,1\n", r"lacks \['prob_1'\]"),
        ("bag_id,label,prob_0,prob_1\na,0,1,0\n", r"lacks \['split'\]"),
        ("bag_id,label,split,prob_0,prob_1\na,x,test,1,0\n", "Labels must be whole numbers.*'x'"),
        ("bag_id,label,split,prob_0,prob_1\na,0,test,,0\n", "probabilities numbers"),
        ("bag_id,label,split,prob_0,prob_1\na,0,test,nan,0\n", "diverged loss"),
        ("bag_id,label,split,prob_0,prob_1\na,2,test,1,0\n", "labels below their number"),
        (
            "bag_id,label,split,prob_0,prob_1\na,0,test,1,0\na,0,val,1,0\na,0,test,1,0\n",
            r"A bag must come once in a part, but .* has \['a'\] twice",
        ),
    ],
)
def test_read_predictions__file_that_is_none__is_refused(tmp_path, text, why):
    file = tmp_path / "predictions.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=why):
        read_predictions(file)


def test_read_predictions__no_file__is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a file, but .*predictions\.csv is none"):
        read_predictions(tmp_path / "predictions.csv")


@pytest.mark.parametrize(("n_rows", "tested"), [(0, None), (1, None), (3, ["a, right", "b"])])
def test_read_tested__folder__has_those_of_test_bags_or_none(tmp_path, n_rows, tested):
    if n_rows:
        write_predictions(tmp_path / "predictions.csv", _ROWS[:n_rows])

    found = read_tested(tmp_path)

    assert (found and found.bag_ids) == tested
