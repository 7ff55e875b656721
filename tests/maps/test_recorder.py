import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader

from baselines.abmil import ABMIL
from mil_anchor import AnchorCallback, RandomState
from mil_anchor.data.bags import Bag, MicrometreCoords, PixelCoords, collate_bags
from mil_anchor.maps.file import read_map, read_maps
from mil_anchor.maps.recorder import MapRecorder
from mil_anchor.module import MILModule
from tests.callbacks.tiny import make_trainer


def _bags(name, *, n_bags=4, kind=PixelCoords):
    generator = torch.Generator().manual_seed(len(name))
    return [
        Bag(
            torch.randn(3 + index, 6, generator=generator),
            label=index % 2,
            bag_id=f"{name}{index}",
            coords=kind(torch.arange(6 + 2 * index).reshape(-1, 2) * 8, 8.0),
            instance_label=torch.arange(3 + index) % 2,
            lesion=torch.arange(3 + index) % 2,
        )
        for index in range(n_bags)
    ]


def _loader(bags, batch_size=1):
    return DataLoader(bags, batch_size=batch_size, collate_fn=collate_bags)


def _module():
    torch.manual_seed(0)
    return MILModule(ABMIL(6, 2, hidden=8, attention_width=4, n_rows=2), n_classes=2, lr=0.05)


@torch.no_grad()
def _attention(module, bag):
    module.eval()
    scores = module.model(bag.features.unsqueeze(0)).scores.double()
    return torch.softmax(scores, dim=-1)[0].mean(dim=0)


def _fit(folder, *callbacks, max_epochs=2, bags=None):
    module = _module()
    trainer = make_trainer(folder, *callbacks, max_epochs=max_epochs)
    trainer.fit(module, _loader(_bags("train")), _loader(bags or _bags("val")))
    return trainer, module


def test_map_recorder__fit_then_test__keeps_epochs_of_chosen_and_best_of_all_bags(tmp_path):
    file = tmp_path / "attention.h5"
    recorder = MapRecorder(path=file, epochs_of=["val1", "val3"])
    trainer, module = _fit(tmp_path, recorder)
    in_fit = {bag.bag_id: _attention(module, bag) for bag in _bags("val")}

    assert [(kept.bag_id, kept.epochs, kept.has_best) for kept in read_maps(file)] == [
        ("val1", [0, 1], False),
        ("val3", [0, 1], False),
    ]
    # The last epoch's is that of the weights at its end.
    last = read_map(file, "val3").attention(1)
    assert torch.allclose(last.double(), in_fit["val3"], rtol=5e-3)

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3)
    trainer.validate(module, _loader(_bags("val", kind=MicrometreCoords), batch_size=3))
    trainer.test(module, _loader(_bags("test")))

    kept = {bag.bag_id: bag for bag in read_maps(file)}
    assert set(kept) == {f"{part}{index}" for part in ("val", "test") for index in range(4)}
    assert all(bag.has_best and bag.part == bag.bag_id[:-1] for bag in kept.values())
    for bag in _bags("test") + _bags("val"):
        stored = read_map(file, bag.bag_id)
        best = stored.attention(None).double()
        assert torch.allclose(best, _attention(module, bag), rtol=5e-3)
        assert torch.equal(stored.coords.xy, bag.coords.xy)
        assert torch.equal(stored.lesion, bag.lesion)
        assert torch.equal(stored.instance_label, bag.instance_label)
    assert not torch.allclose(read_map(file, "val3").attention(None), last, rtol=5e-3)


