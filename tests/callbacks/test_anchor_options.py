"""The options of AnchorCallback beyond the paper's method: laws, oracles and errors."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from typing_extensions import override

from mil_anchor import AnchorCallback, AttentionSite, RandomState
from mil_anchor.schedules import Ramp
from mil_anchor.targets import CenteredSigmoidTarget, SoftmaxTarget, Target, UniformTarget
from tests.callbacks.tiny import (
    TinyModule,
    assert_equal_states,
    make_batches,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

ROOT = Path(__file__).parents[2]
BLOCK = "net.attention"


class Follower(Callback):
    """Keeps what the attention block and the anchor are, before the first step and after each."""

    def __init__(self, plugin) -> None:
        self.plugin = plugin
        self.online: list[dict[str, torch.Tensor]] = []
        self.anchors: list[dict[str, torch.Tensor]] = []

    def _keep(self, module):
        self.online.append(parameters_of(module.net.attention))
        self.anchors.append(self.plugin.state_dict()["anchor"])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.online:
            self._keep(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._keep(pl_module)


def _fit(folder, plugin, *, batches=None, module=None, **options):
    """The module, what a `Follower` saw and the metrics of a fit in float64."""
    module = module or seeded_module(dropout=0.0)
    follower = Follower(plugin)
    callbacks = [plugin, follower] if plugin.target.reads_scores else [plugin]
    trainer = make_trainer(folder, *callbacks, precision="64-true", **options)
    trainer.fit(module, make_loader(batches))
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
    return module, follower, metrics


def _scores(block, hidden):
    first, last = block["0.weight"], block["3.weight"]
    inner = torch.tanh(hidden @ first.T + block["0.bias"])
    return (inner @ last.T + block["3.bias"]).transpose(1, 2)


def _measured(module, follower, batch, divergence):
    """The mean divergence of the last step of a fit with learning rate 0, by the formulas."""
    hidden = module.net.encoder(batch["features"].double())
    online = torch.softmax(_scores(follower.online[-2], hidden), dim=-1)
    held = torch.softmax(_scores(follower.anchors[-2], hidden), dim=-1)
    return divergence(held, online, hidden).item()


class Still(TinyModule):
    """Learns nothing: what is measured stays."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _still(folder, plugin, batch):
    return _fit(
        folder, plugin, batches=[batch], module=seeded_module(Still, dropout=0.0), max_epochs=1
    )


# --- warmup


def test_warmup__fit__is_the_average_whose_decay_rises(tmp_path):
    plugin = AnchorCallback(BLOCK, decay=0.35, warmup=True, weight=0.5)
    _, follower, _ = _fit(tmp_path, plugin, accumulate_grad_batches=2, max_epochs=3)

    # Two micro-batches make one step, and one update: (1 + t) / (10 + t) reaches .35 at t = 4.
    steps = follower.online[2::2]
    expected = follower.online[0]
    for t, online in enumerate(steps):
        decay = min(0.35, (1 + t) / (10 + t))
        expected = {name: decay * expected[name] + (1 - decay) * online[name] for name in online}
    assert len(steps) == 9
    assert plugin.state_dict()["n_updates"] == 9
    for name, tensor in expected.items():
        assert torch.allclose(plugin.state_dict()["anchor"][name], tensor, rtol=1e-10), name


# --- start and update


@pytest.mark.parametrize("update", ["step", "epoch", "never"])
def test_random_start__fit__begins_elsewhere_and_follows_the_block(tmp_path, update):
    plugin = AnchorCallback(BLOCK, decay=0.8, weight=0.5, start="random", update=update)
    _, follower, _ = _fit(tmp_path, plugin)

    first = follower.anchors[0]
    for name, tensor in follower.online[0].items():
        assert not torch.equal(first[name], tensor), name
    followed = {"step": follower.online[1:], "epoch": follower.online[6::6], "never": []}[update]
    expected = dict(first)
    for online in followed:
        expected = {name: 0.8 * expected[name] + 0.2 * online[name] for name in online}
    assert plugin.state_dict()["n_updates"] == len(followed)
    for name, tensor in expected.items():
        assert torch.allclose(plugin.state_dict()["anchor"][name], tensor, rtol=1e-10), name


