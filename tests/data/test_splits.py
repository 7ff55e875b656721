import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.data.splits import stratified_fold


def _split(labels, *, n_folds=5, fold=0, val_fraction=0.2, seed=0):
    return stratified_fold(labels, n_folds=n_folds, fold=fold, val_fraction=val_fraction, seed=seed)


@st.composite
def _cohorts(draw):
    counts = draw(st.lists(st.integers(10, 40), min_size=2, max_size=4))
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return draw(st.permutations(labels)), draw(st.integers(2, 5)), draw(st.integers(0, 9))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(_cohorts())
def test_stratified_fold__all_folds__partition_and_test_every_bag_once(cohort):
    labels, n_folds, seed = cohort
    tested = []
    for fold in range(n_folds):
        split = _split(labels, n_folds=n_folds, fold=fold, seed=seed)
        assert sorted(split.train + split.val + split.test) == list(range(len(labels)))
        tested += split.test
    assert sorted(tested) == list(range(len(labels)))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(_cohorts(), st.floats(0.15, 0.5))
def test_stratified_fold__every_class__is_within_one_bag_of_proportion(cohort, val_fraction):
    labels, n_folds, seed = cohort
    split = _split(labels, n_folds=n_folds, fold=1, val_fraction=val_fraction, seed=seed)
    for label, count in Counter(labels).items():
        n_test = sum(labels[index] == label for index in split.test)
        n_val = sum(labels[index] == label for index in split.val)
        assert abs(n_test - count / n_folds) < 1
        assert abs(n_val - val_fraction * (count - n_test)) <= 0.5 + 1e-9


def test_stratified_fold__same_seed__gives_the_same_split():
    labels = [0] * 20 + [1] * 15
    assert _split(labels, seed=3) == _split(labels, seed=3)


def test_stratified_fold__other_seed__gives_other_parts():
    labels = [0] * 20 + [1] * 15
    assert _split(labels, seed=3).test != _split(labels, seed=4).test
    assert _split(labels, seed=3).val != _split(labels, seed=4).val


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fold": 5}, r"fold must lie in 0\.\.4, but 5 came"),
        ({"fold": -1}, r"fold must lie in 0\.\.4, but -1 came"),
        ({"n_folds": 1}, "n_folds must be at least 2, but 1 came"),
        ({"n_folds": 7}, "class 1 has 6 bags for 7 folds"),
        ({"val_fraction": 0.0}, r"val_fraction must lie between 0 and 1, but 0\.0 came"),
        ({"val_fraction": 1.0}, r"val_fraction must lie between 0 and 1, but 1\.0 came"),
        ({"val_fraction": 0.05}, "part 'val' has none of class 1"),
        ({"val_fraction": 0.95}, "part 'train' has none of class 1"),
    ],
)
def test_stratified_fold__argument_out_of_range__is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        _split([0] * 20 + [1] * 6, **change)


def test_stratified_fold__scikit_learn_missing__names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[benchmarks\]'"):
        _split([0] * 20 + [1] * 6)
