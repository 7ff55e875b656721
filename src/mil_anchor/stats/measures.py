"""The measures that are compared, in float64: AUROC and macro F1, as `bag_metrics` defines them."""

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer
from scipy.stats import rankdata  # type: ignore[import-untyped]

from mil_anchor.stats.cases import check_probabilities, check_rows


def auroc(labels: Integer[np.ndarray, " bag"], probabilities: Float[np.ndarray, "_ ..."]) -> float:
    """One-vs-rest AUROC, averaged over the classes that have both positive and negative bags.

    With two classes it is the AUROC of class 1.

    Args:
        labels: Class of each bag.
        probabilities: Of each class, or of class 1 alone.

    Returns:
        The area, in [0, 1]; NaN if all bags are of one class.

    Raises:
        ValueError: The probabilities are none, or not one for each label.

    Example:
        >>> auroc(np.array([0, 1, 1]), np.array([0.4, 0.9, 0.4]))
        0.75
    """
    matrix = check_probabilities(probabilities, labels)
    areas = []
    for cls in compared_classes(labels, matrix.shape[1]):
        positive = labels == cls
        n_positive = int(positive.sum())
        rank_sum = rankdata(matrix[:, cls])[positive].sum()
        n_pairs = n_positive * (len(labels) - n_positive)
        areas.append((rank_sum - n_positive * (n_positive + 1) / 2) / n_pairs)
    return float(np.mean(areas)) if areas else float("nan")


def macro_f1(labels: Integer[np.ndarray, " bag"], predictions: Integer[np.ndarray, " _"]) -> float:
    """F1, averaged over the classes that occur in the labels or in the predictions.

    Args:
        labels: Class of each bag.
        predictions: Predicted class of each bag.

    Returns:
        The score, in [0, 1].

    Raises:
        ValueError: There is not one prediction for each label.

    Example:
        >>> round(macro_f1(np.array([0, 1, 1]), np.array([0, 1, 0])), 3)
        0.667
    """
    check_rows(predictions, labels, what="Predictions")
    n_classes = int(max(labels.max(), predictions.max())) + 1
    hits = np.bincount(labels[labels == predictions], minlength=n_classes)
    counts = np.stack([hits, np.bincount(predictions, minlength=n_classes)]).astype(np.float64)
    return float(f1_of_counts(counts, np.bincount(labels, minlength=n_classes)))


def compared_classes(labels: Integer[np.ndarray, " bag"], n_classes: int) -> list[int]:
    """The classes whose AUROC is defined; class 1 stands for both of two."""
    classes = [1] if n_classes == 2 else range(n_classes)
    return [cls for cls in classes if 0 < (labels == cls).sum() < len(labels)]


def ordered_pairs(
    scores: Float64[np.ndarray, " bag"], positive: Bool[np.ndarray, " bag"]
) -> Float64[np.ndarray, " bag"]:
    """How many bags of the other side each bag is ordered rightly against; a tie is half a bag.

    With the mid-rank R of a bag among all and its mid-rank S on its own side, that is R - S for a
    positive bag and (number of positive bags) - (R - S) for a negative one: whole and half numbers,
    exact in float64.

    Source: Sun and Xu, *Fast implementation of DeLong's algorithm for comparing the areas under
    correlated receiver operating characteristic curves*, IEEE Signal Processing Letters 2014.
    """
    below: Float64[np.ndarray, " bag"] = rankdata(scores)
    below[positive] -= rankdata(scores[positive])
    below[~positive] -= rankdata(scores[~positive])
    below[~positive] = positive.sum() - below[~positive]
    return below


def f1_of_counts(
    counts: Float64[np.ndarray, "*many 2 cls"], n_of_class: Integer[np.ndarray, " cls"]
) -> Float64[np.ndarray, "*many"]:
    """Macro F1 of the numbers of right and of all predictions of each class."""
    right, predicted = counts[..., 0, :], counts[..., 1, :]
    size = predicted + n_of_class
    of_class = np.divide(2 * right, size, out=np.zeros_like(size), where=size > 0)
    return np.asarray(of_class.sum(axis=-1) / (size > 0).sum(axis=-1), dtype=np.float64)