def test_random_start__same_seed__is_the_same_run_and_weight_0_the_bare_one(tmp_path):
    runs = []
    for weight in (0.5, 0.5, 0.0):
        plugin = AnchorCallback(BLOCK, weight=weight, start="random", update="never")
        module = seeded_module()
        make_trainer(tmp_path, plugin).fit(module, make_loader(shuffle=True))
        runs.append((parameters_of(module), plugin.state_dict()["anchor"], torch.get_rng_state()))
    bare = seeded_module()
    make_trainer(tmp_path).fit(bare, make_loader(shuffle=True))

    for part in range(2):
        assert_equal_states(runs[0][part], runs[1][part])
    assert_equal_states(runs[2][0], parameters_of(bare))
    assert all(torch.equal(torch.get_rng_state(), state) for *_, state in runs)
    with pytest.raises(AssertionError):
        assert_equal_states(runs[0][0], runs[2][0])


@pytest.mark.parametrize("start", ["copy", "random"])
def test_update_never__fit__leaves_the_anchor_bit_for_bit(tmp_path, start):
    module = seeded_module()
    module.net.attention.insert(3, nn.LayerNorm(6))
    plugin = AnchorCallback(BLOCK, weight=0.5, start=start, update="never")
    follower = Follower(plugin)
    make_trainer(tmp_path, plugin, follower).fit(module, make_loader())

    assert_equal_states(follower.anchors[0], plugin.state_dict()["anchor"])
    if start == "copy":
        assert_equal_states(follower.anchors[0], follower.online[0])
    assert not torch.equal(follower.online[0]["0.weight"], follower.online[-1]["0.weight"])


def test_update_never__block_that_no_optimizer_owns__is_fine(tmp_path):
    class HeadOnly(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.1)

    make_trainer(tmp_path, AnchorCallback(BLOCK, update="never")).fit(HeadOnly(), make_loader())
    with pytest.raises(MisconfigurationException, match="An optimizer must own a parameter"):
        make_trainer(tmp_path, AnchorCallback(BLOCK)).fit(HeadOnly(), make_loader())


def test_random_start__lazy_block__is_drawn_once_it_exists(tmp_path):
    module = seeded_module(dropout=0.0)
    module.net.attention = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 2))
    plugin = AnchorCallback(BLOCK, weight=0.5, start="random", update="never")
    make_trainer(tmp_path, plugin, max_steps=1).fit(module, make_loader(make_batches(1)))

    assert plugin.state_dict()["anchor"]["0.weight"].shape == (6, 8)


def test_random_start__part_without_a_method_for_it__is_named(tmp_path):
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 2))

        def forward(self, features):
            return features @ self.weight

    module = seeded_module()
    module.net.attention = nn.Sequential(Bare())

    with pytest.raises(ValueError, match="there is none in Bare '0'"):
        make_trainer(tmp_path, AnchorCallback(BLOCK, start="random")).fit(module, make_loader())


@pytest.mark.slow
def test_random_start__two_processes_of_different_random_states__have_one_anchor(tmp_path):
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.ddp_random_start", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    one, two = (torch.load(tmp_path / f"rank{rank}_after2.pt") for rank in range(2))
    assert not torch.equal(one["random"], two["random"])
    assert_equal_states(one["anchor"], two["anchor"])
    assert_equal_states(one["module"], two["module"])


# --- resume


class Breaking(TinyModule):
    """Stops for good in the middle of the third epoch, if it is told to."""

    breaks = False

    def training_step(self, batch, batch_idx):
        if self.breaks and self.current_epoch == 2 and batch_idx == 3:
            raise KeyError("power cut")
        return super().training_step(batch, batch_idx)


