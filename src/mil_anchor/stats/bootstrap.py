"""Bootstrap intervals that draw whole patients."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Integer

from mil_anchor.stats.cases import Cases, check_cases, check_level, check_probabilities

Measure = Callable[[Integer[np.ndarray, " bag"], Float64[np.ndarray, "bag cls"]], float]


class Bootstrap(NamedTuple):
    """A measure, or its difference between two models, and its interval.

    Args:
        estimate: The measure of all bags.
        interval: Percentiles of the resamples.
        n_undefined: Resamples that were left out: a class was gone, or the measure was NaN.
        n_resamples: How many were drawn.
    """

    estimate: float
    interval: tuple[float, float]
    n_undefined: int
    n_resamples: int


def bootstrap_interval(
    measure: Measure,
    labels: Integer[np.ndarray, " bag"],
    probabilities_a: Float[np.ndarray, "_ ..."],
    probabilities_b: Float[np.ndarray, "_ ..."] | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    bag_ids: Sequence[str] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Bootstrap:
    """Interval of a measure, or of its difference between two models, over patients.

    Each resample draws as many patients as there are, with replacement, and takes all bags of each;
    both models see the same ones. The interval has the percentiles of what is measured in them. A
    resample without one of the classes is left out and counted: there a macro average would be one
    of other classes. Where many are, the interval speaks of test parts that have all classes.

    Args:
        measure: What is measured, of labels and probabilities of all classes; NaN where it is not
            defined. Such as `auroc`.
        labels: Class of each bag, of one run.
        probabilities_a: Of each class, or of class 1 alone.
        probabilities_b: Of the model that is subtracted, if there is one.
        groups: The patient of each bag; by default every bag stands alone.
        bag_ids: Ids of the bags: one that comes twice is refused.
        level: Of the interval.
        n_resamples: How many resamples are drawn.
        seed: Of the resamples.

    Raises:
        ValueError: The inputs do not fit together, a bag comes twice, the measure of all bags is
            not defined, there is one patient only, or no resample is defined.

    Example:
        >>> from mil_anchor.stats import auroc
        >>> labels = np.arange(40) % 2
        >>> probabilities = (labels + np.sin(np.arange(40)) + 1) / 3
        >>> found = bootstrap_interval(auroc, labels, probabilities)
        >>> [round(number, 2) for number in (found.estimate, *found.interval)]
        [0.84, 0.71, 0.94]

    Source:
        Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13; whole clusters:
        Field and Welsh, *Bootstrapping clustered data*, 2007. ``scipy.stats.bootstrap`` draws no
        clusters.
    """
    check_level(level)
    cases = check_cases(labels, groups=groups, bag_ids=bag_ids)
    models = [check_probabilities(probabilities_a, labels)]
    if probabilities_b is not None:
        models.append(check_probabilities(probabilities_b, labels))
    if cases.n_groups < 2 or n_resamples < 1:
        raise ValueError(
            "A bootstrap needs two patients (or bags) and a resample, but got "
            f"{cases.n_groups} patient(s) and n_resamples={n_resamples}. Use a larger test part."
        )

    def measured(bags: Integer[np.ndarray, " _"]) -> float:
        values = [measure(labels[bags], own[bags]) for own in models]
        return values[0] - values[1] if len(values) == 2 else values[0]

    estimate = measured(np.arange(len(labels)))
    drawn = [
        measured(bags) if _has_all_classes(cases, bags) else float("nan")
        for bags in _resamples(cases, n_resamples, seed)
    ]
    defined = [value for value in drawn if value == value]
    if estimate != estimate or not defined:
        raise ValueError(
            f"A measure must be defined on all bags and in resamples, but it is {estimate} there "
            f"and defined in {len(defined)} of {n_resamples} resamples. Use a larger test part."
        )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    interval = float(low), float(high)
    return Bootstrap(float(estimate), interval, n_resamples - len(defined), n_resamples)


def _resamples(cases: Cases, n_resamples: int, seed: int) -> list[Integer[np.ndarray, " _"]]:
    by_group = np.argsort(cases.group, kind="stable")
    members = np.split(by_group, np.cumsum(np.bincount(cases.group))[:-1])
    drawn = np.random.default_rng(seed).integers(cases.n_groups, size=(n_resamples, cases.n_groups))
    return [np.concatenate([members[group] for group in row]) for row in drawn]


def _has_all_classes(cases: Cases, bags: Integer[np.ndarray, " _"]) -> bool:
    return len(np.unique(cases.labels[bags])) == len(np.unique(cases.labels))
