import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from mil_anchor import AnchorCallback, AttentionSite
from tests.callbacks.by_hand import assert_same_training, hand_written_fit
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

BLOCK = "net.attention"


@pytest.mark.parametrize("target", ["nsf", "softmax"])
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
        ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
        ({"max_epochs": 3}, {"epochs": 3, "per_epoch": True}),
    ],
    ids=["plain", "accumulation", "clipping", "update_per_epoch"],
)
def test_anchor_callback__fit__equals_the_method_written_by_hand(
    tmp_path, subject, target, options, how
):
    module, batches = seeded_module(subject.module, dropout=0.0), subject.batches()
    weight, decay = 0.7, 0.8
    anchor, kl, reference = hand_written_fit(
        subject, module, batches, weight=weight, decay=decay, target=target, **how
    )
    update = "epoch" if how.get("per_epoch") else "step"
    callback = AnchorCallback(
        subject.site, target=target, decay=decay, weight=weight, update=update
    )
    trainer = make_trainer(tmp_path, callback, precision="64-true", **options)

    trainer.fit(module, make_loader(batches))

    assert_same_training(module, callback, reference, anchor)
    assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(kl, rel=1e-6)
    assert trainer.callback_metrics["anchor/loss"].item() == pytest.approx(weight * kl, rel=1e-6)


def test_anchor_callback__dict_result__trains_like_a_tensor(tmp_path, subject):
    trained = []
    for returns in ("tensor", "dict"):
        module = seeded_module(subject.module, returns=returns)
        callback = AnchorCallback(subject.site, weight=0.5)
        make_trainer(tmp_path, callback).fit(module, make_loader(subject.batches()))
        trained.append(parameters_of(module))

    assert_equal_states(*trained)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_anchor_callback__none_result__skips_the_step_and_its_update(tmp_path, subject):
    module = seeded_module(subject.module, returns="none", dropout=0.0)
    batches = subject.batches()
    anchor, _, reference = hand_written_fit(subject, module, batches[::2], weight=0.5, decay=0.8)
    callback = AnchorCallback(subject.site, weight=0.5, decay=0.8)

    make_trainer(tmp_path, callback, precision="64-true").fit(module, make_loader(batches))

    assert_same_training(module, callback, reference, anchor)


def test_anchor_callback__weight_0__equals_no_plugin_bit_for_bit(tmp_path, subject):
    bare, measured = seeded_module(subject.module), seeded_module(subject.module)
    callback = AnchorCallback(subject.site, weight=0.0)
    loader = make_loader(subject.batches(20), shuffle=True)

    make_trainer(tmp_path, max_epochs=1).fit(bare, loader)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(measured, loader)

    assert trainer.global_step == 20
    assert_equal_states(parameters_of(bare), parameters_of(measured))
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.callback_metrics["anchor/kl"] > 0


def test_anchor_callback__two_on_two_blocks__both_act_and_log_apart(tmp_path):
    class TwoBlocks(TinyModule):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.second = nn.Linear(4, 1)

        def loss(self, batch):
            weights = torch.softmax(self.second(batch["features"]), dim=1)
            return super().loss(batch) + (weights**2).sum()

    one = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
    two = AnchorCallback("second", weight=0.5, target="softmax", decay=0.9)
    module = seeded_module(TwoBlocks)
    trainer = make_trainer(tmp_path, one, two)

    trainer.fit(module, make_loader())

    assert {"anchor/kl/net.attention", "anchor/kl/second"} <= trainer.callback_metrics.keys()
    assert one.state_key != two.state_key
    assert set(two.state_dict()["anchor"]) == {"weight", "bias"}
    assert_clean(module)


def test_anchor_callback__block_never_called__says_what_to_check(tmp_path):
    class Unused(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 1)

    with pytest.raises(
        MisconfigurationException,
        match="'unused' run with gradients in every",
    ):
        make_trainer(tmp_path, AnchorCallback("unused")).fit(seeded_module(Unused), make_loader())


