"""DeLong's test of two AUROCs on the same bags."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer
from scipy.special import ndtr, ndtri  # type: ignore[import-untyped]

from mil_anchor.stats.cases import Cases, check_cases, check_level, check_probabilities
from mil_anchor.stats.measures import auroc, compared_classes, ordered_pairs

# Of the sums over classes and patients; a standard error of real bags is far above it.
_ROUNDING = 1e-12


class DeLong(NamedTuple):
    """Two AUROCs and their difference.

    Args:
        auroc_a: Of model a.
        auroc_b: Of model b.
        difference: ``auroc_a - auroc_b``.
        standard_error: Of the difference.
        interval: Of the difference.
        p_value: Two-sided, for a difference of zero.
    """

    auroc_a: float
    auroc_b: float
    difference: float
    standard_error: float
    interval: tuple[float, float]
    p_value: float


def delong_test(
    labels: Integer[np.ndarray, " bag"],
    probabilities_a: Float[np.ndarray, "_ ..."],
    probabilities_b: Float[np.ndarray, "_ ..."],
    *,
    groups: Sequence[Hashable] | None = None,
    bag_ids: Sequence[str] | None = None,
    level: float = 0.95,
) -> DeLong:
    r"""Test whether two models have the same AUROC, by how it depends on each bag.

    A bag of class c is ordered rightly against a share V of all bags of other classes, and a bag of
    another class against a share V of those of class c. With m bags of class c, n others and their
    AUROC :math:`\theta_c`, the influence of a bag is :math:`(V - \theta_c) / \sqrt{m (m - 1)}` or
    :math:`(V - \theta_c) / \sqrt{n (n - 1)}`. That of the macro AUROC is the mean over the classes,
    so that bags which count in several of them do not count as several; the variance of the
    difference is the sum over the bags of the squared differences of influence.

    With groups, the influences of a patient's bags are summed before they are squared, and in place
    of m / (m - 1) the factor counts the patients that have bags of class c, or others.

    Where the difference does not vary at all, because both models order every bag alike or each
    separates the classes, or ties them, as a whole, the p-value is 1 and the interval [0, 0] if the
    AUROCs are equal; if they are not, both are NaN, for then the bags do not say how far chance
    could have moved it. The test is asymptotic: with fewer than about ten bags on a side
    `permutation_test` or `bootstrap_interval` is the safer choice.

    Args:
        labels: Class of each bag, of one run.
        probabilities_a: Of each class, or of class 1 alone; likewise ``probabilities_b``. Of two
            classes, class 1 is compared.
        probabilities_b: See ``probabilities_a``.
        groups: The patient of each bag; by default every bag stands alone.
        bag_ids: Ids of the bags: one that comes twice is refused.
        level: Of the interval.

    Raises:
        ValueError: The inputs do not fit together, a bag comes twice, all bags are of one class, or
            one that occurs has less than two patients (or bags) with it or without it.

    Example:
        >>> labels = np.array([0, 0, 0, 1, 1, 1])
        >>> better = np.array([0.1, 0.2, 0.6, 0.5, 0.8, 0.9])
        >>> worse = np.array([0.5, 0.2, 0.6, 0.4, 0.8, 0.3])
        >>> test = delong_test(labels, better, worse)
        >>> round(test.difference, 3), round(test.p_value, 3)
        (0.333, 0.221)

    Source:
        DeLong, DeLong and Clarke-Pearson, *Comparing the areas under two or more correlated
        receiver operating characteristic curves*, Biometrics 1988, in Sun and Xu's form (see
        `ordered_pairs`). Patients: Obuchowski, *Nonparametric analysis of clustered ROC curve
        data*, Biometrics 1997; she has the factor of all patients in the cross term, we have the
        geometric mean of the other two. The macro average is ours: DeLong's variance in each class.
    """
    check_level(level)
    cases = check_cases(labels, groups=groups, bag_ids=bag_ids)
    one, other = (check_probabilities(own, labels) for own in (probabilities_a, probabilities_b))
    if one.shape != other.shape:
        raise ValueError(
            "Both models must tell the same classes, but their probabilities have the shapes "
            f"{one.shape} and {other.shape}."
        )
    classes = compared_classes(labels, one.shape[1])
    if not classes:
        raise ValueError(
            f"An AUROC needs bags of two classes, but all {len(labels)} have the label {labels[0]}."
            " Compare the accuracy, or larger test parts."
        )
    differences, influences = [], []
    for cls in classes:
        _check_patients(cases, cls)
        positive = labels == cls
        gained = ordered_pairs(one[:, cls], positive) - ordered_pairs(other[:, cls], positive)
        differences.append(gained[positive].mean() / (~positive).sum())
        influences.append(_influence(gained, positive, cases.group))
    difference = float(np.mean(differences))
    of_groups = np.bincount(cases.group, weights=np.mean(influences, axis=0))
    error = float(np.sqrt((of_groups**2).sum()))
    areas = auroc(labels, probabilities_a), auroc(labels, probabilities_b)
    if error < _ROUNDING:
        is_equal = abs(difference) < _ROUNDING
        interval = (0.0, 0.0) if is_equal else (math.nan, math.nan)
        return DeLong(*areas, difference, 0.0, interval, 1.0 if is_equal else math.nan)
    half = float(ndtri((1 + level) / 2)) * error
    p_value = 2 * float(ndtr(-abs(difference) / error))
    return DeLong(*areas, difference, error, (difference - half, difference + half), p_value)


def _influence(
    gained: Float64[np.ndarray, " bag"],
    positive: Bool[np.ndarray, " bag"],
    group: Integer[np.ndarray, " bag"],
) -> Float64[np.ndarray, " bag"]:
    influence = np.empty_like(gained)
    for own in (positive, ~positive):
        n_own, n_opposite, n_groups = own.sum(), (~own).sum(), len(np.unique(group[own]))
        # The numerator is exact, so that models without a difference have none of rounding.
        centred = (n_own * gained[own] - gained[own].sum()) / (n_own**2 * n_opposite)
        influence[own] = centred * np.sqrt(n_groups / (n_groups - 1))
    return influence


def _check_patients(cases: Cases, cls: int) -> None:
    for has, own in (("of", cases.labels == cls), ("not of", cases.labels != cls)):
        n_groups = len(np.unique(cases.group[own]))
        if n_groups < 2:
            raise ValueError(
                f"DeLong's variance needs two patients (or bags) {has} every class that occurs, "
                f"but class {cls} has {n_groups}. Use permutation_test, or larger test parts."
            )
