import math

import numpy as np
import pytest
import scipy.stats
from scipy.stats import binom

from mil_anchor.stats import auroc, bootstrap_interval, macro_f1
from tests.stats.drawing import equal_models


def _f1(labels, probabilities):
    return macro_f1(labels, probabilities.argmax(axis=1))


def _mean(labels, probabilities):
    return float(probabilities[:, 1].mean())


def test_bootstrap__bags_alone__agrees_with_scipy():
    labels, one, _, _ = equal_models(np.random.default_rng(0), n_of_class=60, n_classes=2)
    found = bootstrap_interval(_mean, labels, one, n_resamples=4000, level=0.9)
    expected = scipy.stats.bootstrap(
        (one[:, 1],), np.mean, method="percentile", confidence_level=0.9, n_resamples=4000, rng=1
    ).confidence_interval
    assert found.interval == pytest.approx(tuple(expected), abs=0.003)
    assert found.estimate == one[:, 1].mean()


def test_bootstrap__two_models__measures_both_in_the_same_resamples():
    labels, one, other, _ = equal_models(np.random.default_rng(0), n_of_class=20, n_classes=3)
    for measure in (auroc, _f1):
        found = bootstrap_interval(measure, labels, one, other, n_resamples=50)
        assert found.estimate == measure(labels, one) - measure(labels, other)
        assert found.interval[0] < found.interval[1]
        same = bootstrap_interval(measure, labels, one, one / 2, n_resamples=50)
        assert same[:2] == (0.0, (0.0, 0.0))
        swapped = bootstrap_interval(measure, labels, other, one, n_resamples=50)
        low, high = swapped.interval
        assert found.interval == pytest.approx((-high, -low))


def test_bootstrap__patients__are_drawn_whole():
    labels = np.array([0, 1, 0, 1, 0, 1, 1])
    patients = ["p", "p", "q", "q", "r", "r", "r"]
    seen = []

    def measure(labels, probabilities):
        seen.append((probabilities[:, 1] * 10).round().astype(int).tolist())
        return 0.0

    bootstrap_interval(measure, labels, np.arange(7) / 10, groups=patients, n_resamples=100)

    blocks = {(0, 1): "p", (2, 3): "q", (4, 5, 6): "r"}
    drawn = set()
    for bags in seen[1:]:
        names = []
        while bags:
            block = next(own for own in blocks if tuple(bags[: len(own)]) == own)
            names.append(blocks[block])
            bags = bags[len(block) :]
        assert len(names) == 3
        drawn.add(tuple(sorted(names)))
    assert len(drawn) == 10  # all ways to draw three of three with replacement


def test_bootstrap__class_gone_or_measure_undefined__is_left_out_and_counted():
    labels, probabilities = np.array([0, 1, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4])

    found = bootstrap_interval(_mean, labels, probabilities, n_resamples=2000)
    gone = (3 / 4) ** 4 + (1 / 4) ** 4
    assert found.n_undefined / found.n_resamples == pytest.approx(gone, abs=0.04)

    def undefined_without_the_last(labels, probabilities):
        return 1.0 if (probabilities[:, 1] == 0.4).any() else math.nan

    found = bootstrap_interval(undefined_without_the_last, labels, probabilities, n_resamples=2000)
    both = 1 - 2 * (3 / 4) ** 4 + (2 / 4) ** 4
    assert found.n_undefined / found.n_resamples == pytest.approx(1 - both, abs=0.04)
    assert found.interval == (1.0, 1.0)


def _covers(seed, *, groups):
    generator = np.random.default_rng(seed)
    patients = np.repeat(np.arange(30), 4)
    effects = generator.uniform(-0.3, 0.3, size=30)[patients]
    probabilities = 0.5 + effects + generator.uniform(-0.2, 0.2, size=120)
    own = patients.tolist() if groups else None
    labels = np.arange(120) % 2
    found = bootstrap_interval(_mean, labels, probabilities, groups=own, n_resamples=150)
    return found.interval[0] <= 0.5 <= found.interval[1]


def test_bootstrap__patients__covers_as_often_as_the_level_says():
    low = binom.ppf(0.001, 100, 0.92)  # percentiles of thirty patients are a little too close
    assert low <= sum(_covers(seed, groups=True) for seed in range(100)) < 100
    assert sum(_covers(seed, groups=False) for seed in range(50)) < 42


_LABELS, _SCORES = np.array([0, 1, 1]), np.array([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"groups": ["p"] * 3}, r"needs two patients \(or bags\) and a resample, but got 1"),
        ({"n_resamples": 0}, "n_resamples=0"),
        ({"measure": lambda *_: math.nan}, "it is nan there and defined in 0 of 2000"),
        ({"bag_ids": ["a", "b", "a"]}, r"\['a'\] come several times"),
        ({"level": 0.0}, "level must lie between 0 and 1"),
        ({"probabilities_b": np.array([0.5])}, "each of the 3 labels, but they have 1"),
    ],
)
def test_bootstrap__what_cannot_be_drawn__is_refused(arguments, why):
    given = {"measure": auroc, "labels": _LABELS, "probabilities_a": _SCORES} | arguments
    with pytest.raises(ValueError, match=why):
        bootstrap_interval(**given)
