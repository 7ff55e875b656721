from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from mil_anchor.data.bags import Bag
from mil_anchor.data.datamodule import BagDataModule, ClassicDataModule


def _bags(n_bags, *, width=3, name="s", n_positive=0):
    return [
        Bag(
            torch.full((1 + i % 4, width), float(i)), label=int(i < n_positive), bag_id=f"{name}{i}"
        )
        for i in range(n_bags)
    ]


def _epoch(loader):
    return [bag_id for batch in loader for bag_id in batch["bag_id"]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_train_dataloader__two_epochs__serve_every_bag_once_in_another_order(batch_size):
    torch.manual_seed(0)
    bags = _bags(20)
    loader = BagDataModule(bags, batch_size=batch_size).train_dataloader()
    first, second = _epoch(loader), _epoch(loader)
    assert sorted(first) == sorted(second) == sorted(bag.bag_id for bag in bags)
    assert first != second


def test_train_dataloader__global_random_state_restored__repeats_the_order():
    loader = BagDataModule(_bags(20)).train_dataloader()
    _epoch(loader)
    state = torch.get_rng_state()
    uninterrupted = _epoch(loader)
    torch.set_rng_state(state)
    assert _epoch(BagDataModule(_bags(20)).train_dataloader()) == uninterrupted


def test_eval_dataloaders__two_passes__keep_the_given_order():
    datamodule = BagDataModule(_bags(2), _bags(5, name="v"), test_bags=_bags(6, name="t"))
    for _ in range(2):
        assert _epoch(datamodule.val_dataloader()) == [f"v{i}" for i in range(5)]
        assert _epoch(datamodule.test_dataloader()) == [f"t{i}" for i in range(6)]


def test_train_dataloader__workers__serve_every_bag_once():
    loader = BagDataModule(_bags(6), num_workers=1).train_dataloader()
    assert sorted(_epoch(loader)) == [f"s{i}" for i in range(6)]


def test_train_dataloader__balanced__draws_the_classes_equally_often():
    torch.manual_seed(0)
    bags = _bags(1000, n_positive=50)
    loader = BagDataModule(bags, balanced=True, batch_size=10).train_dataloader()
    labels = Counter(label for batch in loader for label in batch["label"].tolist())
    assert labels.total() == 1000
    assert abs(labels[1] - 500) < 5 * 250**0.5  # five standard deviations of the binomial


def test_train_dataloader__two_processes__share_the_bags_and_evaluate_all():
    trained = []
    for rank in range(2):
        datamodule = BagDataModule(_bags(10), _bags(3, name="v"))
        datamodule.trainer = SimpleNamespace(world_size=2, global_rank=rank, current_epoch=0)
        loader = datamodule.train_dataloader()
        first = _epoch(loader)
        loader.sampler.set_epoch(1)  # Lightning does this before every epoch
        assert _epoch(loader) != first
        trained += first
        assert _epoch(datamodule.val_dataloader()) == ["v0", "v1", "v2"]
    assert sorted(trained) == [f"s{i}" for i in range(10)]


def test_train_dataloader__two_processes_resumed__begin_with_the_order_of_their_epoch():
    datamodule = BagDataModule(_bags(10))
    datamodule.trainer = SimpleNamespace(world_size=2, global_rank=0, current_epoch=3)
    loader = datamodule.train_dataloader()
    # Lightning draws a resumed fit's first order before it tells the sampler the epoch.
    first = _epoch(loader)
    loader.sampler.set_epoch(3)
    assert _epoch(loader) == first


def test_train_dataloader__balanced_on_two_processes__is_refused():
    datamodule = BagDataModule(_bags(4), balanced=True)
    datamodule.trainer = SimpleNamespace(world_size=2, global_rank=0)
    with pytest.raises(MisconfigurationException, match="one process, but the Trainer has 2"):
        datamodule.train_dataloader()


def test_setup__widths_that_differ_between_parts__names_the_bags():
    datamodule = BagDataModule(_bags(2), test_bags=_bags(1, width=5, name="t"))
    with pytest.raises(ValueError, match=r"3 in train \('s0', ...\), 5 in test \('t0'"):
        datamodule.setup("fit")


def test_n_classes__class_that_only_the_test_has__is_counted():
    test_bags = [Bag(torch.ones(1, 3), label=2, bag_id="t")]
    datamodule = BagDataModule(_bags(4, n_positive=2), test_bags=test_bags)
    assert (datamodule.in_features, datamodule.n_classes) == (3, 3)


def test_in_features__before_setup__says_what_to_call():
    with pytest.raises(RuntimeError, match=r"needs training bags.* Call setup\('fit'\)"):
        _ = ClassicDataModule("musk1").in_features


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, but 0 came"),
        ({"num_workers": -1}, "num_workers must be at least 0, but -1 came"),
    ],
)
def test_bag_data_module__argument_out_of_range__is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        BagDataModule(_bags(2), **change)


def test_classic_data_module__set_up_twice__keeps_the_bags_of_the_fold():
    datamodule = ClassicDataModule("musk1", fold=3)
    datamodule.setup("fit")
    before = datamodule.train_bags
    datamodule.setup("test")
    assert datamodule.train_bags is before
    assert (datamodule.in_features, datamodule.n_classes) == (166, 2)
    parts = (datamodule.train_bags, datamodule.val_bags, datamodule.test_bags)
    assert sorted(int(bag.bag_id.split("_")[1]) for part in parts for bag in part) == list(
        range(1, 93)
    )


@pytest.mark.parametrize("name", ["elephant", "ucsb_breast"])
def test_classic_data_module__constant_columns__are_zero_and_the_rest_has_unit_scale(name):
    datamodule = ClassicDataModule(name)
    datamodule.setup("fit")
    instances = torch.cat([bag.features for bag in datamodule.train_bags]).double()
    sd, mean = torch.std_mean(instances, dim=0, correction=0)
    constant = (instances == 0).all(dim=0)
    assert constant.sum() >= {"elephant": 120, "ucsb_breast": 30}[name]
    torch.testing.assert_close(sd[~constant], torch.ones_like(sd[~constant]), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)


def test_transfer__batch_on_the_cpu__is_not_looked_through():
    data = BagDataModule(_bags(2), _bags(1))
    batch = next(iter(data.train_dataloader()))
    assert data.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["features"].is_meta
    assert moved["bag_id"] == batch["bag_id"]
