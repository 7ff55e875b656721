"""What the presets claim, measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mil_anchor.data.synthetic import PRESETS, Size, SyntheticCohort

_NAMES = sorted(PRESETS)
_GRID = Size(n_slides=160, n_tiles=1000, width=8)  # for what does not depend on features


@pytest.fixture(scope="module")
def grids():
    """Witness rate per grade of every slide, with its true label."""
    rates = {}
    for name in _NAMES:
        cohort = SyntheticCohort(name, _GRID)
        rates[name] = [
            (bag.instance_label.bincount(minlength=3) / len(bag.features), label)
            for bag, label in zip(cohort, cohort.true_labels, strict=True)
            if label > 0
        ]
    return rates


@pytest.fixture(scope="module")
def measured():
    """What linear models can tell in a small cohort of each preset."""
    return {name: measure(SyntheticCohort(name, "small", seed=0)) for name in _NAMES}


def measure(cohort):
    bags = cohort[:]
    probe = _fit(*_tiles([bags[index] for index in cohort.parts.train]))
    means = np.stack([bag.features.mean(dim=0).numpy() for bag in bags])
    train = cohort.parts.train
    pooled = _fit(means[train], np.array(cohort.labels)[train])
    figures = {}
    for part in ("val", "test"):
        indices = getattr(cohort.parts, part)
        features, is_lesion = _tiles([bags[index] for index in indices])
        figures[f"tile_{part}"] = roc_auc_score(is_lesion, probe.decision_function(features))
        score = pooled.predict_proba(means[indices])
        figures[f"pooled_{part}"] = np.mean(
            [
                roc_auc_score(np.array(cohort.true_labels)[indices] == label, score[:, label])
                for label in range(len(cohort.classes))
            ]
        )
    return figures


def _tiles(bags):
    features = np.concatenate([bag.features.numpy()[::4] for bag in bags])
    return features, np.concatenate([bag.instance_label.numpy()[::4] > 0 for bag in bags])


def _fit(features, labels):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return model.fit(features, labels)


@pytest.mark.slow
def test_camelyon_like__witness_rates__are_small(grids):
    rates = np.array([float(rate[1]) for rate, _ in grids["camelyon_like"]])
    assert 0.01 < np.median(rates) < 0.04
    assert 0.2 < (rates < 0.01).mean() < 0.45
    assert rates.min() >= 0.0005
    assert 0.4 < rates.max() <= 0.51


def test_bracs_like__witness_rates__are_of_the_highest_grade_and_lower_ones(grids):
    own = [float(rate[label]) for rate, label in grids["bracs_like"]]
    assert min(own) > 0.098
    assert max(own) < 0.202
    lower = [float(rate[1]) > 0 for rate, label in grids["bracs_like"] if label == 2]
    assert 0.55 < np.mean(lower) < 0.85


@pytest.mark.parametrize("name", _NAMES)
def test_cohort__lesions__are_clustered(name):
    cohort = SyntheticCohort(name, _GRID)
    counts = [int(cohort.read(index).lesion.max()) for index in cohort.parts.test]
    positive = [
        count
        for count, index in zip(counts, cohort.parts.test, strict=True)
        if cohort.true_labels[index] == 1
    ]
    # One focus and two more on average, of which some meet or run out of tissue.
    assert 1.5 < np.mean(positive) < 5


@pytest.mark.parametrize("name", _NAMES)
def test_cohort__spectrum_and_neighbours__are_near_the_prototype(name):
    bags = SyntheticCohort(name, "small", n_slides=48)[:]
    pooled = np.concatenate([bag.features.numpy()[::4] for bag in bags])
    variance = np.linalg.eigvalsh(np.cov(pooled, rowvar=False))[::-1]
    component = np.arange(1, len(variance) + 1)
    slope = np.polyfit(np.log(component), np.log(variance), 1)[0]
    assert abs(slope + 1.4) < 0.15

    cosines = []
    for bag in bags:
        centred = bag.features - bag.features.mean(dim=0)
        cell = {tuple(xy): index for index, xy in enumerate((bag.coords.xy // 256).tolist())}
        right = [(i, cell[x + 1, y]) for (x, y), i in cell.items() if (x + 1, y) in cell]
        left, neighbour = torch.tensor(right).T
        cosine = torch.cosine_similarity(centred[left], centred[neighbour])
        cosines.append(float(cosine.mean()))
    assert abs(np.mean(cosines) - 0.5) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", _NAMES)
def test_cohort__linear_tile_probe__is_good_but_not_perfect(measured, name):
    assert 0.75 < measured[name]["tile_val"] < 0.97
    assert 0.75 < measured[name]["tile_test"] < 0.97


@pytest.mark.parametrize("name", _NAMES)
def test_cohort__mean_pooling__tells_far_less_than_tiles(measured, name):
    figures = measured[name]
    assert figures["pooled_val"] < 0.85
    assert figures["pooled_test"] < 0.8
    assert figures["pooled_test"] < figures["tile_test"] - 0.1


def test_cohort__other_seed__is_another_world():
    here, there = (SyntheticCohort("bracs_like", "small", seed=seed) for seed in (0, 1))
    probe = _fit(*_tiles(here[:24]))
    same, other = (
        roc_auc_score(labels, probe.decision_function(features))
        for features, labels in (_tiles(here[24:60]), _tiles(there[24:60]))
    )
    assert same > 0.8
    assert other < same - 0.15


@pytest.mark.slow
def test_cohort__held_out_centre__is_shifted():
    def shift(preset):
        cohort = SyntheticCohort(preset, "small", n_slides=96)
        means = torch.stack([bag.features.mean(dim=0) for bag in cohort])
        test = torch.tensor(cohort.centres) == 3
        between = means[test].mean(dim=0) - means[~test].mean(dim=0)
        return float((between**2).mean() / means[test].var(dim=0).mean())

    preset = PRESETS["camelyon_like"]
    alike = shift(replace(preset, centre_gain=0.0, centre_offset=0.0))
    # Means of 24 and 72 slides differ by 1/24 + 1/72 of their variance.
    assert alike < 0.2
    assert shift(preset) > 3 * alike
