import pytest

from mil_anchor.failure import in_one_line, last_exception, read_error


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("one\ntwo\n\n", "two"),
        (
            "Traceback (most recent call last):\n  File\n    f()\n    ^^^\nKeyError: 1\n",
            "KeyError: 1",
        ),
        (
            "Traceback (most recent call last):\n  a\nKeyError: 1\n\nThe above exception was\n\n"
            "Traceback (most recent call last):\n  b\nHydraError: in\n  'x'\nfull_key: y\n",
            "HydraError: in 'x' full_key: y",
        ),
    ],
)
def test_last_exception__text__is_one_line(text, line):
    assert last_exception(text) == line


def test_read_error__folder__gives_the_exception_or_none(tmp_path):
    assert read_error(tmp_path) is None

    (tmp_path / "error.txt").write_text(
        "Traceback (most recent call last):\n  x\nKeyError: 1\ntwo\n"
    )

    assert read_error(tmp_path) == "KeyError: 1 two"


def test_in_one_line__exception_of_several_lines__is_its_type_and_text():
    assert in_one_line(ValueError("one\ntwo")) == "ValueError: one two"
