"""Calibration: whether bags are classified rightly as often as their probability says."""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from mil_anchor.stats.cases import check_probabilities


class Bin(NamedTuple):
    """The bags whose confidence lies in an interval.

    Args:
        low: Lower edge, which belongs to it.
        high: Upper edge, which belongs to the last bin only.
        n_bags: How many bags there are.
        confidence: Mean probability of their predicted class; NaN without bags.
        accuracy: Share of them that is classified rightly; NaN without bags.
    """

    low: float
    high: float
    n_bags: int
    confidence: float
    accuracy: float


class Calibration(NamedTuple):
    """The expected calibration error, and the bins that it is a mean of."""

    error: float
    bins: list[Bin]


def calibration(
    labels: Integer[np.ndarray, " bag"],
    probabilities: Float[np.ndarray, "_ ..."],
    *,
    n_bins: int = 15,
) -> Calibration:
    r"""Compare the confidence in predicted classes with how often they are right.

    With B_k the bags whose highest probability lies in the k-th of equally wide bins,
    :math:`\mathrm{ECE} = \sum_k |B_k| / n \cdot |\mathrm{accuracy}_k - \mathrm{confidence}_k|`.

    With few bags it is above 0 by chance alone, the more so the fewer there are: compare models on
    the same bags only.

    Args:
        labels: Class of each bag, of one run.
        probabilities: Of each class, or of class 1 alone.
        n_bins: Number of bins between 0 and 1.

    Raises:
        ValueError: There are no bags or bins, or the inputs do not fit together.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]])
        >>> found = calibration(np.array([0, 0, 1, 0]), probabilities, n_bins=2)
        >>> round(found.error, 2), found.bins[1].n_bags, found.bins[1].accuracy
        (0.1, 4, 0.75)

    Source:
        Naeini, Cooper and Hauskrecht, *Obtaining well calibrated probabilities using Bayesian
        binning*, AAAI 2015; 15 bins as in Guo et al., *On calibration of modern neural networks*,
        ICML 2017. torchmetrics' ``MulticlassCalibrationError`` gives the same number, but for bags
        with a confidence of exactly 1, which have a 16th bin of their own there.
    """
    if not len(labels) or n_bins < 1:
        raise ValueError(
            "A calibration needs bags and bins, but got "
            f"{len(labels)} bag(s) and n_bins={n_bins}. 15 bins are usual."
        )
    matrix = check_probabilities(probabilities, labels)
    confidence, is_right = matrix.max(axis=1), matrix.argmax(axis=1) == labels
    edges = np.linspace(0, 1, n_bins + 1)
    index = np.searchsorted(edges[1:-1], confidence, side="right")
    bins = []
    for own, (low, high) in enumerate(pairwise(edges)):
        here = index == own
        means = (
            (float(confidence[here].mean()), float(is_right[here].mean()))
            if here.any()
            else (math.nan, math.nan)
        )
        bins.append(Bin(float(low), float(high), int(here.sum()), *means))
    gaps = [own.n_bags * abs(own.accuracy - own.confidence) for own in bins if own.n_bags]
    return Calibration(sum(gaps) / len(labels), bins)
