"""A progress bar over slides."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_Item = TypeVar("_Item")


def with_bar(items: Sequence[_Item], description: str, *, progress: bool) -> Iterable[_Item]:
    """Go through items behind a progress bar, which is gone at the end.

    Args:
        items: What to go through.
        description: What is done with them.
        progress: Whether to show the bar. It is shown on terminals only, on standard error.

    Returns:
        The items.
    """
    console = Console(stderr=True)
    # In a log file the bar would be an empty line.
    hidden = not progress or not console.is_terminal
    return track(items, description, console=console, transient=True, disable=hidden)
