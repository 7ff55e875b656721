"""The paired permutation test of two macro F1 scores on the same bags."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Integer

from mil_anchor.stats.cases import Cases, check_cases, check_rows
from mil_anchor.stats.measures import f1_of_counts

# Two sums of the same F1 scores in another order differ by less.
_ROUNDING = 1e-12


class PermutationTest(NamedTuple):
    """The difference of two scores and its two-sided p-value.

    Args:
        difference: Score of model a minus that of model b.
        p_value: Two-sided, for predictions that could as well have come from the other model.
    """

    difference: float
    p_value: float


def permutation_test(
    labels: Integer[np.ndarray, " bag"],
    predictions_a: Integer[np.ndarray, " _"],
    predictions_b: Integer[np.ndarray, " _"],
    *,
    groups: Sequence[Hashable] | None = None,
    bag_ids: Sequence[str] | None = None,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> PermutationTest:
    """Test whether two models have the same macro F1, by swapping their predictions bag by bag.

    The p-value is the share of swaps whose absolute difference is at least the one observed. All
    swaps are counted where there are no more than ``n_permutations``; bags on which the models
    agree do not matter. Otherwise as many are drawn, and it is (b + 1) / (n_permutations + 1) for b
    of them: an exact test as well.

    Args:
        labels: Class of each bag, of one run.
        predictions_a: The predicted class of each bag; likewise ``predictions_b``.
        predictions_b: See ``predictions_a``.
        groups: The patient of each bag, whose bags are swapped together; by default every bag
            stands alone.
        bag_ids: Ids of the bags: one that comes twice is refused.
        n_permutations: How many swaps are made at most.
        seed: Of the swaps that are drawn.

    Returns:
        The difference of macro F1 (as `macro_f1` defines it) and its p-value; 0 and 1 where the
        models agree on all bags.

    Raises:
        ValueError: The inputs do not fit together, a bag comes twice, or no swap is allowed.

    Example:
        >>> labels = np.array([0, 0, 0, 1, 1, 1])
        >>> test = permutation_test(labels, labels, np.array([1, 1, 0, 1, 1, 0]))
        >>> round(test.difference, 3), test.p_value
        (0.514, 0.25)

    Source:
        Yeh, *More accurate tests for the statistical significance of result differences*, COLING
        2000. One added to both counts: Phipson and Smyth, *Permutation p-values should never be
        zero*, 2010. ``scipy.stats.permutation_test`` (``permutation_type="samples"``) gives the
        same numbers; here a swap is a row of a product of matrices, which is far faster.
    """
    cases = check_cases(labels, groups=groups, bag_ids=bag_ids)
    for name, own in (("predictions_a", predictions_a), ("predictions_b", predictions_b)):
        check_rows(own, labels, what=name)
    if n_permutations < 1:
        raise ValueError(
            f"n_permutations must be at least 1, but got {n_permutations}. 10000 is usual."
        )
    n_classes = int(max(labels.max(), predictions_a.max(), predictions_b.max())) + 1
    n_of_class = np.bincount(labels, minlength=n_classes)
    one, other = (_counts(cases, own, n_classes) for own in (predictions_a, predictions_b))
    gained = other - one
    gained = gained[(gained != 0).any(axis=(1, 2))]
    swaps = _swaps(len(gained), n_permutations, seed)
    moved = np.tensordot(swaps.astype(np.float64), gained, axes=1)
    scores = (
        f1_of_counts(one.sum(axis=0) + moved, n_of_class),
        f1_of_counts(other.sum(axis=0) - moved, n_of_class),
    )
    # The first swap leaves every prediction where it is.
    differences = scores[0] - scores[1]
    is_extreme = np.abs(differences) >= abs(differences[0]) - _ROUNDING
    return PermutationTest(float(differences[0]), float(is_extreme.mean()))


def _counts(
    cases: Cases, predictions: Integer[np.ndarray, " bag"], n_classes: int
) -> Float64[np.ndarray, "group 2 cls"]:
    """How often each class is predicted in a group: rightly, and at all."""
    counts = np.zeros((cases.n_groups, 2, n_classes))
    np.add.at(counts[:, 0], (cases.group, predictions), predictions == cases.labels)
    np.add.at(counts[:, 1], (cases.group, predictions), 1)
    return counts


def _swaps(n_groups: int, n_permutations: int, seed: int) -> Bool[np.ndarray, "swap group"]:
    """Which groups are swapped: none in the first row, then all other ways or some of them."""
    if 2**n_groups <= n_permutations:
        return (np.arange(2**n_groups)[:, None] >> np.arange(n_groups) & 1).astype(bool)
    drawn = np.random.default_rng(seed).random((n_permutations, n_groups)) < 0.5
    return np.concatenate([np.zeros((1, n_groups), dtype=bool), drawn])
