"""Tests over runs: one difference for each seed and fold."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.special import gammaln, nctdtrinc  # type: ignore[import-untyped]
from scipy.stats import chi2, wilcoxon  # type: ignore[import-untyped]
from scipy.stats import t as student

from mil_anchor.stats.cases import check_level

# All signs of so many differences are counted; of more, this many are drawn.
_MOST_COUNTED = 20
_N_DRAWN = 2**16
# Sums in another order, and differences of equal measures, differ by less than this share.
_ROUNDING = 1e-12
# Beyond, scipy's inverse of the noncentral t becomes inaccurate and slow, and its limit is exact
# to 1e-3.
_LARGE_T = 1000.0


class PairedTest(NamedTuple):
    """What differences over runs say.

    Args:
        mean: Their mean.
        interval: Student's t interval of the mean.
        wilcoxon_p: Two-sided p-value of Wilcoxon's signed-rank test.
        sign_flip_p: Two-sided p-value of the permutation of signs.
        effect: Hedges' g: the mean in standard deviations of the differences.
        effect_interval: Of the effect.
    """

    mean: float
    interval: tuple[float, float]
    wilcoxon_p: float
    sign_flip_p: float
    effect: float
    effect_interval: tuple[float, float]


def paired_test(
    differences: Sequence[float | int], *, level: float = 0.95, rounding: float = 0.0
) -> PairedTest:
    r"""Test whether a measure differs over runs that are paired by seed and fold.

    - ``sign_flip_p``: how many of the :math:`2^n` ways to flip signs give an absolute mean of at
      least the one observed; beyond 20 differences, of 65536 that are drawn (the same in every
      call), (b + 1) / 65537.
    - ``effect``: :math:`g = J(n - 1)\, \bar d / s` with
      :math:`J(\nu) = \Gamma(\nu / 2) / (\sqrt{\nu / 2}\, \Gamma((\nu - 1) / 2))`. Its interval is
      that of the population's :math:`\delta / \sigma`: those values for which the observed
      :math:`t = \sqrt n\, \bar d / s` is no surprise under the noncentral t.

    What is not defined: with one difference the interval is infinite and both p-values are 1. With
    less than three, or if all are equal, there is no effect size (NaN). If all are 0, the interval
    is [0, 0] and the p-values are 1. Five runs cannot have a p-value below 1/16.

    Args:
        differences: Measure with a plug-in minus measure without, one for each run: a seed, or a
            seed and fold. Runs whose training slides overlap are not independent, and their
            interval is too short.
        level: Of both intervals.
        rounding: Differences whose sizes differ by no more are equal, and below it they are 0.
            Metrics of float32 need 1e-6: else their last digits decide what is at least as large
            as the difference observed.

    Raises:
        ValueError: There is no difference, or one is not finite.

    Example:
        >>> test = paired_test([0.03, 0.01, 0.02, 0.04, -0.01])
        >>> round(test.mean, 3), [round(edge, 3) for edge in test.interval]
        (0.018, [-0.006, 0.042])
        >>> test.sign_flip_p, test.wilcoxon_p, round(test.effect, 2)
        (0.1875, 0.1875, 0.75)

    Source:
        Wilcoxon 1945, by ``scipy.stats.wilcoxon`` (zeros are dropped; exact for up to 50
        differences, with ties for up to 13); Fisher, *The Design of Experiments*, 1935,
        section 21 (sign flips); Hedges, *Distribution theory for Glass's estimator of effect size*,
        1981 (J); Cumming and Finch 2001 (intervals by the noncentral t). Overlap: Nadeau and
        Bengio, *Inference for the generalization error*, 2003.
    """
    check_level(level)
    own = np.array(differences, dtype=np.float64)
    if not len(own) or not np.isfinite(own).all():
        raise ValueError(
            f"A paired test needs finite differences, but got {list(differences)}. Leave out runs "
            "in which the measure is not defined."
        )
    largest = float(np.abs(own).max())
    rounding = max(rounding, _ROUNDING * largest)
    own = _tied(own, rounding)
    n, mean = len(own), float(own.mean())
    is_constant = float(np.ptp(own)) <= rounding
    spread = 0.0 if is_constant else float(own.std(ddof=1))
    half = math.inf
    if n > 1:
        half = float(student.ppf((1 + level) / 2, n - 1)) * spread / math.sqrt(n)
    effect, effect_interval = math.nan, (math.nan, math.nan)
    if n > 2 and not is_constant:
        effect = _correction(n - 1) * mean / spread
        effect_interval = _effect_interval(math.sqrt(n) * mean / spread, n, level)
    return PairedTest(
        mean,
        (mean - half, mean + half),
        float(wilcoxon(own).pvalue) if own.any() else 1.0,
        _sign_flip_p(own, rounding),
        effect,
        effect_interval,
    )


def _tied(differences: Float64[np.ndarray, " run"], rounding: float) -> Float64[np.ndarray, " run"]:
    """The differences, those equal in size that only rounding tells apart."""
    tied, size = np.zeros_like(differences), 0.0
    for index in np.argsort(np.abs(differences)):
        if abs(differences[index]) - size > rounding:
            size = abs(differences[index])
        tied[index] = np.copysign(size, differences[index])
    return tied


def _sign_flip_p(differences: Float64[np.ndarray, " run"], rounding: float) -> float:
    if len(differences) <= _MOST_COUNTED:
        # The first difference keeps its sign: the other half is this one with all signs flipped.
        sums = differences[:1]
        for own in differences[1:]:
            sums = np.concatenate([sums + own, sums - own])
    else:
        generator = np.random.default_rng(0)
        sums = np.zeros(_N_DRAWN + 1)
        for own in differences:
            signs = generator.choice([-1.0, 1.0], len(sums))
            signs[0] = 1  # what was observed is one of them
            sums += signs * own
    observed = abs(differences.sum())
    tolerance = rounding * len(differences)
    return float((np.abs(sums) >= observed - tolerance).mean())


def _correction(degrees: int) -> float:
    """Hedges' J, which makes the effect size unbiased."""
    log = gammaln(degrees / 2) - gammaln((degrees - 1) / 2) - math.log(degrees / 2) / 2
    return float(np.exp(log))


def _effect_interval(t: float, n: int, level: float) -> tuple[float, float]:
    tails = ((1 + level) / 2, (1 - level) / 2)
    if abs(t) > _LARGE_T:
        # The normal part of the noncentral t is nothing beside its chi part.
        edges = sorted(abs(t) * math.sqrt(chi2.ppf(tail, n - 1) / (n - 1)) for tail in tails)
        edges = edges if t > 0 else [-edges[1], -edges[0]]
    else:
        edges = [float(nctdtrinc(n - 1, tail, t)) for tail in tails]
    return edges[0] / math.sqrt(n), edges[1] / math.sqrt(n)
