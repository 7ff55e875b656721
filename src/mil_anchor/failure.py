"""``error.txt``: why the run of a folder has failed."""

import traceback
from collections.abc import Iterable
from itertools import dropwhile
from pathlib import Path

ERROR_FILE = "error.txt"


def read_error(folder: Path) -> str | None:
    """Why the run of a folder has failed, in one line; None if it does not say."""
    file = folder / ERROR_FILE
    return last_exception(file.read_text(errors="replace")) if file.exists() else None


def last_exception(text: str) -> str:
    r"""The exception that a traceback ends with, in one line; the last line of other text.

    Example:
        >>> last_exception("Traceback (most recent call last):\n  File ...\nKeyError: one\ntwo")
        'KeyError: one two'
    """
    lines = text.strip().splitlines()
    begins = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent")]
    after: Iterable[str] = lines[-1:]
    if begins:
        after = dropwhile(lambda line: line.startswith(" "), lines[begins[-1] + 1 :])
    return " ".join(" ".join(after).split())


def in_one_line(error: BaseException) -> str:
    """An exception as the last line of its traceback would say it."""
    return " ".join("".join(traceback.format_exception_only(error)).split())
