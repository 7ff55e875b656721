import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.data.labels import LabelTable
from mil_anchor.data.splits import (
    Split,
    check_split,
    draw_validation,
    split_by_parts,
    stratified_fold,
)


def _split(labels, *, n_folds=5, fold=0, val_fraction=0.2, seed=0, **entries):
    return stratified_fold(
        labels, n_folds=n_folds, fold=fold, val_fraction=val_fraction, seed=seed, **entries
    )


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


# Drawn before cases were known: the published results of the classic sets rest on these draws.
def test_stratified_fold__without_cases__draws_as_ever():
    labels = [0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    split = _split(labels, n_folds=4, fold=1, val_fraction=0.3, seed=5)
    assert split == Split(
        train=[2, 3, 4, 9, 11, 14, 15, 16, 17, 19], val=[5, 6, 7, 8, 10], test=[0, 1, 12, 13, 18]
    )


def _table(labels, cases, parts=None, *, classes=("n", "t", "u", "v")):
    return LabelTable(
        slide_ids=[f"s{index}" for index in range(len(labels))],
        labels=list(labels),
        classes=list(classes),
        cases=list(cases),
        parts=list(parts) if parts is not None else [None] * len(labels),
    )


@st.composite
def _patients(draw):
    """Slides of cases of one to four slides; eight cases or more have a slide of each class."""
    n_classes = draw(st.integers(2, 4))
    labels, cases = [], []
    for label in range(n_classes):
        for _ in range(draw(st.integers(8, 14))):
            n_more = draw(st.integers(0, 3))
            more = draw(st.lists(st.integers(0, n_classes - 1), min_size=n_more, max_size=n_more))
            case = f"p{len(set(cases))}"
            labels += [label, *more]
            cases += [case] * (1 + n_more)
    order = draw(st.permutations(range(len(labels))))
    return [labels[i] for i in order], [cases[i] for i in order], draw(st.integers(0, 9))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(_patients(), st.integers(2, 4))
def test_stratified_fold__cases__stay_together_and_are_tested_once(patients, n_folds):
    labels, cases, seed = patients
    tested = []
    for fold in range(n_folds):
        split = _split(labels, n_folds=n_folds, fold=fold, seed=seed, cases=cases)
        assert sorted(split.train + split.val + split.test) == list(range(len(labels)))
        check_split(split, _table(labels, cases))
        tested += split.test
    assert sorted(tested) == list(range(len(labels)))


def test_stratified_fold__cases_of_one_bag__give_the_same_test_part():
    labels = [0] * 20 + [1] * 15
    cases = [f"p{index}" for index in range(35)]
    split = _split(labels, seed=3, cases=cases)
    assert split.test == _split(labels, seed=3).test
    assert split == _split(labels, seed=3, cases=cases)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cases": ["p"]}, "1 cases came for 26 bags"),
        ({"cases": [str(i // 2) for i in range(26)]}, "class 1 has 3 cases for 5 folds"),
        (
            {"cases": [str(i // 2) for i in range(26)], "classes": ["n", "t"]},
            "class t has 3 cases for 5 folds",
        ),
    ],
)
def test_stratified_fold__too_few_cases__are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        _split([0] * 20 + [1] * 6, **change)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_patients(), st.floats(0.05, 0.6))
def test_draw_validation__cases__are_drawn_whole_and_near_the_fraction(patients, val_fraction):
    labels, cases, seed = patients
    members = range(len(labels))
    train, val = draw_validation(labels, members, cases=cases, val_fraction=val_fraction, seed=seed)
    assert sorted(train + val) == list(members)
    drawn = {cases[index] for index in val}
    assert not drawn & {cases[index] for index in train}
    assert {labels[index] for index in val} == {labels[index] for index in train} == set(labels)
    # The nearest whole number of cases, or one more for every class that is drawn in spite of it.
    surplus = len(drawn) - val_fraction * len(set(cases))
    assert -0.5 - 1e-9 <= surplus <= 0.5 + len(set(labels))


def test_draw_validation__60_cases_of_5__gives_30_bags_for_every_seed():
    labels = [label for case in range(60) for label in ([0, 0, 0, 0, case % 4])]
    cases = [str(case) for case in range(60) for _ in range(5)]
    draws = [
        draw_validation(labels, range(300), cases=cases, val_fraction=0.1, seed=seed)[1]
        for seed in range(5)
    ]
    assert {len(val) for val in draws} == {30}
    assert len({tuple(val) for val in draws}) == 5


def test_draw_validation__rare_class_of_two_cases__puts_one_in_each_part():
    labels = [0] * 40 + [1, 1]
    cases = [str(index) for index in range(42)]
    for seed in range(10):
        train, val = draw_validation(labels, range(42), cases=cases, val_fraction=0.1, seed=seed)
        assert sum(labels[index] for index in train) == sum(labels[index] for index in val) == 1
        assert len(val) == 5


def test_draw_validation__class_only_beside_rarer_ones__is_in_both_parts():
    # Half of class 1 would be far from a tenth of it, but none would be no validation at all.
    groups = {
        "a": [1, 1, 2],
        "b": [2],
        "c": [1, 1, 3],
        "d": [3],
        **{f"e{i}": [0] for i in range(40)},
    }
    labels = [label for group in groups.values() for label in group]
    cases = [case for case, group in groups.items() for _ in group]
    for seed in range(5):
        parts = draw_validation(
            labels, range(len(labels)), cases=cases, val_fraction=0.1, seed=seed
        )
        assert [{labels[index] for index in part} for part in parts] == [{0, 1, 2, 3}] * 2


def test_draw_validation__cases_of_unlike_size__keeps_the_share_of_bags():
    # One case has a third of the bags: drawing it would triple the validation part.
    labels = [0, 1] * 45
    cases = ["big"] * 30 + [str(index // 2) for index in range(60)]
    for seed in range(10):
        _, val = draw_validation(labels, range(90), cases=cases, val_fraction=0.1, seed=seed)
        assert len(val) <= 12


def test_split_by_parts__all_parts_named__are_taken_as_they_are():
    table = _table([0, 1, 0, 1, 0], "abcde", ["test", "train", "val", "val", "train"])
    assert split_by_parts(table, val_fraction=0.1, seed=0) == Split([1, 4], [2, 3], [0])


def test_split_by_parts__no_validation__draws_it_from_training():
    labels = [0, 1] * 20
    cases = [str(index // 4) for index in range(40)]
    table = _table(labels, cases, ["test"] * 8 + ["train"] * 32)
    split = split_by_parts(table, val_fraction=0.25, seed=1)
    assert split.test == list(range(8))
    assert len(split.val) == 8
    check_split(split, table)
    assert split == split_by_parts(table, val_fraction=0.25, seed=1)
    assert split.val != split_by_parts(table, val_fraction=0.25, seed=2).val


def test_split_by_parts__slides_without_part__are_left_out_with_a_warning():
    table = _table([0, 1, 0, 1, 0], "abcde", ["train", "train", "val", "val", None])
    with pytest.warns(UserWarning, match=r"leaves out 1 of 5 slides .*\['s4'\]"):
        split = split_by_parts(table, val_fraction=0.1, seed=0)
    assert split == Split([0, 1], [2, 3], [])


@pytest.mark.parametrize(
    ("cases", "parts", "match"),
    [
        ("abcd", [None] * 4, r"needs slides for training, but the parts are \{None: 4\}"),
        ("abcd", ["test"] * 4, r"needs slides for training, but the parts are \{'test': 4\}"),
        ("abca", ["train", "train", "val", "val"], "1 cases are in several: 'a' in train and val"),
        # Drawn for validation, the case would be in test all the same.
        ("abca", ["train", "train", "train", "test"], "'a' in train and test"),
        ("abcd", ["train", "train", "val", "test"], "'val' has none of class t"),
        ("abcd", ["train", "val", "train", "val"], "'train' has none of class t"),
    ],
)
def test_split_by_parts__unsafe__is_refused(cases, parts, match):
    with pytest.raises(ValueError, match=match):
        split_by_parts(_table([0, 1, 0, 1], cases, parts), val_fraction=0.5, seed=0)


def test_check_split__class_only_in_test__is_refused_by_name():
    table = _table([0, 0, 1], "abc")
    with pytest.raises(ValueError, match="part 'train' has none of class t"):
        check_split(Split([0], [1], [2]), table)


def test_check_split__test_without_a_class_or_slide__is_allowed():
    table = _table([0, 1, 0, 1, 0], "abcde")
    check_split(Split([0, 1], [2, 3], [4]), table)
    check_split(Split([0, 1], [2, 3], []), table)


def test_check_split__many_leaking_cases__names_five():
    table = _table([0, 1] * 7, "abcdefg" * 2)
    with pytest.raises(ValueError, match=r"7 cases .*'e' in train and val, \.\.\.\. Move"):
        check_split(Split(list(range(7)), list(range(7, 14)), []), table)


@pytest.mark.parametrize(
    ("split", "match"),
    [
        (Split([0, 1], [1], []), "'s1' in train and val"),
        (Split([0, 0], [1], []), "'s0' in train and train"),
        (Split([0], [1], [2]), r"indices in 0\.\.1, but 2 is in part 'test'"),
        (Split([-1], [1], []), r"but -1 is in part 'train'"),
    ],
)
def test_check_split__wrong_index__is_refused(split, match):
    with pytest.raises(ValueError, match=match):
        check_split(split, _table([0, 1], "ab"))
