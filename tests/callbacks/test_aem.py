"""AEM: the negative entropy against its formula, and what it does to a training."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from mil_anchor import AnchorCallback, MultiheadSite, RandomState
from mil_anchor.callbacks.aem import AEMCallback
from mil_anchor.schedules import Ramp
from mil_anchor.sites.base import RecordedAttention
from tests.callbacks.by_hand import hand_written_penalty
from tests.callbacks.tiny import (
    Recipe,
    assert_clean,
    assert_equal_states,
    make_loader,
    make_trainer,
    parameters_of,
    seeded_module,
)

LAWS = settings(derandomize=True, deadline=None, max_examples=30)
bag_sizes = st.integers(1, 300)
scales = st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e4])
seeds = st.integers(0, 2**31)
ANNEALINGS = {
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "none": lambda p: 1.0,
}


def _scores(seed, n_instances, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, n_instances, generator=generator) * scale).to(dtype)


def _penalty(scores, mask=None, **options):
    return AEMCallback(**options).penalty(RecordedAttention(scores, mask, ()))


def naive_negative_entropy(scores):
    """sum a ln a as it is written, for moderate scores without padding."""
    attention = torch.exp(scores) / torch.exp(scores).sum(dim=-1, keepdim=True)
    return (attention * attention.log()).sum(dim=-1)


@given(seed=seeds, n_instances=bag_sizes, top_k=st.none() | st.integers(2, 310))
@LAWS
def test_aem_penalty__moderate_scores__is_the_formula(seed, n_instances, top_k):
    scores = _scores(seed, n_instances)
    kept = scores.sort(dim=-1, descending=True).values[..., :top_k]

    assert torch.allclose(_penalty(scores, top_k=top_k), naive_negative_entropy(kept), atol=1e-12)


@given(seed=seeds, n_instances=bag_sizes, scale=scales, top_k=st.none() | st.integers(2, 310))
@LAWS
def test_aem_penalty__any_finite_scores__lies_between_uniform_and_zero(
    seed, n_instances, scale, top_k
):
    scores = _scores(seed, n_instances, scale, torch.float32).requires_grad_()

    penalty = _penalty(scores, top_k=top_k)
    penalty.sum().backward()

    n_counted = min(n_instances, top_k or n_instances)
    assert (penalty >= -math.log(n_counted) - 1e-5).all()
    assert (penalty <= 0).all()
    assert scores.grad.isfinite().all()
    uniform = torch.full_like(scores, scale).requires_grad_()
    lowest = _penalty(uniform, top_k=top_k)
    lowest.sum().backward()
    assert torch.allclose(lowest, torch.full_like(lowest, -math.log(n_counted)), atol=1e-5)
    assert torch.allclose(uniform.grad, torch.zeros_like(uniform), atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 3])
@given(seed=seeds, n_instances=bag_sizes, n_padding=st.integers(0, 50))
@LAWS
def test_aem_penalty__padding_order_and_offset__change_nothing(seed, n_instances, n_padding, top_k):
    scores = _scores(seed, n_instances)
    generator = torch.Generator().manual_seed(seed)
    padding = torch.randn(2, 3, n_padding, generator=generator).double() * 100
    order = torch.randperm(n_instances + n_padding, generator=generator)
    mask = torch.arange(n_instances + n_padding)[order] < n_instances
    mixed = torch.cat([scores, padding], dim=-1)[..., order] + 7

    expected = _penalty(scores, top_k=top_k)

    masked = _penalty(mixed, mask.expand(2, -1), top_k=top_k)
    assert torch.allclose(masked, expected, atol=1e-12)
    at_minus_infinity = mixed.masked_fill(~mask, -torch.inf)
    assert torch.allclose(_penalty(at_minus_infinity, top_k=top_k), expected, atol=1e-12)


@given(seed=seeds, n_instances=bag_sizes)
@LAWS
def test_aem_penalty__gradient__is_the_closed_form(seed, n_instances):
    scores = _scores(seed, n_instances, 3.0).requires_grad_()

    _penalty(scores).sum().backward()

    attention = torch.softmax(scores.detach(), dim=-1)
    entropy = -(attention * attention.log()).sum(dim=-1, keepdim=True)
    assert torch.allclose(scores.grad, attention * (attention.log() + entropy), atol=1e-12)


@pytest.mark.parametrize("top_k", [None, 3])
def test_aem_penalty__gradcheck__passes_with_padding(top_k):
    mask = torch.tensor([[True, True, False, True, True], [True, True, False, False, False]])
    scores = _scores(0, 5).requires_grad_()

    assert torch.autograd.gradcheck(lambda z: _penalty(z, mask, top_k=top_k), scores)


def test_aem_penalty__top_k__leaves_the_lower_scores_without_gradient():
    scores = torch.tensor([[[0.5, 3.0, -1.0, 2.0, 1.0]]], requires_grad=True)

    _penalty(scores, top_k=2).sum().backward()

    assert (scores.grad != 0).tolist() == [[[False, True, False, True, False]]]


class Weights(Callback):
    """Keeps what is logged about AEM in each epoch."""

    def __init__(self) -> None:
        self.logged = []

    def on_train_epoch_end(self, trainer, pl_module):
        names = ("aem/entropy", "aem/weight")
        self.logged.append([trainer.callback_metrics[name].item() for name in names])


def _hand_written_fit(subject, module, batches, *, factor, weight, n_epochs, anchor_weight=None):
    """AEM, and the anchor too if it has a weight, as a plain loop in float64."""
    module = copy.deepcopy(module).double()
    block = subject.block_of(module)
    anchor = copy.deepcopy(block).eval()
    optimizer = module.configure_optimizers()
    logged = []
    for epoch in range(n_epochs):
        entropies, weights = [], []
        for index, batch in enumerate(batches):
            own = {**batch, "features": batch["features"].double()}
            scores = subject.scores(block, subject.hidden(module, own))
            masks = own.get("mask", torch.ones(scores[:, 0].shape, dtype=torch.bool))
            penalty = torch.stack(
                [naive_negative_entropy(z[:, m]) for z, m in zip(scores, masks, strict=True)]
            ).mean()
            progress = (epoch + index / len(batches)) / n_epochs
            entropies.append(-penalty.item())
            weights.append(weight * factor(progress))
            loss = module.loss(own) + weights[-1] * penalty
            if anchor_weight is not None:
                held = hand_written_penalty(subject, module, anchor, own, "nsf")
                loss = loss + anchor_weight * held
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mirrored, online in zip(anchor.parameters(), block.parameters(), strict=True):
                    mirrored.lerp_(online, 1 - 0.8)
        logged.append([sum(entropies) / len(batches), sum(weights) / len(batches)])
    return module, logged


@pytest.mark.parametrize("annealing", ANNEALINGS)
def test_aem_callback__fit__equals_the_method_written_by_hand(tmp_path, subject, annealing):
    module, batches = seeded_module(subject.module, dropout=0.0), subject.batches()
    reference, logged = _hand_written_fit(
        subject, module, batches, factor=ANNEALINGS[annealing], weight=0.7, n_epochs=3
    )
    watch = Weights()
    callback = AEMCallback(subject.site, weight=0.7, annealing=annealing)

    trainer = make_trainer(tmp_path, callback, watch, max_epochs=3, precision="64-true")
    trainer.fit(module, make_loader(batches))

    for name, tensor in reference.state_dict().items():
        assert torch.allclose(module.state_dict()[name].double(), tensor, atol=1e-10), name
    assert torch.allclose(torch.tensor(watch.logged), torch.tensor(logged), rtol=1e-5)
    assert_clean(module)


@pytest.mark.parametrize("order", [1, -1])
def test_aem_callback__beside_the_anchor__both_terms_add_up(tmp_path, subject, order):
    module, batches = seeded_module(subject.module, dropout=0.0), subject.batches()
    reference, _ = _hand_written_fit(
        subject,
        module,
        batches,
        factor=ANNEALINGS["cosine"],
        weight=0.3,
        n_epochs=2,
        anchor_weight=0.5,
    )
    aem = AEMCallback(subject.site, weight=0.3)
    anchor = AnchorCallback(subject.site, weight=0.5, decay=0.8)
    trainer = make_trainer(tmp_path, *[aem, anchor][::order], precision="64-true")

    trainer.fit(module, make_loader(batches))

    for name, tensor in reference.state_dict().items():
        assert torch.allclose(module.state_dict()[name].double(), tensor, atol=1e-10), name
    assert aem.state_key != anchor.state_key
    assert {
        "aem/entropy",
        "aem/weight",
        "anchor/kl",
        "anchor/loss",
    } <= trainer.callback_metrics.keys()
    assert_clean(module)


def test_aem_callback__weight__spreads_the_attention(tmp_path, subject):
    entropies = []
    for weight in (0.0, 1.0):
        trainer = make_trainer(
            tmp_path, AEMCallback(subject.site, weight=weight, annealing="none"), max_epochs=5
        )
        module = seeded_module(subject.module, dropout=0.0)
        trainer.fit(module, make_loader(subject.batches()))
        entropies.append(trainer.callback_metrics["aem/entropy"].item())

    assert entropies[1] > entropies[0] + 0.1


def test_aem_callback__schedule_object__anneals_by_it(tmp_path, subject):
    watch = Weights()
    callback = AEMCallback(subject.site, weight=0.4, annealing=Ramp(begin=0.25, end=0.75))

    trainer = make_trainer(tmp_path, callback, watch, max_epochs=4)
    trainer.fit(seeded_module(subject.module), make_loader(subject.batches(4)))

    weights = [weight for _, weight in watch.logged]
    assert weights == pytest.approx([0, 0.4 * 3 / 16, 0.4 * 11 / 16, 0.4])


class MultiheadModule(Recipe):
    """Pools with a learned query and PyTorch's multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.query = nn.Parameter(torch.ones(1, 1, 4))

    def loss(self, batch):
        features = batch["features"]
        query = self.query.expand(len(features), -1, -1)
        pooled, _ = self.attention(query, features, features, need_weights=False)
        return nn.functional.cross_entropy(pooled[:, 0, :2], batch["label"])