def _stoppable(folder, options, *, breaks=False, ckpt_path=None):
    plugin = AnchorCallback(BLOCK, weight=0.5, **options)
    keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    trainer = make_trainer(
        folder, plugin, RandomState(), keeper, max_epochs=4, enable_checkpointing=True
    )
    module = seeded_module(Breaking)
    module.breaks = breaks
    trainer.fit(module, make_loader(shuffle=True), ckpt_path=ckpt_path)
    return parameters_of(module), plugin.state_dict()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "options",
    [
        {"warmup": True, "decay": 0.9},
        {"start": "random", "decay": 0.9},
        {"start": "random", "update": "never"},
        {"update": "epoch", "warmup": True},
        {"schedule": "ramp"},
        {"target": "uniform"},
    ],
    ids=["warmup", "random", "frozen", "epoch", "ramp", "uniform"],
)
def test_options__stop_and_resume__equal_the_uninterrupted_run_bit_for_bit(
    tmp_path, options, caplog
):
    whole = _stoppable(tmp_path / "whole", options)
    with pytest.raises(KeyError, match="power cut"):
        _stoppable(tmp_path / "broken", options, breaks=True)
    torch.rand(100)
    with caplog.at_level("INFO"):
        resumed = _stoppable(tmp_path / "broken", options, ckpt_path=tmp_path / "broken/last.ckpt")

    assert "holds no anchor" not in caplog.text
    assert_equal_states(whole[0], resumed[0])
    assert whole[1].keys() == resumed[1].keys()
    if whole[1]:
        assert_equal_states(whole[1]["anchor"], resumed[1]["anchor"])
        assert whole[1]["n_updates"] == resumed[1]["n_updates"]


def test_options__checkpoint__holds_plain_numbers_and_tensors(tmp_path):
    plugin = AnchorCallback(BLOCK, warmup=True, start="random", schedule="ramp")
    trainer = make_trainer(tmp_path, plugin)
    trainer.fit(seeded_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)

    state = checkpoint["callbacks"][plugin.state_key]
    assert state["n_updates"] == 12
    assert_equal_states(state["anchor"], plugin.state_dict()["anchor"])


def test_options__checkpoint_that_counts_no_updates__still_loads(tmp_path):
    old = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
    trainer = make_trainer(tmp_path, old, max_epochs=1)
    trainer.fit(seeded_module(), make_loader())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    del checkpoint["callbacks"][old.state_key]["n_updates"]
    torch.save(checkpoint, tmp_path / "old.ckpt")

    ends = []
    for name in ("old.ckpt", "new.ckpt"):
        plugin = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
        torch.manual_seed(5)
        module = TinyModule()
        make_trainer(tmp_path, plugin).fit(module, make_loader(), ckpt_path=tmp_path / name)
        ends.append((parameters_of(module), plugin.state_dict()))

    assert_equal_states(ends[0][0], ends[1][0])
    assert_equal_states(ends[0][1]["anchor"], ends[1][1]["anchor"])
    assert [end["n_updates"] for _, end in ends] == [6, 12]


# --- target


@dataclass(frozen=True)
class Recording(Target):
    """A softmax that keeps the progress it was given."""

    progress: list[float] = field(default_factory=list)

    @override
    def log_target(self, scores, *, progress):
        self.progress.append(progress)
        return torch.log_softmax(scores, dim=-1)


def test_target__object__gets_the_progress_and_trains_like_its_name(tmp_path):
    target = Recording()
    trained = [
        parameters_of(_fit(tmp_path, AnchorCallback(BLOCK, weight=0.5, target=choice))[0])
        for choice in (target, "softmax", SoftmaxTarget())
    ]

    assert target.progress == pytest.approx([step / 12 for step in range(12)])
    assert_equal_states(trained[0], trained[1])
    assert_equal_states(trained[0], trained[2])


