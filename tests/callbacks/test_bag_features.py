import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from baselines.abmil import ABMIL
from baselines.clam import CLAMMB, CLAMSB
from baselines.dsmil import DSMIL
from baselines.transmil import TransMIL
from mil_anchor import RandomState
from mil_anchor.callbacks.bag_features import BagFeatures, read_bag_features
from mil_anchor.data.bags import Bag
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.module import MILModule
from tests.callbacks.tiny import (
    TinyModule,
    assert_clean,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)


class Classifying(TinyModule):
    """Keeps what its head gets in its own validation passes; validated in evaluation mode."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.pooled = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        hidden = self.net.encoder(batch["features"])
        weights = torch.softmax(self.net.attention(hidden), dim=1)
        self.pooled.append(torch.einsum("bnr,bnh->bh", weights, hidden) / 2)


class Renamed(nn.Module):
    """Layers of which only the last but one in the order of definition puts out the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scorer = nn.Linear(4, 1)
        self.classifier = nn.Linear(4, 3)
        self.embed = nn.Linear(4, 4)
        self.gate = nn.Linear(4, 4)

    def forward(self, features):
        hidden = self.embed(features)
        pooled = (torch.softmax(self.scorer(hidden), dim=1) * hidden).sum(dim=1)
        pooled = pooled * torch.sigmoid(self.gate(pooled))
        return self.classifier(pooled)


class OneByOne(Renamed):
    def forward(self, features):
        return torch.cat([super(OneByOne, self).forward(bag[None]) for bag in features])


