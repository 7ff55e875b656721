import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.model_selection import cross_val_score

from mil_anchor.data import classic
from mil_anchor.data.classic import CLASSIC, load_classic


@pytest.mark.parametrize(
    ("name", "n_bags", "n_positive", "n_instances", "width"),
    [
        ("musk1", 92, 47, 476, 166),
        ("musk2", 102, 39, 6598, 166),
        ("elephant", 200, 100, 1391, 230),
        ("ucsb_breast", 58, 26, 2002, 708),
    ],
)
def test_load_classic__every_set__has_its_published_size(
    name, n_bags, n_positive, n_instances, width
):
    bags = load_classic(name)
    assert len(bags) == n_bags
    assert sum(bag.label for bag in bags) == n_positive
    assert {bag.label for bag in bags} == {0, 1}
    assert sum(len(bag.features) for bag in bags) == n_instances
    assert {bag.features.shape[1] for bag in bags} == {width}
    assert len({bag.bag_id for bag in bags}) == n_bags


def test_load_classic__every_name__is_tested_above():
    assert set(CLASSIC) == {"musk1", "musk2", "elephant", "ucsb_breast"}


def test_load_classic__pooled_features__predict_the_label():
    bags = load_classic("musk1")
    pooled = torch.stack(
        [torch.cat([b.features.mean(0), b.features.amin(0), b.features.amax(0)]) for b in bags]
    )
    labels = [bag.label for bag in bags]
    trees = ExtraTreesClassifier(50, random_state=0)
    auroc = cross_val_score(trees, pooled.numpy(), labels, cv=5, scoring="roc_auc")
    assert auroc.mean() > 0.9


def test_load_classic__modules_of_the_wheel_blocked__still_reads(monkeypatch):
    monkeypatch.setitem(sys.modules, "mil", None)
    assert load_classic("musk1")[0].bag_id == "musk1_1"


def test_load_classic__unknown_name__lists_the_choices():
    with pytest.raises(ValueError, match=r"\['elephant', 'musk1', .*\], but 'fox' came"):
        load_classic("fox")


def test_load_classic__wheel_missing__names_the_extra(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(classic, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[benchmarks\]'"):
        load_classic("musk1")