def test_target__fit_without_an_end__works_unless_the_target_follows_the_training(tmp_path):
    class Stopping(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    plugin = AnchorCallback(BLOCK, weight=0.5)
    _, _, metrics = _fit(tmp_path, plugin, max_epochs=2)
    trainer = make_trainer(tmp_path, plugin, Stopping(), precision="64-true", max_epochs=-1)
    trainer.fit(seeded_module(dropout=0.0), make_loader())
    assert trainer.callback_metrics["anchor/kl"].item() == metrics["anchor/kl"]

    moving = CenteredSigmoidTarget(share=0.3, start_share=0.8, schedule="ramp")
    with pytest.raises(ValueError, match=r"progress of a training lies in \[0, 1\], but got nan"):
        make_trainer(tmp_path, AnchorCallback(BLOCK, target=moving), max_epochs=-1).fit(
            seeded_module(), make_loader()
        )


def test_target__uniform__needs_no_anchor(tmp_path):
    batch = make_batches(1)[0]
    plugin = AnchorCallback(BLOCK, target="uniform", weight=0.5)
    module, _, metrics = _still(tmp_path, plugin, batch)

    hidden = module.net.encoder(batch["features"].double())
    scores = _scores(parameters_of(module.net.attention), hidden)
    divergence = -math.log(5) - torch.log_softmax(scores, dim=-1).mean()
    assert metrics["anchor/kl"] == pytest.approx(divergence.item(), rel=1e-6)
    assert "anchor/distance" not in metrics
    assert plugin.state_dict() == {}
    with pytest.raises(RuntimeError, match=r"This target is UniformTarget\(\)"):
        _ = plugin.anchor


def test_target__uniform__does_not_ask_for_an_optimizer_of_the_block_nor_for_its_copy(tmp_path):
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo):
            raise AssertionError("nobody needs a copy")

    class HeadOnly(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.1)

    module = seeded_module(HeadOnly)
    module.net.attention = Uncopyable(8, 2)
    plugin = AnchorCallback(BLOCK, target=UniformTarget(), start="random")
    trainer = make_trainer(tmp_path, plugin, logger=False)
    trainer.fit(module, make_loader())

    assert trainer.callback_metrics["anchor/kl"] > 0


# --- match and reduction


def test_match__bag_feature__is_the_squared_distance_of_what_is_pooled(tmp_path):
    batch = make_batches(1)[0]
    plugin = AnchorCallback(
        BLOCK, match="bag_feature", weight=0.5, target="softmax", start="random", update="never"
    )
    module, follower, metrics = _still(tmp_path, plugin, batch)

    def distance(held, online, hidden):
        apart = torch.einsum("brn,bnw->brw", held - online, hidden)
        return apart.square().sum(dim=-1).mean() / 8

    expected = _measured(module, follower, batch, distance)
    assert metrics["anchor/bag_feature"] == pytest.approx(expected, rel=1e-6)
    assert metrics["anchor/loss"] == pytest.approx(0.5 * expected, rel=1e-6)
    assert "anchor/kl" not in metrics


def test_match__bag_feature__moves_the_attention_block_and_nothing_below_it(tmp_path):
    class NoTask(TinyModule):
        def loss(self, batch):
            return 0 * super().loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = seeded_module(NoTask, dropout=0.0)
    # Scores of a detached input: what could reach the encoder now goes through the features.
    module.net.attention.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
    before = parameters_of(module)
    plugin = AnchorCallback(BLOCK, match="bag_feature", weight=1.0)
    make_trainer(tmp_path, plugin).fit(module, make_loader())

    moved = {
        name
        for name, value in parameters_of(module).items()
        if not torch.equal(value, before[name])
    }
    # The last bias shifts all scores alike.
    assert moved >= {"net.attention.0.weight", "net.attention.0.bias", "net.attention.3.weight"}
    assert not any("encoder" in name or "head" in name for name in moved)


@pytest.mark.parametrize("n_instances", [3, 7, 40])
def test_reduction__mean__divides_the_logged_divergence_by_n(tmp_path, n_instances):
    batch = make_batches(1, n_instances=n_instances)[0]
    values = {
        reduction: _still(tmp_path, AnchorCallback(BLOCK, reduction=reduction), batch)[2]
        for reduction in ("sum", "mean")
    }

    for key in ("anchor/kl", "anchor/loss"):
        assert values["sum"][key] == pytest.approx(n_instances * values["mean"][key], rel=1e-5)