class Auxiliary(Renamed):
    """One more layer gives each bag a vector, after the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Linear(4, 5)

    def forward(self, features):
        logits = super().forward(features)
        self.after(features.mean(dim=1))
        return logits


def _bags(n_bags=5, width=4, n_classes=3):
    generator = torch.Generator().manual_seed(0)
    return [
        Bag(
            torch.randn(4 + index, width, generator=generator),
            label=index % n_classes,
            bag_id=f"bag {index}",
        )
        for index in range(n_bags)
    ]


def _fit(folder, model, callback, *, batch_size=1, n_classes=3):
    """A module fitted for an epoch on bags, whose features are validated in the end."""
    data = BagDataModule(_bags(n_classes=n_classes), _bags(n_classes=n_classes), seed=0)
    data.batch_size = batch_size
    module = MILModule(model, n_classes=n_classes)
    make_trainer(folder, callback, max_epochs=1).fit(module, datamodule=data)
    return module


def _head_inputs(module, name):
    """What the named layer gets of each bag, one forward per bag."""
    inputs = []
    layer = module.model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten()))
    module.eval()
    with torch.no_grad():
        for bag in _bags():
            module.model(bag.features[None])
    handle.remove()
    return torch.stack(inputs).numpy()


def test_bag_features__every_epoch__are_the_inputs_of_the_head(tmp_path):
    module = seeded_module(Classifying)
    batches = make_batches(3)

    make_trainer(tmp_path, BagFeatures(), num_sanity_val_steps=2).fit(
        module, make_loader(batches), make_loader(batches)
    )

    epochs = read_bag_features(tmp_path / "bag_features")
    assert [own.epoch for own in epochs] == [0, 1]
    pooled = torch.stack(module.pooled[2:]).unflatten(0, (2, 3)).flatten(1, 2)  # epoch, bag, width
    for own, expected in zip(epochs, pooled, strict=True):
        assert own.bag_ids == [f"bag{index}_{bag}" for index in range(3) for bag in range(2)]
        assert own.labels.tolist() == torch.cat([batch["label"] for batch in batches]).tolist()
        assert own.features.dtype == np.float16
        np.testing.assert_allclose(own.features, expected.detach().numpy(), rtol=1e-3, atol=1e-4)
    assert not np.array_equal(epochs[0].features, epochs[1].features)
    assert_clean(module)


def test_bag_features__in_a_fit__change_nothing_and_run_no_forward(tmp_path):
    trained, n_forwards = [], []
    for callbacks in ([], [BagFeatures()]):
        module = seeded_module()
        counted = []
        module.net.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        make_trainer(tmp_path, *callbacks).fit(module, make_loader(), make_loader())
        trained.append(parameters_of(module))
        n_forwards.append(len(counted))

    assert_equal_states(*trained)
    assert n_forwards[0] == n_forwards[1]


_BASELINES = {
    "abmil": lambda: ABMIL(4, 3, hidden=8),
    "clam_sb": lambda: CLAMSB(4, 3, hidden=8),
    "clam_mb": lambda: CLAMMB(4, 3, hidden=8),
    "dsmil": lambda: DSMIL(4, 3),
    "transmil": lambda: TransMIL(4, 3, hidden=16),
}


def _assert_inputs_of(module, name, folder):
    (epoch,) = read_bag_features(folder)
    assert epoch.bag_ids == [bag.bag_id for bag in _bags()]
    assert epoch.labels.tolist() == [bag.label for bag in _bags()]
    np.testing.assert_allclose(epoch.features, _head_inputs(module, name), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", _BASELINES)
def test_bag_features__baseline__are_what_its_head_gets_of_each_bag(tmp_path, name, batch_size):
    torch.manual_seed(0)
    module = _fit(tmp_path, _BASELINES[name](), BagFeatures(), batch_size=batch_size)
    _assert_inputs_of(module, "head", tmp_path / "bag_features")


@pytest.mark.parametrize("model", [Renamed, OneByOne, Auxiliary])
def test_bag_features__head_of_another_name__is_found(tmp_path, model):
    torch.manual_seed(0)
    module = _fit(tmp_path, model(), BagFeatures())
    _assert_inputs_of(module, "classifier", tmp_path / "bag_features")


@pytest.mark.parametrize("model", [Renamed, OneByOne])
def test_bag_features__batch_of_several__are_those_of_each_bag(tmp_path, model):
    class Module(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

    batches = make_batches(2, n_bags=3)
    module = seeded_module(Module)
    make_trainer(tmp_path, BagFeatures(), max_epochs=1).fit(
        module, make_loader(batches), make_loader(batches)
    )

    (epoch,) = read_bag_features(tmp_path / "bag_features")
    got = []
    module.net.classifier.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    module.eval()
    for batch in batches:
        module.net(batch["features"])
    expected = torch.cat(got).detach().numpy()
    np.testing.assert_allclose(epoch.features, expected, rtol=1e-3, atol=1e-4)


def test_bag_features__head_named__is_what_its_path_says(tmp_path):
    torch.manual_seed(0)
    callback = BagFeatures("model.gate", path=tmp_path / "own")

    module = _fit(tmp_path, Renamed(), callback)

    _assert_inputs_of(module, "gate", tmp_path / "own")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_bag_features__stop_and_resume__are_those_of_the_uninterrupted_run(tmp_path):
    class Breaking(TinyModule):
        breaks = False

        def on_train_epoch_end(self):
            # After validation has written its file, before the checkpoint of this epoch.
            if self.breaks and self.current_epoch == 2:
                raise KeyError("power cut")

    def fit(folder, *, breaks, ckpt_path=None):
        module = seeded_module(Breaking)
        module.breaks = breaks
        keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
        trainer = make_trainer(
            folder, BagFeatures(), RandomState(), keeper, max_epochs=4, enable_checkpointing=True
        )
        try:
            trainer.fit(module, make_loader(shuffle=True), make_loader(), ckpt_path=ckpt_path)
        finally:
            assert_clean(module)

    fit(tmp_path / "whole", breaks=False)
    with pytest.raises(KeyError, match="power cut"):
        fit(tmp_path / "broken", breaks=True)
    stale = tmp_path / "broken" / "bag_features" / "7.npz"
    stale.write_bytes(b"of a longer run")
    fit(tmp_path / "broken", breaks=False, ckpt_path=tmp_path / "broken" / "last.ckpt")

    whole = read_bag_features(tmp_path / "whole" / "bag_features")
    broken = read_bag_features(tmp_path / "broken" / "bag_features")
    assert [own.epoch for own in whole] == [own.epoch for own in broken] == [0, 1, 2, 3]
    for one, other in zip(whole, broken, strict=True):
        assert one.bag_ids == other.bag_ids
        np.testing.assert_array_equal(one.features, other.features)


def test_bag_features__bags_without_ids__are_numbered(tmp_path):
    batches = make_batches(2)
    for batch in batches:
        del batch["bag_id"]

    make_trainer(tmp_path, BagFeatures(), max_epochs=1).fit(
        seeded_module(), make_loader(batches), make_loader(batches)
    )

    (epoch,) = read_bag_features(tmp_path / "bag_features")
    assert epoch.bag_ids == ["0:0:0", "0:0:1", "0:1:0", "0:1:1"]


@pytest.mark.parametrize("why", ["", "rank 1 has no head"])
def test_bag_features__second_process__is_written_too_or_stops_both(tmp_path, monkeypatch, why):
    def gathered(own):
        (of_bags, problem) = own
        others = {f"other {bag_id}": bag for bag_id, bag in of_bags.items()}
        # A distributed sampler may give both the same bag.
        return [(of_bags, problem), ({**others, **dict([*of_bags.items()][:1])}, why)]

    monkeypatch.setattr("mil_anchor.callbacks.bag_features.gather_objects", gathered)
    batches = make_batches(1)
    trainer = make_trainer(tmp_path, BagFeatures(), max_epochs=2)

    def fit():
        trainer.fit(seeded_module(), make_loader(batches), make_loader(batches))

    if why:
        with pytest.warns(UserWarning, match=f"Bag features are not kept: {why}"):
            fit()
        assert not (tmp_path / "bag_features").exists()
    else:
        fit()
        epochs = read_bag_features(tmp_path / "bag_features")
        assert [own.epoch for own in epochs] == [0, 1]
        for own in epochs:
            assert own.bag_ids == ["bag0_0", "bag0_1", "other bag0_0", "other bag0_1"]
            np.testing.assert_array_equal(own.features[:2], own.features[2:])


class Twice(Renamed):
    def forward(self, features):
        return super().forward(features) + super().forward(features)


class Huge(Renamed):
    def forward(self, features):
        return self.classifier(features.mean(dim=1) * 1e6)


class PerInstance(Renamed):
    def forward(self, features):
        return self.classifier(features).mean(dim=1)


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [
        (Renamed, "model.nowhere", "must name a submodule of MILModule"),
        (Twice, "model.classifier", r"run once on a batch, or once for each bag, but on 1 bag"),
        (Huge, None, r"at most 65504\.0 to be kept in float16"),
        (PerInstance, None, r"of the layers \['model\.classifier'\] that ran on 1 bag\(s\) none"),
        (PerInstance, "model.classifier", "must have one width, but .* got 16 and 20 numbers"),
    ],
)
def test_bag_features__not_found__is_a_warning_and_the_run_goes_on(tmp_path, model, head, message):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"(?s)Bag features are not kept: .*{message}"):
        module = _fit(tmp_path, model(), BagFeatures(head))

    assert_clean(module)
    with pytest.raises(ValueError, match=r"must hold the bag features .* bag_features=true"):
        read_bag_features(tmp_path / "bag_features")


def test_bag_features__batch_without_labels__is_a_warning(tmp_path):
    class Unlabelled(TinyModule):
        def validation_step(self, batch, batch_idx):
            self.net(batch["features"])

    batches = make_batches(1)
    unlabelled = [{"features": batches[0]["features"]}]

    with pytest.warns(UserWarning, match="labels of its bags under 'label'.* a NoneType"):
        make_trainer(tmp_path, BagFeatures(), max_epochs=1).fit(
            seeded_module(Unlabelled), make_loader(batches), make_loader(unlabelled)
        )


def test_bag_features__number_of_classes_unknown__the_last_vector_per_bag_counts(tmp_path):
    class Module(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Auxiliary()

    batches = make_batches(2, n_bags=1)
    make_trainer(tmp_path, BagFeatures(), max_epochs=1).fit(
        seeded_module(Module), make_loader(batches), make_loader(batches)
    )

    (epoch,) = read_bag_features(tmp_path / "bag_features")
    means = torch.cat([batch["features"].mean(dim=1) for batch in batches])
    np.testing.assert_allclose(epoch.features, means, rtol=1e-3, atol=1e-4)
