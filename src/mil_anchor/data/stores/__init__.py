"""Readers of every on-disk layout of tile features."""

from mil_anchor.data.stores.base import BagShape, Store, StoredBag
from mil_anchor.data.stores.checks import check_slides, check_widths, names_on_disk
from mil_anchor.data.stores.recognition import open_store

__all__ = [
    "BagShape",
    "Store",
    "StoredBag",
    "check_slides",
    "check_widths",
    "names_on_disk",
    "open_store",
]
