"""Whether a store holds what a table of slides asks for."""

import warnings
from collections import Counter
from collections.abc import Sequence

from mil_anchor.data.labels import slide_name
from mil_anchor.data.stores.base import Store
from mil_anchor.data.stores.progress import with_bar

_SHOWN = 10


def check_slides(store: Store, slide_ids: Sequence[str]) -> None:
    """Compare the slides of a table with those on disk.

    Slides on disk that the table does not name are reported by a warning: they are not used.

    Args:
        store: The store.
        slide_ids: All slides of the table.

    Raises:
        ValueError: If slides of the table are not in the store; the message lists them.
    """
    on_disk = store.slide_ids
    _refuse_missing(store, slide_ids, on_disk)
    unused = sorted(set(on_disk) - set(slide_ids))
    if unused:
        warnings.warn(
            f"{len(unused)} of {len(on_disk)} slides in {store.path} are in no row of the table "
            f"and are not used: {some(unused)}.",
            stacklevel=2,
        )


def some(names: Sequence[str], *, shown: int = _SHOWN) -> str:
    """The first names, for a message.

    Example:
        >>> some(["a", "b", "c"], shown=2) == "'a', 'b', ..."  # its dots would match anything
        True
    """
    return ", ".join(map(repr, names[:shown])) + (", ..." if len(names) > shown else "")


def names_on_disk(store: Store, slide_ids: Sequence[str]) -> list[str]:
    """The store's own names of the slides of a table.

    Tables lose the suffix of slide files (`mil_anchor.data.labels.slide_name`), but ``a.svs.h5`` is
    slide ``a.svs`` on disk.

    Args:
        store: The store.
        slide_ids: All slides of the table.

    Returns:
        A name for every slide: the one that the store has, where that is clear; else its own.
    """
    on_disk = store.slide_ids
    count = Counter(map(slide_name, on_disk))
    name_of = {short: name for name in on_disk if count[short := slide_name(name)] == 1}
    name_of |= {name: name for name in on_disk}
    return [name_of.get(slide_id, slide_id) for slide_id in slide_ids]


def check_widths(store: Store, slide_ids: Sequence[str], *, progress: bool = True) -> int:
    """Look at the shape of every slide, without reading its features.

    Args:
        store: The store.
        slide_ids: At least one slide.
        progress: Whether to show a progress bar when there are many slides.

    Returns:
        The feature width that all slides have.

    Raises:
        ValueError: If slides are missing, empty or broken, or differ in width; one message lists
            all of them.
    """
    if not slide_ids:
        raise ValueError(
            f"At least one slide must be given, but none of {store.path} is. Check the table."
        )
    _refuse_missing(store, slide_ids, store.slide_ids)
    broken: list[str] = []
    slides_of_width: dict[int, list[str]] = {}
    is_long = len(slide_ids) >= 200
    for slide_id in with_bar(slide_ids, "Checking slides", progress=progress and is_long):
        try:
            slides_of_width.setdefault(store.shape(slide_id).width, []).append(slide_id)
        except ValueError as error:
            broken.append(str(error))
    if broken:
        more = f"\n... and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise ValueError(
            f"All slides must be bags that can be read, but {len(broken)} of {len(slide_ids)} in "
            f"{store.path} are not. Drop them from the table or repair them:\n"
            + "\n".join(broken[:_SHOWN])
            + more
        )
    if len(slides_of_width) > 1:
        found = ", ".join(
            f"{width} in {len(slides)} slides {some(slides)}"
            for width, slides in sorted(slides_of_width.items())
        )
        raise ValueError(
            f"All slides must have one feature width, but in {store.path} there are {found}. "
            "Use features of one encoder only."
        )
    return next(iter(slides_of_width))


def _refuse_missing(store: Store, slide_ids: Sequence[str], on_disk: Sequence[str]) -> None:
    missing = sorted(set(slide_ids) - set(on_disk))
    if missing:
        raise ValueError(
            f"Every slide of the table must be in the store, but {len(missing)} of "
            f"{len(set(slide_ids))} are not in {store.path}: {some(missing)}. On disk are "
            f"{some(on_disk[:3])}, ... Extract them, drop them from the table, or correct their "
            "ids."
        )
