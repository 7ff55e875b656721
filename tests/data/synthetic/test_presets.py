from dataclasses import replace

import pytest

from mil_anchor.data.synthetic import PRESETS, SIZES, Size, WitnessRange


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (0.2, 0.1), (0.1, 0.7), (-0.1, 0.1)])
def test_witness_range__impossible_rates__are_refused(low, high):
    with pytest.raises(ValueError, match=rf"0 < low <= high <= 0.6.*but {low} and {high} came"):
        WitnessRange(1.0, low, high)


@pytest.mark.parametrize("probability", [0.0, 1.5])
def test_witness_range__impossible_probability__is_refused(probability):
    with pytest.raises(ValueError, match=rf"must lie in \(0, 1\], but {probability} came"):
        WitnessRange(probability, 0.1, 0.2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_names": ("only",)}, "two classes or more"),
        ({"witness": (WitnessRange(0.5, 0.1, 0.2),)}, "sum to 1, but their sum is 0.5"),
        ({"witness": ()}, "sum to 1, but their sum is 0"),
        ({"lower_grades": 1.1}, "lower_grades must lie in 0..1, but 1.1 came"),
        ({"mimics": -0.1}, "mimics must lie in 0..1"),
        ({"artefact_link": float("nan")}, "artefact_link must lie in 0..1"),
        ({"label_noise": 2.0}, "label_noise must lie in 0..1"),
        ({"mimic_share": (0.0, 0.1)}, "mimic_share must satisfy"),
        ({"artefact_share": (0.1, 0.3)}, "artefact_share must satisfy"),
        ({"n_centres": 1}, "the last centre is held out, but 1 came"),
        ({"strength": -1.0}, "strength must be a number from 0, but -1.0 came"),
        ({"size_spread": float("inf")}, "size_spread must be a number from 0, but inf came"),
    ],
)
def test_preset__impossible_value__is_refused_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["camelyon_like"], **changed)


@pytest.mark.parametrize(("name", "value"), [("n_slides", 0), ("n_tiles", 39), ("width", 7)])
def test_size__too_small__is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least .* but {value} came"):
        replace(SIZES["tiny"], **{name: value})


def test_sizes__full__is_what_the_issue_asks_for():
    assert SIZES["full"] == Size(n_slides=300, n_tiles=10_000, width=384)