def test_aem_callback__multihead_site__counts_each_head_as_a_row(tmp_path, subject):
    class Keeping(AEMCallback):
        shapes = ()

        def penalty(self, attention):
            self.shapes = attention.scores.shape
            return super().penalty(attention)

    callback = Keeping(MultiheadSite("attention"), weight=0.5)
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(seeded_module(MultiheadModule), make_loader())

    assert callback.shapes == (2, 2, 5)
    assert 0 < trainer.callback_metrics["aem/entropy"] <= math.log(5)


def test_aem_callback__weight_0__equals_no_plugin_bit_for_bit(tmp_path, subject):
    bare, measured = seeded_module(subject.module), seeded_module(subject.module)
    loader = make_loader(subject.batches(), shuffle=True)

    make_trainer(tmp_path).fit(bare, loader)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    trainer = make_trainer(tmp_path, AEMCallback(subject.site, weight=0.0))
    trainer.fit(measured, loader)

    assert_equal_states(parameters_of(bare), parameters_of(measured))
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.callback_metrics["aem/entropy"] > 0
    assert trainer.callback_metrics["aem/weight"] == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_aem_callback__stop_and_resume__equals_the_uninterrupted_run_bit_for_bit(tmp_path, subject):
    class Stopping(Callback):
        """Ends the fit early; its length, which the annealing follows, stays the same."""

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    ends = []
    for name, extra, checkpoint in (
        ("whole", [], None),
        ("halves", [Stopping()], None),
        ("halves", [], tmp_path / "halves" / "last.ckpt"),
    ):
        module, folder = seeded_module(subject.module), tmp_path / name
        keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
        callback = AEMCallback(subject.site, weight=0.5)
        trainer = make_trainer(
            folder,
            callback,
            RandomState(),
            *extra,
            keeper,
            max_epochs=4,
            enable_checkpointing=True,
        )
        trainer.fit(module, make_loader(subject.batches(), shuffle=True), ckpt_path=checkpoint)
        metrics = {name: trainer.callback_metrics[name] for name in ("aem/weight", "aem/entropy")}
        ends.append(parameters_of(module) | metrics)

    assert_equal_states(ends[0], ends[2])
    assert ends[1]["aem/weight"] > ends[2]["aem/weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number of at least 0, but got -1.0"),
        ({"annealing": "sine"}, "annealing must be one of none, constant, .*, but got 'sine'"),
        ({"top_k": 1}, "top_k must be at least 2, but got 1"),
        ({"scope": "model"}, "but got 'model'"),
    ],
)
def test_aem_callback__argument_out_of_range__is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AEMCallback("net.attention", **arguments)


def test_aem_callback__nan_scores__name_the_bags(tmp_path, subject):
    batches = subject.batches()
    batches[0]["features"][1] = torch.nan

    with pytest.raises(ValueError, match=r"In the batch of bags .*must be finite, but bags"):
        make_trainer(tmp_path, AEMCallback(subject.site)).fit(
            seeded_module(subject.module, dropout=0.0), make_loader(batches)
        )
