import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from mil_anchor import AnchorCallback, AttentionSite, RandomState
from tests.callbacks.tiny import (
    TinyModule,
    assert_equal_states,
    hand_written_fit,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

BLOCK = "net.attention"


def _assert_same_training(module, callback, reference, anchor, tolerance=1e-10):
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(module.state_dict()[name], tensor, atol=tolerance), name
    state = callback.state_dict()["anchor"]
    for name, tensor in anchor.state_dict().items():
        assert torch.allclose(state[name], tensor, atol=tolerance), name


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
def test_anchor_callback__fit__equals_the_method_written_by_hand(tmp_path, target, options, how):
    module = seeded_module(dropout=0.0)
    weight, decay = 0.7, 0.8
    anchor, kl, reference = hand_written_fit(
        module, make_batches(), weight=weight, decay=decay, target=target, **how
    )
    update = "epoch" if how.get("per_epoch") else "step"
    callback = AnchorCallback(BLOCK, target=target, decay=decay, weight=weight, update=update)
    trainer = make_trainer(tmp_path, callback, precision="64-true", **options)

    trainer.fit(module, make_loader())

    _assert_same_training(module, callback, reference, anchor)
    assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(kl, rel=1e-6)
    assert trainer.callback_metrics["anchor/loss"].item() == pytest.approx(weight * kl, rel=1e-6)


def test_anchor_callback__dict_result__trains_like_a_tensor(tmp_path):
    trained = []
    for returns in ("tensor", "dict"):
        module = seeded_module(returns=returns)
        make_trainer(tmp_path, AnchorCallback(BLOCK, weight=0.5)).fit(module, make_loader())
        trained.append(parameters_of(module))

    assert_equal_states(*trained)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_anchor_callback__none_result__skips_the_step_and_its_update(tmp_path):
    module = seeded_module(returns="none", dropout=0.0)
    batches = make_batches()
    anchor, _, reference = hand_written_fit(module, batches[::2], weight=0.5, decay=0.8)
    callback = AnchorCallback(BLOCK, weight=0.5, decay=0.8)

    make_trainer(tmp_path, callback, precision="64-true").fit(module, make_loader(batches))

    _assert_same_training(module, callback, reference, anchor)


def test_anchor_callback__weight_0__equals_no_plugin_bit_for_bit(tmp_path):
    bare, measured = seeded_module(), seeded_module()
    callback = AnchorCallback(BLOCK, weight=0.0)
    loader = make_loader(make_batches(20), shuffle=True)

    make_trainer(tmp_path, max_epochs=1).fit(bare, loader)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(measured, loader)

    assert trainer.global_step == 20
    assert_equal_states(parameters_of(bare), parameters_of(measured))
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.callback_metrics["anchor/kl"] > 0


def test_anchor_callback__bf16_mixed__anchors_in_float32_and_moves(tmp_path):
    module = seeded_module(dropout=0.0)
    before = parameters_of(module)
    anchor, kl, _ = hand_written_fit(module, make_batches(), weight=0.5, decay=0.99)
    callback = AnchorCallback(BLOCK, weight=0.5, decay=0.99)
    trainer = make_trainer(tmp_path, callback, precision="bf16-mixed")

    trainer.fit(module, make_loader())

    state = callback.state_dict()["anchor"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert trainer.callback_metrics["anchor/kl"].dtype == torch.float32
    assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(kl, rel=0.1)
    for name, tensor in anchor.state_dict().items():
        assert torch.allclose(state[name].double(), tensor, atol=0.02)
        assert not torch.equal(state[name], before[f"net.attention.{name}"])


def test_anchor_callback__bf16_true__anchor_still_moves(tmp_path):
    module = seeded_module()
    callback = AnchorCallback(BLOCK, weight=0.5, decay=0.999)

    make_trainer(tmp_path, callback, precision="bf16-true").fit(module, make_loader())

    state = callback.state_dict()["anchor"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert not torch.equal(state["0.weight"], state["0.weight"].bfloat16().float())


class Manual(TinyModule):
    def __init__(self, how="manual_backward", **options) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.how = how

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        if self.how == "manual_backward":
            self.manual_backward(loss)
        elif self.how == "raw":
            loss.backward()
        elif self.how == "other_loss":
            self.manual_backward(self.net.head.weight.sum())
        optimizer.step()


def test_anchor_callback__manual_optimization__equals_the_method_written_by_hand(tmp_path):
    module = seeded_module(Manual, dropout=0.0)
    anchor, kl, reference = hand_written_fit(module, make_batches(), weight=0.5, decay=0.8)
    callback = AnchorCallback(BLOCK, weight=0.5, decay=0.8)
    trainer = make_trainer(tmp_path, callback, precision="64-true")

    trainer.fit(module, make_loader())

    _assert_same_training(module, callback, reference, anchor)
    assert trainer.callback_metrics["anchor/kl"].item() == pytest.approx(kl, rel=1e-6)
    assert "manual_backward" not in vars(module)


def test_anchor_callback__raw_backward_in_manual_optimization__is_refused_with_advice(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"self\.manual_backward\(loss\)"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(Manual("raw"), make_loader())


def test_anchor_callback__manual_block_that_never_runs__says_what_to_check(tmp_path):
    class Unused(Manual):
        def __init__(self) -> None:
            super().__init__("raw")
            self.unused = nn.Linear(4, 1)

    with pytest.raises(MisconfigurationException, match="'unused' run with gradients in every"):
        make_trainer(tmp_path, AnchorCallback("unused")).fit(Unused(), make_loader())


class TwoOptimizers(Manual):
    """Two optimizers share the attention block; each steps once a batch."""

    def configure_optimizers(self):
        first, last = self.net.attention[0], self.net.attention[-1]
        return (
            torch.optim.SGD([*self.net.encoder.parameters(), *first.parameters()], lr=0.1),
            torch.optim.SGD([*self.net.head.parameters(), *last.parameters()], lr=0.1),
        )

    def training_step(self, batch, batch_idx):
        one, two = self.optimizers()
        one.zero_grad()
        two.zero_grad()
        self.manual_backward(self.loss(batch))
        one.step()
        two.step()


def test_anchor_callback__two_optimizers__moves_each_parameter_once_per_own_step(tmp_path):
    module = seeded_module(TwoOptimizers)
    callback = AnchorCallback(BLOCK, weight=0.0, decay=0.5)
    start = parameters_of(module.net.attention)

    make_trainer(tmp_path, callback, max_steps=2).fit(module, make_loader(make_batches(1)))

    end, state = parameters_of(module.net.attention), callback.state_dict()["anchor"]
    for name, tensor in state.items():
        assert torch.allclose(tensor, (start[name] + end[name]) / 2), name


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_anchor_callback__stop_and_resume__equals_the_uninterrupted_run_bit_for_bit(
    tmp_path, caplog
):
    def fit(folder, epochs, ckpt_path=None):
        module = seeded_module()
        callback = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
        keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
        trainer = make_trainer(
            folder, callback, RandomState(), keeper, max_epochs=epochs, enable_checkpointing=True
        )
        loader = make_loader(shuffle=True)
        trainer.fit(module, loader, make_loader(), ckpt_path=ckpt_path)
        return parameters_of(module), callback.state_dict()["anchor"], torch.get_rng_state()

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "halves", 2)
    torch.rand(100)
    with caplog.at_level("INFO"):
        resumed = fit(tmp_path / "halves", 4, tmp_path / "halves" / "last.ckpt")

    assert "holds no anchor" not in caplog.text

    assert_equal_states(whole[0], resumed[0])
    assert_equal_states(whole[1], resumed[1])
    assert torch.equal(whole[2], resumed[2])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_anchor_callback__interrupted_epoch__is_repeated_on_resume(tmp_path):
    class Breaking(TinyModule):
        breaks = True

        def training_step(self, batch, batch_idx):
            if self.breaks and self.current_epoch == 2 and batch_idx == 3:
                raise KeyError("power cut")
            return super().training_step(batch, batch_idx)

    def fit(folder, *, breaks, ckpt_path=None):
        module = seeded_module(Breaking)
        module.breaks = breaks
        callback = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
        keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
        trainer = make_trainer(
            folder, callback, RandomState(), keeper, max_epochs=4, enable_checkpointing=True
        )
        trainer.fit(module, make_loader(shuffle=True), ckpt_path=ckpt_path)
        return parameters_of(module), callback.state_dict()["anchor"]

    whole = fit(tmp_path / "whole", breaks=False)
    with pytest.raises(KeyError, match="power cut"):
        fit(tmp_path / "broken", breaks=True)
    resumed = fit(tmp_path / "broken", breaks=False, ckpt_path=tmp_path / "broken" / "last.ckpt")

    assert_equal_states(whole[0], resumed[0])
    assert_equal_states(whole[1], resumed[1])


def test_anchor_callback__checkpoint__loads_with_weights_only(tmp_path):
    callback = AnchorCallback(BLOCK)
    trainer = make_trainer(tmp_path, callback, RandomState())
    trainer.fit(seeded_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)

    assert_equal_states(
        checkpoint["callbacks"][callback.state_key]["anchor"], callback.state_dict()["anchor"]
    )
    assert not any("anchor" in name for name in checkpoint["state_dict"])


def test_anchor_callback__checkpoint_without_plugin__starts_from_its_weights_and_says_so(
    tmp_path, caplog
):
    bare = make_trainer(tmp_path, max_epochs=1)
    bare.fit(seeded_module(), make_loader())
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    loaded = torch.load(tmp_path / "bare.ckpt", weights_only=True)["state_dict"]
    callback = AnchorCallback(BLOCK, decay=0.0)

    module = Watched()
    module.callback = callback
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, callback).fit(
            module, make_loader(), ckpt_path=tmp_path / "bare.ckpt"
        )

    for name, tensor in module.seen.items():
        assert torch.equal(tensor, loaded[f"net.attention.{name}"])
    assert "holds no anchor" in caplog.text


class Watched(TinyModule):
    """Looks at a callback's anchor when training starts."""

    callback = None

    def on_train_start(self):
        self.seen = self.callback.state_dict()["anchor"]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_anchor_callback__evaluation_from_its_checkpoint__works_and_leaks_nothing(tmp_path, stage):
    trainer = make_trainer(tmp_path, AnchorCallback(BLOCK, weight=0.5, decay=0.9))
    trainer.fit(seeded_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    other = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
    trainer = make_trainer(tmp_path, other, max_epochs=1)
    module = TinyModule()
    getattr(trainer, stage)(module, make_loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)

    fresh = Watched()
    fresh.callback = other
    before = parameters_of(fresh.net.attention)
    trainer.fit(fresh, make_loader())
    assert_equal_states(fresh.seen, before)


def test_anchor_callback__second_model__gets_a_new_anchor(tmp_path):
    callback = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
    first = seeded_module()
    make_trainer(tmp_path, callback).fit(first, make_loader())

    again = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
    trained = []
    for used in (callback, again):
        second = seeded_module()
        make_trainer(tmp_path, used).fit(second, make_loader())
        trained.append(parameters_of(second) | used.state_dict()["anchor"])

    assert_equal_states(*trained)


def test_anchor_callback__fit_twice_on_one_trainer__trains_on_and_restores(tmp_path):
    module = seeded_module()
    callback = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, make_loader())
    after_first = parameters_of(module)
    trainer.fit_loop.max_epochs = 2

    trainer.fit(module, make_loader())

    assert any(not torch.equal(t, after_first[n]) for n, t in parameters_of(module).items())
    _assert_clean(module)


def _assert_clean(module):
    assert "training_step" not in vars(module)
    assert "manual_backward" not in vars(module)
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


@pytest.mark.parametrize("where", ["training_step", "on_train_batch_end", "validation_step"])
def test_anchor_callback__exception__leaves_the_module_as_it_was(tmp_path, where):
    module = seeded_module()

    def fail(*_):
        raise KeyError("broken on purpose")

    setattr(module, where, fail)
    held = vars(module)[where]
    callback = AnchorCallback(BLOCK)

    with pytest.raises(KeyError, match="broken on purpose"):
        make_trainer(tmp_path, callback).fit(module, make_loader(), make_loader())

    assert vars(module).pop(where) is held
    _assert_clean(module)


def test_anchor_callback__user_method_on_the_instance__is_put_back(tmp_path):
    module = seeded_module()
    seen = []

    def own_step(batch, batch_idx):
        seen.append(batch_idx)
        return module.loss(batch)

    module.training_step = own_step
    make_trainer(tmp_path, AnchorCallback(BLOCK, weight=0.5)).fit(module, make_loader())

    assert module.training_step is own_step
    assert len(seen) == 12


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
    _assert_clean(module)


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


def test_anchor_callback__block_that_no_optimizer_owns__is_refused(tmp_path):
    class HeadOnly(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="or the anchor never moves"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(seeded_module(HeadOnly), make_loader())


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
        ({"target": "relu"}, "target must be one of nsf, softmax, but got 'relu'"),
        ({"update": "batch"}, "update must be one of step, epoch, but got 'batch'"),
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
