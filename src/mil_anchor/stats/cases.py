"""What is compared: bags with their labels and patients, and what models say of them."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Integer


class Cases(NamedTuple):
    """The bags of a comparison.

    Args:
        labels: Class of each bag.
        group: Which group, from 0, each bag belongs to: a patient, or the bag alone.
        n_groups: Number of groups.
    """

    labels: Integer[np.ndarray, " bag"]
    group: Integer[np.ndarray, " bag"]
    n_groups: int


def check_cases(
    labels: Integer[np.ndarray, " bag"],
    *,
    groups: Sequence[Hashable] | None,
    bag_ids: Sequence[str] | None,
) -> Cases:
    """Number the groups, and refuse bags that come twice.

    Args:
        labels: Class of each bag, from 0.
        groups: What each bag belongs to, such as its patient; by default every bag stands alone.
        bag_ids: Ids of the bags, where they are known.

    Raises:
        ValueError: There are no bags, a label is negative, the lengths differ, or an id comes
            twice.
    """
    if not len(labels) or labels.min() < 0:
        raise ValueError(
            "A comparison needs bags with classes from 0, but the labels are "
            f"{labels.tolist()[:10]}. Leave out bags without a label."
        )
    for name, own in (("groups", groups), ("bag_ids", bag_ids)):
        if own is not None and len(own) != len(labels):
            raise ValueError(
                f"{name} must have one entry for each of the {len(labels)} bags, but it has "
                f"{len(own)}. Take both from the same rows."
            )
    if bag_ids is not None and len(set(bag_ids)) < len(bag_ids):
        repeated = sorted({own for own in bag_ids if bag_ids.count(own) > 1})
        raise ValueError(
            f"Every bag must come once, but {repeated[:5]} come several times. Compare the models "
            "seed by seed: the predictions of several seeds are no further bags. Combine the "
            "p-values with combine_p_values."
        )
    names = list(range(len(labels))) if groups is None else list(groups)
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return Cases(labels, np.array([number[name] for name in names]), len(number))


def check_rows(values: np.ndarray, labels: Integer[np.ndarray, " bag"], *, what: str) -> None:
    """Demand one row for each label.

    Raises:
        ValueError: The lengths differ.
    """
    if len(values) != len(labels):
        raise ValueError(
            f"{what} must have one row for each of the {len(labels)} labels, but they have "
            f"{len(values)}. Sort both by bag id."
        )


def check_probabilities(
    probabilities: Float[np.ndarray, "_ ..."], labels: Integer[np.ndarray, " bag"]
) -> Float64[np.ndarray, "_ _"]:
    """The probabilities as a matrix of at least two classes.

    Args:
        probabilities: Of each class, or of class 1 alone.
        labels: Class of each bag.

    Raises:
        ValueError: A probability is outside of [0, 1] or NaN, the lengths differ, or a label has no
            probability.
    """
    check_rows(probabilities, labels, what="Probabilities")
    matrix = probabilities.astype(np.float64)
    if not ((matrix >= 0) & (matrix <= 1)).all():
        raise ValueError(
            "Probabilities must lie in [0, 1], but values outside or NaN came. Apply a softmax to "
            "logits; look for a diverged loss if they are NaN."
        )
    if matrix.ndim == 1:
        matrix = np.stack([1 - matrix, matrix], axis=1)
    if matrix.ndim != 2 or matrix.shape[1] < 2 or labels.max() >= matrix.shape[1]:
        raise ValueError(
            "Probabilities must be those of class 1, or have a column for each class, but with "
            f"labels up to {labels.max()} the shape {probabilities.shape} came."
        )
    return matrix


def check_level(level: float) -> None:
    """Refuse what is no confidence level.

    Raises:
        ValueError: It does not lie between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(
            f"level must lie between 0 and 1, such as 0.95, but got {level}. Divide percents by "
            "100."
        )