def test_anchor_callback__block_under_no_grad__says_what_to_check(tmp_path):
    class Frozen(TinyModule):
        def loss(self, batch):
            with torch.no_grad():
                self.net(batch["features"])
            return self.net.head.weight.sum() + self.net.encoder[0].weight.sum()

    with pytest.raises(MisconfigurationException, match="does not run under no_grad"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(seeded_module(Frozen), make_loader())


@pytest.mark.parametrize("masked", [-torch.inf, -1e9, torch.finfo(torch.float32).min])
def test_anchor_callback__scores_that_the_block_masks_in_training__count_for_neither(
    tmp_path, masked
):
    class Masking(nn.Linear):
        def forward(self, features):
            scores = super().forward(features)
            return scores.index_fill(1, torch.tensor([0]), masked) if self.training else scores

    class Plain(nn.Linear):
        def forward(self, features):
            return super().forward(features)[:, 1:]

    losses = []
    for block in (Masking, Plain):
        module = seeded_module(dropout=0.0)
        torch.manual_seed(3)
        module.net.attention = block(8, 2)

        def loss(batch, module=module):
            scores = module.net.attention(module.net.encoder(batch["features"]))
            return (torch.softmax(scores, dim=1) ** 2).sum()

        module.loss = loss
        callback = AnchorCallback(AttentionSite(BLOCK, layout="b n r"), weight=0.5)
        trainer = make_trainer(tmp_path, callback, max_epochs=1)
        trainer.fit(module, make_loader())
        losses.append(trainer.callback_metrics["anchor/kl"].item())

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_anchor_callback__lazy_block__starts_at_the_first_forward(tmp_path):
    class Lazy(TinyModule):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.net.attention = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 2))

    callback = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
    trainer = make_trainer(tmp_path, callback, max_steps=1)

    trainer.fit(seeded_module(Lazy), make_loader(make_batches(1)))

    assert callback.state_dict()["anchor"]["0.weight"].shape == (6, 8)
    # At the first step the anchor still is the online block: a softmax target costs nothing. That
    # holds for a second model, too.
    softmax = AnchorCallback(BLOCK, target="softmax", weight=0.5)
    for _ in range(2):
        trainer = make_trainer(tmp_path, softmax, max_steps=1)
        trainer.fit(Lazy(), make_loader(make_batches(1)))
        assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(0, abs=1e-6)


def test_anchor_callback__tap_inside_the_block__equals_the_block_itself(tmp_path):
    trained = []
    for site in (
        AttentionSite(BLOCK, layout="b n r"),
        AttentionSite(BLOCK, tap="-1", layout="b n r"),
        AttentionSite("net.attention", tap="3"),
    ):
        module = seeded_module()
        make_trainer(tmp_path, AnchorCallback(site, weight=0.5)).fit(module, make_loader())
        trained.append(parameters_of(module))

    assert_equal_states(trained[0], trained[1])
    assert_equal_states(trained[0], trained[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -0.1}, "weight must be a finite number of at least 0, but got -0.1"),
        ({"weight": float("inf")}, "but got inf"),
        ({"weight": float("nan")}, "but got nan"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), but got 1.0"),
        ({"target": "relu"}, "target must be one of softmax, nsf, .*, but got 'relu'"),
        ({"update": "batch"}, "update must be one of step, epoch, never, but got 'batch'"),
    ],
)
def test_anchor_callback__argument_out_of_range__is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnchorCallback(BLOCK, **arguments)


def test_anchor_callback__wrong_path__names_the_part_that_fails(tmp_path):
    with pytest.raises(
        ValueError, match=r"TinyMIL has no 'attn'\. It has: encoder, attention, head"
    ):
        make_trainer(tmp_path, AnchorCallback("net.attn")).fit(seeded_module(), make_loader())


def test_anchor_callback__site_or_scope_changed__has_another_state_key():
    callback = AnchorCallback("net.attention")
    keys = [callback.state_key, callback.state_key]
    callback.scope = "encoder"
    keys.append(callback.state_key)
    callback.site = AttentionSite("net.attention", layout="b n r")
    keys.append(callback.state_key)

    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
