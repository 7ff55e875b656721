"""Several p-values: those of runs made one, those of data sets adjusted."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import combine_pvalues  # type: ignore[import-untyped]


def combine_p_values(p_values: Sequence[float | int], *, independent: bool) -> float:
    r"""One p-value of the same question asked in several runs: "is there a difference in any?".

    - independent, because the runs' test slides are disjoint (folds): Fisher's
      :math:`-2 \sum_k \ln p_k`, a :math:`\chi^2` of 2 K degrees of freedom.
    - not independent, because they share test slides (seeds): :math:`\min(1, 2 \bar p)`, which
      holds under any dependence.

    Two-sided p-values do not know of directions: runs that differ in opposite ways count as well.
    `paired_test` asks whether they agree.

    Args:
        p_values: One for each run.
        independent: Whether the runs' test slides are disjoint.

    Returns:
        The combined p-value; a single one as it is; NaN if one is NaN.

    Raises:
        ValueError: There is none, or one is not in [0, 1].

    Example:
        >>> combine_p_values([0.02, 0.03, 0.04], independent=False)
        0.06
        >>> round(combine_p_values([0.02, 0.03, 0.04], independent=True), 4)
        0.0016

    Source:
        Fisher, *Statistical Methods for Research Workers*, 1925. Stouffer's sum of normal quantiles
        is 1 as soon as one p-value is, which permutations give wherever two models agree on a fold.
        Vovk and Wang, *Combining p-values via averaging*, Biometrika 2020.
    """
    _check(p_values)
    if not p_values:
        raise ValueError("Combining needs a p-value, but none came. Give one for each run.")
    if len(p_values) == 1 or any(math.isnan(own) for own in p_values):
        return float(p_values[0]) if len(p_values) == 1 else math.nan
    if not independent:
        return min(1.0, 2 * float(np.mean(p_values)))
    if min(p_values) == 0:
        return 0.0  # its logarithm is infinite
    return float(combine_pvalues(p_values, method="fisher").pvalue)


def holm(p_values: Sequence[float | int]) -> list[float]:
    r"""Adjust p-values so that any false rejection among them has at most the nominal chance.

    In increasing order, :math:`\tilde p_{(k)} = \max_{j \le k} \min(1, (K - j + 1)\, p_{(j)})`.

    Args:
        p_values: One for each data set; NaN where there is none, which counts for nothing.

    Returns:
        The adjusted p-values in the same order; NaN stays.

    Raises:
        ValueError: One is not in [0, 1].

    Example:
        >>> holm([0.01, 0.04, float("nan"), 0.03])
        [0.03, 0.06, nan, 0.06]

    Source:
        Holm, *A simple sequentially rejective multiple test procedure*, Scandinavian Journal of
        Statistics 1979.
    """
    _check(p_values)
    adjusted = [math.nan] * len(p_values)
    order = sorted(
        (index for index, own in enumerate(p_values) if not math.isnan(own)),
        key=lambda index: p_values[index],
    )
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * float(p_values[index])))
        adjusted[index] = highest
    return adjusted


def _check(p_values: Sequence[float | int]) -> None:
    wrong = [own for own in p_values if not math.isnan(own) and not 0 <= own <= 1]
    if wrong:
        raise ValueError(f"A p-value must lie in [0, 1], but got {wrong}. Look where it is from.")
