import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from mil_anchor.data.bags import Bag, PixelCoords
from mil_anchor.data.standardize import Standardizer


def _bag(features, *, bag_id="a"):
    return Bag(
        features, label=0, bag_id=bag_id, coords=PixelCoords(torch.ones(len(features), 2), 1.0)
    )


def test_standardizer__training_bags__agrees_with_scikit_learn():
    torch.manual_seed(0)
    bags = [_bag(100 + 5 * torch.randn(n, 4)) for n in (1, 7, 20)]
    standardize = Standardizer.fit(bags)
    oracle = StandardScaler().fit(torch.cat([bag.features for bag in bags]).double().numpy())
    for bag in bags:
        expected = torch.from_numpy(oracle.transform(bag.features.double().numpy())).float()
        torch.testing.assert_close(standardize(bag).features, expected)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.floats(-1e4, 1e4, width=32), st.integers(1, 30))
def test_standardizer__constant_column__becomes_exactly_zero(value, n_instances):
    bags = [_bag(torch.full((n_instances, 2), value)), _bag(torch.full((3, 2), value))]
    standardize = Standardizer.fit(bags)
    assert (standardize(bags[0]).features == 0).all()
    shifted = standardize(_bag(torch.full((1, 2), value) + 1))
    assert (shifted.features.abs() <= 1.001).all()  # divided by 1, not by a rounding error


def test_standardizer__a_bag__keeps_all_but_its_features():
    bag = _bag(torch.randn(3, 4))
    standardized = Standardizer.fit([bag])(bag)
    assert (standardized.bag_id, standardized.label) == (bag.bag_id, bag.label)
    assert standardized.coords is bag.coords
    assert standardized.features.dtype == torch.float32


def test_standardizer__bag_of_other_width__is_refused():
    standardize = Standardizer.fit([_bag(torch.zeros(2, 4))])
    with pytest.raises(ValueError, match=r"must have the 4 columns .* bag 's3' has 1"):
        standardize(_bag(torch.zeros(2, 1), bag_id="s3"))


def test_standardizer__training_widths_that_differ__names_the_bags():
    with pytest.raises(ValueError, match=r"3 in \['b'\], 4 in \['a'\]"):
        Standardizer.fit([_bag(torch.zeros(2, 4)), _bag(torch.zeros(2, 3), bag_id="b")])
