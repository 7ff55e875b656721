import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from mil_anchor import AnchorCallback, AttentionSite, RandomState
from mil_anchor.attention import kl_divergence, log_normalized_sigmoid, log_softmax
from mil_anchor.data.bags import Bag, collate_bags
from mil_anchor.module import MILModule
from mil_anchor.sites.encoder import EncoderSite
from mil_anchor.torchmil import TorchMIL
from tests.baselines.test_with_plugin import MODELS
from tests.callbacks.by_hand import assert_same_training, hand_written_fit
from tests.callbacks.subjects import SUBJECTS
from tests.callbacks.tiny import (
    TinyMIL,
    TinyModule,
    assert_clean,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

SITE = AttentionSite("net.attention", layout="b n r")
TORCHMIL = {
    "ABMIL": {"att_dim": 8, "gated": True},
    "CLAM_SB": {"att_dim": 8, "k_sample": 1},
    "DSMIL": {"att_dim": 8},
    "TransMIL": {"att_dim": 16},
}


def _tiny_scores(net, features):
    """The scores of encoder and attention, from the formulas."""
    first = net.encoder[0]
    hidden = torch.relu(features @ first.weight.T + first.bias)
    return SUBJECTS["tiny"].scores(net.attention, hidden)


# The whole model is the block, and the raw features are its input.
WHOLE = SUBJECTS["tiny"]._replace(
    block="net", hidden=lambda module, batch: batch["features"], scores=_tiny_scores
)


class Identity(TinyModule):
    """Its encoder has no parameters and no randomness."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.net.encoder = nn.Identity()
        self.net.attention = nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)
        )
        self.net.head = nn.Linear(4, 2)


def _callback(**options):
    return AnchorCallback(SITE, **{"scope": "encoder", "weight": 0.5, "decay": 0.9, **options})


@pytest.mark.parametrize("target", ["nsf", "softmax"])
@pytest.mark.parametrize(
    ("options", "how"),
    [({}, {}), ({"accumulate_grad_batches": 4}, {"accumulate": 4})],
    ids=["plain", "accumulation"],
)
def test_scope__encoder__equals_the_method_written_by_hand(tmp_path, target, options, how):
    module, batches = seeded_module(dropout=0.0), make_batches()
    anchor, kl, reference = hand_written_fit(
        WHOLE, module, batches, weight=0.7, decay=0.8, target=target, **how
    )
    callback = _callback(target=target, weight=0.7, decay=0.8)
    trainer = make_trainer(tmp_path, callback, precision="64-true", **options)

    trainer.fit(module, make_loader(batches))

    assert "encoder.0.weight" in callback.state_dict()["anchor"]
    assert_same_training(module, callback, reference, anchor)
    assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(kl, rel=1e-6)
    assert_clean(module)


def test_scope__encoder_and_block__differ_by_the_encoder_alone(tmp_path):
    for cls, are_equal in ((Identity, True), (TinyModule, False)):
        trained, values = [], []
        for scope in ("block", "encoder"):
            module = seeded_module(cls)
            trainer = make_trainer(tmp_path, _callback(scope=scope))
            trainer.fit(module, make_loader())
            trained.append(parameters_of(module))
            values.append(trainer.callback_metrics["anchor/kl"].item())

        assert (values[0] == values[1]) == are_equal
        if are_equal:
            assert_equal_states(*trained)


def test_scope__decay_0_without_dropout__has_the_online_scores_after_each_update(tmp_path):
    values = {}
    for decay in (0.0, 0.9):
        callback = _callback(target="softmax", decay=decay, weight=0.0)
        trainer = make_trainer(tmp_path, callback)
        trainer.fit(seeded_module(dropout=0.0), make_loader())
        values[decay] = trainer.callback_metrics["anchor/kl"].item()

    assert values[0.0] == pytest.approx(0, abs=1e-6)
    assert values[0.9] > 1e-3


def test_scope__dropout_in_the_encoder__is_off_in_the_anchor(tmp_path):
    class Looking(AnchorCallback):
        def penalty(self, attention):
            net = self.anchor.block
            hidden = net.encoder(self.features)
            assert not net.training
            expected = kl_divergence(
                log_normalized_sigmoid(net.attention(hidden).mT), log_softmax(attention.scores)
            )
            found = super().penalty(attention)
            assert torch.allclose(found, expected, atol=1e-6)
            return found

        def start_step(self, batch):
            super().start_step(batch)
            self.features = batch["features"]

    callback = Looking(SITE, scope="encoder", weight=0.5)
    make_trainer(tmp_path, callback).fit(seeded_module(dropout=0.5), make_loader())


def test_scope__weight_0__equals_no_plugin_bit_for_bit(tmp_path):
    trained = []
    for callbacks in ([], [_callback(weight=0.0)]):
        module = seeded_module()
        make_trainer(tmp_path, *callbacks).fit(module, make_loader(shuffle=True))
        trained.append((parameters_of(module), torch.get_rng_state()))

    assert_equal_states(trained[0][0], trained[1][0])
    assert torch.equal(trained[0][1], trained[1][1])


def _padded_batch(*lengths):
    generator = torch.Generator().manual_seed(1)
    return collate_bags(
        [
            Bag(torch.randn(length, 6, generator=generator), index % 2, f"bag{index}")
            for index, length in enumerate(lengths)
        ]
    )


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        (name, lengths)
        for name in (*MODELS, *TORCHMIL)
        for lengths in ((7,), (9, 6))
        if name != "TransMIL" or len(lengths) == 1  # torchmil's takes no mask
    ],
)
def test_scope__every_model__takes_a_step_with_an_anchor_of_the_whole_model(
    tmp_path, name, lengths
):
    torch.manual_seed(0)
    model = MODELS[name]() if name in MODELS else TorchMIL(6, 2, name=name, options=TORCHMIL[name])
    module = MILModule(model, n_classes=3 if name == "clam_mb" else 2, lr=0.01)
    callback = AnchorCallback(scope="encoder", weight=0.1, decay=0.5)
    start = parameters_of(model)

    make_trainer(tmp_path, callback, max_steps=1).fit(
        module, make_loader([_padded_batch(*lengths)])
    )

    anchor, online = callback.state_dict()["anchor"], parameters_of(model)
    assert anchor.keys() == online.keys()
    moved = [key for key in online if not torch.equal(online[key], start[key])]
    assert len(moved) > 2
    for key in moved:
        middle = (start[key] + online[key]) / 2
        assert torch.allclose(anchor[key], middle, atol=1e-6), key


@pytest.mark.parametrize("name", ["tiny", "transmil"])
def test_scope__found_or_known_site__trains_like_the_named_one(tmp_path, name):
    trained = []
    for site in (None, "named"):
        if name == "tiny":
            module, batches = seeded_module(), make_batches()
            site = site and SITE
        else:
            torch.manual_seed(0)
            module = MILModule(MODELS["transmil"](), n_classes=2)
            batches = [_padded_batch(7, 5), _padded_batch(6, 6)]
            path = "model.layers.-1.attention.query_key"
            site = site and AttentionSite(path, layout="b r n", surrogate=True)
        torch.manual_seed(1)
        callback = AnchorCallback(site, scope="encoder", weight=0.5, decay=0.9)
        make_trainer(tmp_path, callback).fit(module, make_loader(batches))
        trained.append((parameters_of(module), callback.state_dict()["anchor"]))

    assert_equal_states(trained[0][0], trained[1][0])
    assert_equal_states(trained[0][1], trained[1][1])


def test_scope__model_named_by_an_encoder_site__is_the_same_option(tmp_path):
    trained = []
    for site, scope in ((SITE, "encoder"), (EncoderSite(SITE, "net"), "block")):
        module = seeded_module()
        callback = AnchorCallback(site, scope=scope, weight=0.5, decay=0.9)
        make_trainer(tmp_path, callback).fit(module, make_loader())
        trained.append(parameters_of(module))

    assert_equal_states(*trained)


def test_scope__lazy_encoder__starts_at_the_first_forward(tmp_path):
    class Lazy(TinyModule):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.net.encoder = nn.Sequential(nn.LazyLinear(8), nn.ReLU())

    callback = _callback(target="softmax")
    trainer = make_trainer(tmp_path, callback, max_steps=1)

    trainer.fit(seeded_module(Lazy), make_loader(make_batches(1)))

    assert callback.state_dict()["anchor"]["encoder.0.weight"].shape == (8, 4)
    assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(0, abs=1e-6)


def test_scope__model_called_several_times_in_a_step__is_averaged_over_all_calls(tmp_path):
    class BagByBag(TinyModule):
        def loss(self, batch):
            logits = torch.cat([self.net(features=one[None]) for one in batch["features"]])
            return nn.functional.cross_entropy(logits, batch["label"])

    trained = []
    for cls in (TinyModule, BagByBag):
        module = seeded_module(cls, dropout=0.0)
        callback = _callback()
        make_trainer(tmp_path, callback, precision="64-true").fit(module, make_loader())
        trained.append(callback.state_dict()["anchor"])

    for key, tensor in trained[0].items():
        assert torch.allclose(tensor, trained[1][key], atol=1e-10), key


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_scope__stop_and_resume__equals_the_uninterrupted_run_bit_for_bit(tmp_path):
    def fit(folder, *, epochs=4, ckpt_path=None):
        module, callback = seeded_module(), _callback()
        keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
        trainer = make_trainer(
            folder, callback, RandomState(), keeper, max_epochs=epochs, enable_checkpointing=True
        )
        trainer.fit(module, make_loader(shuffle=True), make_loader(), ckpt_path=ckpt_path)
        return parameters_of(module), callback.state_dict()["anchor"]

    whole = fit(tmp_path / "whole")
    fit(tmp_path / "halves", epochs=2)
    torch.rand(100)
    resumed = fit(tmp_path / "halves", ckpt_path=tmp_path / "halves" / "last.ckpt")

    assert_equal_states(whole[0], resumed[0])
    assert_equal_states(whole[1], resumed[1])


def test_scope__block_and_encoder_in_one_run__keep_states_and_log_keys_of_their_own(tmp_path):
    block, encoder = _callback(scope="block"), _callback()
    trainer = make_trainer(tmp_path, block, encoder)

    trainer.fit(seeded_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    logged = trainer.callback_metrics
    for index, callback in enumerate((block, encoder)):
        distance = logged[f"anchor/distance/net.attention/{index}"]
        assert distance == callback.distance()
    assert logged["anchor/kl/net.attention/0"] != logged["anchor/kl/net.attention/1"]

    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    assert "0.weight" in states[block.state_key]["anchor"]
    assert "encoder.0.weight" in states[encoder.state_key]["anchor"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", ["module", "model", "block"])
def test_scope__anything_compiled__trains_like_the_plain_module(tmp_path, compiled):
    plain, module = (seeded_module(dropout=0.0) for _ in range(2))
    fitted = module
    if compiled == "module":
        fitted = torch.compile(module, backend="eager")
    else:
        module.get_submodule({"model": "net", "block": "net.attention"}[compiled]).compile(
            backend="eager"
        )

    make_trainer(tmp_path, _callback()).fit(fitted, make_loader())
    torch.compiler.reset()
    make_trainer(tmp_path, _callback()).fit(plain, make_loader())

    assert_equal_states(parameters_of(plain), parameters_of(module))


def test_scope__other_word__is_named():
    with pytest.raises(ValueError, match="scope must be one of block, encoder, but got 'model'"):
        AnchorCallback(SITE, scope="model")


def test_scope__block_beside_its_encoder__says_how_to_wrap_them(tmp_path):
    class Flat(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.attention = self.net.encoder, self.net.attention
            self.head = self.net.head
            del self.net

        forward = TinyMIL.forward

        def loss(self, batch):
            return nn.functional.cross_entropy(self(batch["features"]), batch["label"])

    for site in ("attention", None):
        with pytest.raises(ValueError, match="must lie in a submodule of Flat that holds the enco"):
            make_trainer(tmp_path, AnchorCallback(site, scope="encoder")).fit(Flat(), make_loader())


def test_scope__model_whose_forward_is_called__says_what_to_do(tmp_path):
    subject = SUBJECTS["torchmil"]
    module = seeded_module(subject.module)

    with pytest.raises(ValueError, match=r"of 'model' as a module, but it ran without one\. Call"):
        make_trainer(tmp_path, AnchorCallback(subject.site, scope="encoder")).fit(
            module, make_loader(subject.batches())
        )

    assert_clean(module)


@pytest.mark.parametrize("draw", ["torch", "numpy"])
def test_scope__model_that_shuffles__is_refused(tmp_path, draw):
    class Shuffling(TinyMIL):
        def forward(self, features):
            n = features.shape[1]
            order = torch.randperm(n) if draw == "torch" else np.random.permutation(n)  # noqa: NPY002
            return super().forward(features[:, order])

    class Module(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Shuffling(0.0)

    np.random.seed(0)  # noqa: NPY002
    with pytest.raises(MisconfigurationException, match=r"draws random numbers.*strict=False"):
        make_trainer(tmp_path, _callback()).fit(seeded_module(Module), make_loader())
    with pytest.warns(UserWarning, match="draws random numbers, and perhaps the order"):
        make_trainer(tmp_path, _callback(strict=False)).fit(seeded_module(Module), make_loader())
