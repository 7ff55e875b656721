import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.data.bags import (
    Bag,
    BagList,
    MicrometreCoords,
    PixelCoords,
    bags_of,
    collate_bags,
    shared_width,
)


def _bag(n_instances: int, *, width: int = 3, bag_id: str = "a", label: int = 0, **entries) -> Bag:
    generator = torch.Generator().manual_seed(n_instances)
    features = torch.randn(n_instances, width, generator=generator)
    return Bag(features, label=label, bag_id=bag_id, **entries)


def test_bag__no_instance__is_refused_by_name():
    with pytest.raises(ValueError, match="at least one instance, but bag 's3' has none"):
        Bag(torch.empty(0, 4), label=0, bag_id="s3")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bag__value_not_finite__names_bag_and_column(value):
    features = torch.zeros(5, 4)
    features[3, 2] = value
    with pytest.raises(ValueError, match="bag 's3' holds NaN or infinity in column 2"):
        Bag(features, label=0, bag_id="s3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_bag__other_dtype__is_refused(dtype):
    with pytest.raises(ValueError, match=f"must be float32, but bag 's3' has {dtype}"):
        Bag(torch.zeros(2, 4, dtype=dtype), label=0, bag_id="s3")


def test_bag__negative_label__is_refused():
    with pytest.raises(ValueError, match="class index from 0, but bag 's3' has -1"):
        Bag(torch.zeros(2, 4), label=-1, bag_id="s3")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("coords", PixelCoords(torch.zeros(3, 2), 1.0)),
        ("instance_label", torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_bag__entry_of_other_length__is_refused(name, entry):
    with pytest.raises(ValueError, match=f"{name} must have .* bag 's3' has 3 for 2 instances"):
        Bag(torch.zeros(2, 4), label=0, bag_id="s3", **{name: entry})


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_collate_bags__bags_of_any_length__can_be_taken_apart_again(lengths):
    bags = [
        _bag(
            n,
            bag_id=str(index),
            label=index,
            coords=PixelCoords(torch.full((n, 2), n, dtype=torch.int32), 1.0),
            instance_label=torch.full((n,), n),
        )
        for index, n in enumerate(lengths)
    ]
    batch = collate_bags(bags)
    assert batch["bag_id"] == [bag.bag_id for bag in bags]
    assert batch["label"].tolist() == [bag.label for bag in bags]
    assert batch["label"].dtype == torch.int64
    for row, bag in enumerate(bags):
        real = batch["mask"][row]
        assert real.tolist() == sorted(real.tolist(), reverse=True)
        assert torch.equal(batch["features"][row][real], bag.features)
        assert torch.equal(batch["coords"][row][real], bag.coords.xy)
        assert torch.equal(batch["instance_label"][row][real], bag.instance_label)
    assert (batch["features"][~batch["mask"]] == 0).all()
    assert (batch["coords"][~batch["mask"]] == 0).all()
    assert (batch["instance_label"][~batch["mask"]] == -1).all()


def test_collate_bags__one_bag__copies_nothing():
    bag = _bag(4, coords=PixelCoords(torch.zeros(4, 2), 1.0))
    batch = collate_bags([bag])
    assert batch["features"].data_ptr() == bag.features.data_ptr()
    assert batch["coords"].data_ptr() == bag.coords.xy.data_ptr()
    assert batch["features"].shape == (1, 4, 3)


def test_collate_bags__entry_that_one_bag_lacks__is_left_out():
    batch = collate_bags([_bag(2, coords=PixelCoords(torch.zeros(2, 2), 1.0)), _bag(3, bag_id="b")])
    assert set(batch) == {"features", "mask", "label", "bag_id"}


def test_collate_bags__widths_that_differ__names_the_bags():
    with pytest.raises(ValueError, match=r"there are 3 in \['a'\], 4 in \['b'\]"):
        collate_bags([_bag(2), _bag(2, width=4, bag_id="b")])


def test_shared_width__many_bags__names_only_a_few_of_a_width():
    bags = [_bag(1, bag_id=f"s{index}") for index in range(9)] + [_bag(1, width=4)]
    with pytest.raises(ValueError, match=r"3 in \['s0', 's1', 's2'\], 4 in \['a'\]\."):
        shared_width(bags)


@pytest.mark.parametrize("kind", [PixelCoords, MicrometreCoords])
def test_bags_of__padded_batch__gives_back_the_bags(kind):
    bags = [
        _bag(
            n,
            bag_id=f"s{n}",
            label=n,
            coords=kind(torch.arange(2 * n).reshape(n, 2), n + 0.5),
            instance_label=torch.arange(n) - 1,
            lesion=torch.arange(n),
        )
        for n in (4, 1, 3)
    ]

    for bag, again in zip(bags, bags_of(collate_bags(bags)), strict=True):
        assert torch.equal(again.features, bag.features)
        assert (again.label, again.bag_id) == (bag.label, bag.bag_id)
        assert type(again.coords) is kind
        assert again.coords.pitch == bag.coords.pitch
        assert torch.equal(again.coords.xy, bag.coords.xy)
        assert torch.equal(again.instance_label, bag.instance_label)
        assert torch.equal(again.lesion, bag.lesion)


@pytest.mark.parametrize("pitch", [0.0, -1.0, float("nan"), float("inf")])
def test_coords__pitch_that_is_no_size__is_refused(pitch):
    with pytest.raises(ValueError, match=f"must be a number above 0, but got {pitch}"):
        PixelCoords(torch.zeros(1, 2), pitch)


def test_bag__finite_values_whose_sum_overflows__are_taken():
    bag = Bag(torch.full((4, 4), 3e38), label=0, bag_id="large")
    assert bag.features.sum().isinf()


def test_bag_list__slice_and_negative_index__behave_as_a_list():
    bags = [_bag(n, bag_id=str(n), label=n) for n in (1, 2, 3)]
    sequence = BagList(bags)
    assert sequence[-1] is bags[2]
    assert sequence[1:] == bags[1:]
    assert list(sequence) == bags
    assert (sequence.bag_ids, sequence.labels, sequence.width) == (["1", "2", "3"], [1, 2, 3], 3)
    with pytest.raises(IndexError):
        sequence[3]