def test_map_recorder__beside_a_plugin__changes_nothing_in_training(tmp_path):
    states = []
    for name, callbacks in (("bare", []), ("maps", [MapRecorder(path=tmp_path / "attention.h5")])):
        module = _module()
        trainer = make_trainer(tmp_path / name, AnchorCallback(), *callbacks, max_epochs=2)
        trainer.fit(module, _loader(_bags("train")), _loader(_bags("val")))
        states.append(module.state_dict())

    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_map_recorder__resumed_run__repeats_the_epochs_it_lost(tmp_path):
    whole, parted = tmp_path / "whole.h5", tmp_path / "parted.h5"
    bags = ["val0", "val1"]
    _fit(tmp_path, MapRecorder(path=whole, epochs_of=bags), max_epochs=3)

    # Killed after it had written one epoch more than its last checkpoint holds.
    checkpoint = tmp_path / "epoch=1.ckpt"
    saving = LambdaCallback(
        on_train_epoch_end=lambda trainer, _: (
            trainer.save_checkpoint(checkpoint) if trainer.current_epoch == 1 else None
        )
    )
    _fit(tmp_path, MapRecorder(path=parted, epochs_of=bags), saving, max_epochs=3)
    trainer = make_trainer(tmp_path, MapRecorder(path=parted, epochs_of=bags), max_epochs=3)
    trainer.fit(_module(), _loader(_bags("train")), _loader(_bags("val")), ckpt_path=checkpoint)

    for bag_id in bags:
        one, other = read_map(whole, bag_id), read_map(parted, bag_id)
        assert one.epochs == other.epochs == [0, 1, 2]
        for epoch in one.epochs:
            assert torch.equal(one.attention(epoch), other.attention(epoch))


def test_map_recorder__bags_of_which_nothing_is_known__writes_nothing(tmp_path):
    file = tmp_path / "attention.h5"
    bags = [Bag(bag.features, bag.label, bag.bag_id) for bag in _bags("val")]
    trainer, module = _fit(tmp_path, MapRecorder(path=file, epochs_of=["val0"]), bags=bags)
    trainer.test(module, _loader(bags))

    assert not file.exists() or not read_maps(file)


@pytest.mark.filterwarnings("ignore:The scores of attention block")
def test_map_recorder__block_that_is_not_the_attention__warns_and_trains_on(tmp_path):
    file = tmp_path / "attention.h5"
    with pytest.warns(UserWarning, match="is not recorded: .* bag 'val0' has 3"):
        trainer, module = _fit(tmp_path, MapRecorder("model.head", path=file, epochs_of=["val0"]))
    # Once is enough.
    trainer.validate(module, _loader(_bags("val")))
    trainer.test(module, _loader(_bags("test")))

    assert not any(bag.epochs or bag.has_best for bag in read_maps(file))


def test_map_recorder__site_that_no_fit_has_shown__is_used_when_it_is_set(tmp_path):
    file = tmp_path / "attention.h5"
    recorder = MapRecorder(path=file)
    trainer, module = _fit(tmp_path, RandomState())
    shown = MapRecorder(path=tmp_path / "other.h5")
    _fit(tmp_path, shown)
    recorder.found = shown.found
    trainer.callbacks.append(recorder)
    trainer.test(module, _loader(_bags("test")))

    assert len(read_maps(file)) == 4


def test_map_recorder__annotated_bags_without_coordinates__are_kept_to_be_measured(tmp_path):
    file = tmp_path / "attention.h5"
    bags = [
        Bag(bag.features, bag.label, bag.bag_id, instance_label=bag.instance_label)
        for bag in _bags("test")
    ]
    trainer, module = _fit(tmp_path, MapRecorder(path=file))
    trainer.test(module, _loader(bags))

    assert [bag.bag_id for bag in read_maps(file)] == [bag.bag_id for bag in bags]
    assert torch.equal(read_map(file, "test1").instance_label, bags[1].instance_label)


def test_map_recorder__new_fit__forgets_the_maps_of_the_one_before(tmp_path):
    file = tmp_path / "attention.h5"
    recorder = MapRecorder(path=file, epochs_of=["val0"])
    trainer, module = _fit(tmp_path, recorder)
    trainer.validate(module, _loader(_bags("val")))
    assert read_map(file, "val0").has_best

    _fit(tmp_path, recorder, max_epochs=1)

    assert read_map(file, "val0").epochs == [0]
    assert not any(bag.has_best for bag in read_maps(file))