def test_reduction__mean__has_gradients_exactly_n_times_smaller(tmp_path):
    class Gradients(Callback):
        def on_after_backward(self, trainer, pl_module):
            self.kept = [p.grad.clone() for p in pl_module.net.attention.parameters()]

    class NoTask(Still):
        def loss(self, batch):
            return 0 * super().loss(batch)

    kept = {}
    for reduction in ("sum", "mean"):
        gradients = Gradients()
        plugin = AnchorCallback(BLOCK, reduction=reduction, weight=1.0)
        trainer = make_trainer(tmp_path, plugin, gradients, max_epochs=1, precision="64-true")
        batches = make_batches(1, n_bags=1, n_instances=64)
        trainer.fit(seeded_module(NoTask, dropout=0.0), make_loader(batches))
        kept[reduction] = gradients.kept

    for total, mean in zip(kept["sum"], kept["mean"], strict=True):
        assert torch.equal(total, 64 * mean)  # a power of two: nothing is rounded
    assert total.abs().max() > 0 or kept["sum"][0].abs().max() > 0


# --- schedule and log


def test_schedule__ramp__is_plain_training_up_to_its_begin_bit_for_bit(tmp_path):
    class Keeper(Callback):
        def __init__(self) -> None:
            self.states = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.states.append(parameters_of(pl_module))

    runs = []
    for plugin in ([], [AnchorCallback(BLOCK, weight=0.5, schedule=Ramp(0.5, 1.0))]):
        keeper = Keeper()
        trainer = make_trainer(tmp_path, *plugin, keeper, max_epochs=4)
        trainer.fit(seeded_module(), make_loader(shuffle=True))
        runs.append(keeper.states)

    # The step at a progress of exactly .5 has a weight of 0, too: 12 + 1 of 24 steps.
    for bare, ramped in zip(runs[0][:13], runs[1][:13], strict=True):
        assert_equal_states(bare, ramped)
    assert not torch.equal(
        runs[0][13]["net.attention.0.weight"], runs[1][13]["net.attention.0.weight"]
    )
    # Of the last epoch: the mean of weight x (progress - .5) / .5 over its steps.
    metrics = trainer.callback_metrics
    factors = [(step / 24 - 0.5) / 0.5 for step in range(18, 24)]
    weight = 0.5 * sum(factors) / 6
    assert metrics["anchor/weight"].item() == pytest.approx(weight, rel=1e-5)
    loss = weight * metrics["anchor/kl"].item()
    assert metrics["anchor/loss"].item() == pytest.approx(loss, rel=1e-5)


def test_log__constant_weight__has_the_distance_and_no_weight(tmp_path):
    plugin = AnchorCallback(BLOCK, weight=0.5, decay=0.9)
    module, _, metrics = _fit(tmp_path, plugin)

    held = torch.cat([x.flatten() for x in plugin.state_dict()["anchor"].values()])
    own = torch.cat([x.flatten() for x in parameters_of(module.net.attention).values()])
    expected = ((held - own).norm() / own.norm()).item()
    assert expected > 0.01
    assert metrics["anchor/distance"] == pytest.approx(expected, rel=1e-6)
    assert plugin.distance().item() == pytest.approx(expected, rel=1e-6)
    assert "anchor/weight" not in metrics


def test_distance__without_a_fit__says_when_there_is_an_anchor():
    with pytest.raises(RuntimeError, match="The anchor starts with the first training step"):
        AnchorCallback(BLOCK).distance()


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update": "always"}, "update must be one of step, epoch, never, but got 'always'"),
        ({"start": "zero"}, "start must be one of copy, random, but got 'zero'"),
        ({"match": "feature"}, "match must be one of attention, bag_feature, but got 'feature'"),
        ({"reduction": "max"}, "reduction must be one of sum, mean, but got 'max'"),
        (
            {"match": "bag_feature", "reduction": "mean"},
            "a bag feature .* has none. Leave reduction away",
        ),
        ({"schedule": "sudden"}, "sudden"),
        ({"scope": "model"}, "model"),
        ({"target": "flat"}, "A target must be one of softmax, nsf, .* but got 'flat'"),
    ],
)
def test_anchor_callback__wrong_option__is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnchorCallback(AttentionSite(BLOCK), **arguments)
