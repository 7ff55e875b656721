"""Temporal ensembling: each bag's penalty against its own past, and what is kept of that."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from mil_anchor import AnchorCallback, AttentionSite, RandomState
from mil_anchor.callbacks.aem import AEMCallback
from mil_anchor.callbacks.temporal import TemporalEnsembleCallback
from mil_anchor.sites.base import RecordedAttention
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

ROOT = Path(__file__).parents[2]
BLOCK = "net.attention"
LAWS = settings(derandomize=True, deadline=None, max_examples=30)
bag_sizes = st.integers(1, 300)
scales = st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e4])
seeds = st.integers(0, 2**31)


def _scores(seed, n_instances, scale=1.0, n_bags=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_bags, 2, n_instances, generator=generator).double() * scale


def _visit(callback, scores, mask=None, ids=None):
    """The penalty of one step with these bags."""
    callback.start_step({"bag_id": ids or [f"bag{index}" for index in range(len(scores))]})
    return callback.penalty(RecordedAttention(scores, mask, ()))


def _ensemble(callback, bag_id="bag0"):
    """A bag's ensemble as numbers that sum to one."""
    squared = callback.state_dict()["ensembles"][bag_id].double() ** 2
    return squared / squared.sum(dim=-1, keepdim=True)


def naive_kl(target, online):
    return (target * (target / online).log()).sum(dim=-1)


def rounded(ensemble):
    """What is left of an ensemble after it was kept."""
    kept = np.sqrt(ensemble.numpy()).astype(np.float16).astype(np.float64) ** 2
    return torch.from_numpy(kept / kept.sum(axis=-1, keepdims=True))


def _hand_written_fit(subject, module, batches, *, weight, decay, n_epochs):
    """Temporal ensembling as a plain loop in float64.

    A batch may be a tuple with one batch for each process.
    """
    module = copy.deepcopy(module).double()
    optimizer = module.configure_optimizers()
    ensembles, penalties = {}, []
    for _ in range(n_epochs):
        penalties = []
        for batch in batches:
            of_ranks = batch if isinstance(batch, tuple) else (batch,)
            for single in of_ranks:
                own = {**single, "features": single["features"].double()}
                scores = subject.scores(subject.block_of(module), subject.hidden(module, own))
                masks = own.get("mask", torch.ones(scores[:, 0].shape, dtype=torch.bool))
                of_bags = []
                for bag_id, z, real in zip(own["bag_id"], scores, masks, strict=True):
                    online = torch.softmax(z[:, real], dim=-1)
                    past = ensembles.get(bag_id, online.detach())
                    is_new = bag_id not in ensembles
                    of_bags.append(online.sum(dim=-1) * 0 if is_new else naive_kl(past, online))
                    ensembles[bag_id] = rounded(decay * past + (1 - decay) * online.detach())
                penalties.append(torch.stack(of_bags).mean())
                loss = module.loss(own) + weight * penalties[-1]
                (loss / len(of_ranks)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return module, ensembles, torch.stack(penalties).mean().item()


def _assert_ensembles(state, expected):
    assert state.keys() == expected.keys()
    for bag_id, ensemble in expected.items():
        assert torch.allclose(state[bag_id].double() ** 2, ensemble, rtol=2e-3, atol=1e-9), bag_id


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_temporal_callback__fit__equals_the_method_written_by_hand(tmp_path, subject, decay):
    module, batches = seeded_module(subject.module, dropout=0.0), subject.batches()
    reference, ensembles, kl = _hand_written_fit(
        subject, module, batches, weight=0.7, decay=decay, n_epochs=3
    )
    callback = TemporalEnsembleCallback(subject.site, weight=0.7, decay=decay)
    trainer = make_trainer(tmp_path, callback, max_epochs=3, precision="64-true")

    trainer.fit(module, make_loader(batches))

    for name, tensor in reference.state_dict().items():
        assert torch.allclose(module.state_dict()[name].double(), tensor, atol=1e-9), name
    _assert_ensembles(callback.state_dict()["ensembles"], ensembles)
    assert trainer.callback_metrics["temporal/kl"].item() == pytest.approx(kl, rel=1e-6)
    assert trainer.callback_metrics["temporal/loss"].item() == pytest.approx(0.7 * kl, rel=1e-6)
    assert_clean(module)


def test_temporal_penalty__first_visit__is_zero_without_gradient_and_starts_the_ensemble():
    callback = TemporalEnsembleCallback(BLOCK, weight=1.0, decay=0.5)
    scores = _scores(0, 7).requires_grad_()

    penalty = _visit(callback, scores)

    assert torch.equal(penalty, torch.zeros(1, 2, dtype=torch.float64))
    assert not penalty.requires_grad
    assert not callback.state_dict()["ensembles"]["bag0"].requires_grad
    assert torch.allclose(_ensemble(callback), torch.softmax(scores[0], dim=-1), rtol=2e-3)


@given(seed=seeds, n_instances=bag_sizes, decay=st.sampled_from([0.0, 0.5, 0.9]))
@LAWS
def test_temporal_penalty__several_visits__are_the_closed_form(seed, n_instances, decay):
    callback = TemporalEnsembleCallback(BLOCK, weight=1.0, decay=decay)
    visits = [_scores(seed + step, n_instances) for step in range(4)]
    a, b, c, d = (torch.softmax(scores[0], dim=-1) for scores in visits)
    past = decay**2 * a + (1 - decay) * (decay * b + c)

    for scores in visits[:3]:
        _visit(callback, scores)
    assert torch.allclose(_ensemble(callback), past, rtol=4e-3)
    online = visits[3].requires_grad_()
    penalty = _visit(callback, online)
    penalty.sum().backward()

    assert torch.allclose(penalty[0], naive_kl(past, d), atol=1e-3)
    assert torch.allclose(online.grad[0], d - past, atol=2e-3)


@given(seed=seeds, n_instances=bag_sizes, scale=scales)
@LAWS
def test_temporal_penalty__same_attention_again__costs_nothing(seed, n_instances, scale):
    callback = TemporalEnsembleCallback(BLOCK, weight=1.0, decay=0.9)
    scores = _scores(seed, n_instances, scale).float()

    _visit(callback, scores)
    penalty = _visit(callback, scores)

    # Only what float16 has rounded, which enters in its square.
    assert torch.allclose(penalty, torch.zeros(1, 2), atol=1e-6)


@given(seed=seeds, scale=st.sampled_from([0.0, 1.0, 3.0]))
@settings(LAWS, max_examples=10)
def test_temporal_ensemble__kept_in_float16__has_a_harmless_rounding_error(seed, scale):
    callback = TemporalEnsembleCallback(BLOCK, weight=1.0, decay=0.9)
    scores = _scores(seed, 100_000, scale)

    _visit(callback, scores)

    attention = torch.softmax(scores[0], dim=-1)
    error = (_ensemble(callback) - attention).abs()
    large = attention > 4e-9
    assert (error[large] <= 1.1e-3 * attention[large]).all()
    assert (error.sum(dim=-1) < 1e-3).all()


@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_temporal_ensemble__many_visits__comes_as_near_as_the_rounding_lets_it(decay):
    callback = TemporalEnsembleCallback(BLOCK, weight=1.0, decay=decay)

    scores = _scores(1, 200)
    _visit(callback, _scores(0, 200))
    for _ in range(int(10 / (1 - decay))):
        _visit(callback, scores)

    attention = torch.softmax(scores[0], dim=-1)
    error = (_ensemble(callback) - attention).abs() / attention
    assert error.max() <= 2e-3 / (1 - decay)


@given(seed=seeds, n_instances=bag_sizes, n_padding=st.integers(1, 50))
@LAWS
def test_temporal_penalty__padded_batch__equals_its_bags_alone(seed, n_instances, n_padding):
    alone, padded, one_by_one = (
        TemporalEnsembleCallback(BLOCK, weight=1.0, decay=0.7) for _ in range(3)
    )
    mask = torch.arange(n_instances + n_padding) < torch.tensor(
        [[n_instances + n_padding], [n_instances]]
    )
    for step in range(3):
        scores = _scores(seed + step, n_instances + n_padding, 3.0, n_bags=2)
        bags = scores[:1], scores[1:, :, :n_instances]
        expected = [_visit(alone, bag, ids=[name]) for bag, name in zip(bags, "ab", strict=True)]

        together = _visit(padded, scores, mask, ids=["a", "b"])
        one_by_one.start_step({"bag_id": ["a", "b"]})
        single = [one_by_one.penalty(RecordedAttention(bag, None, ())) for bag in bags]

        assert torch.equal(torch.cat(expected), torch.cat(single))
        assert torch.allclose(torch.cat(expected), together, atol=1e-6)
    assert alone.state_dict()["ensembles"].keys() == padded.state_dict()["ensembles"].keys()
    assert padded.state_dict()["ensembles"]["b"].shape == (2, n_instances)


@pytest.mark.parametrize("n_instances", [4, 6])
def test_temporal_penalty__resampled_bag__starts_anew(n_instances):
    callback = TemporalEnsembleCallback(BLOCK, weight=1.0, decay=0.9)
    _visit(callback, _scores(0, 5))

    penalty = _visit(callback, _scores(1, n_instances))

    assert torch.equal(penalty, torch.zeros_like(penalty))
    expected = torch.softmax(_scores(1, n_instances)[0], dim=-1)
    assert torch.allclose(_ensemble(callback), expected, rtol=2e-3)


def test_temporal_penalty__instances_masked_by_the_model__are_left_out_of_the_divergence():
    callback = TemporalEnsembleCallback(BLOCK, weight=1.0, decay=0.5)
    before, now = _scores(0, 6), _scores(1, 6)
    now[..., :2] = -torch.inf
    now.requires_grad_()

    _visit(callback, before)
    penalty = _visit(callback, now)
    penalty.sum().backward()

    past = torch.softmax(before[0, :, 2:], dim=-1)
    expected = naive_kl(past, torch.softmax(now.detach()[0, :, 2:], dim=-1))
    assert torch.allclose(penalty[0], expected, rtol=1e-2)
    assert now.grad.isfinite().all()


def test_temporal_penalty__nothing_left_of_what_the_ensemble_has_seen__starts_anew():
    callback = TemporalEnsembleCallback(BLOCK, weight=1.0, decay=0.5)
    certain = torch.tensor([[[1e4, 0.0, 0.0]]])
    _visit(callback, certain)

    penalty = _visit(callback, torch.tensor([[[-torch.inf, 0.0, 0.0]]]))

    assert penalty.tolist() == [[0.0]]
    assert _ensemble(callback).tolist() == [[0.0, 0.5, 0.5]]


def test_temporal_callback__memory__is_two_bytes_per_bag_row_and_instance(tmp_path, subject):
    batches = subject.batches()
    callback = TemporalEnsembleCallback(subject.site, weight=0.5, decay=0.9)
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(seeded_module(subject.module), make_loader(batches))

    n_rows = 2 if subject is SUBJECTS["tiny"] else 1
    shape = batches[0]["features"].shape[:2]
    n_instances = sum(int(batch.get("mask", torch.ones(shape)).sum()) for batch in batches)
    ensembles = callback.state_dict()["ensembles"].values()
    assert {ensemble.device.type for ensemble in ensembles} == {"cpu"}
    stored = sum(ensemble.untyped_storage().nbytes() for ensemble in ensembles)
    assert stored == 2 * n_rows * n_instances
    assert callback.memory_mb == pytest.approx(stored / 1e6)
    assert trainer.callback_metrics["temporal/memory_mb"].item() == pytest.approx(stored / 1e6)


def test_temporal_callback__weight_0__equals_no_plugin_bit_for_bit(tmp_path, subject):
    bare, measured = seeded_module(subject.module), seeded_module(subject.module)
    loader = make_loader(subject.batches(), shuffle=True)

    make_trainer(tmp_path).fit(bare, loader)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    trainer = make_trainer(tmp_path, TemporalEnsembleCallback(subject.site, weight=0.0, decay=0.9))
    trainer.fit(measured, loader)

    assert_equal_states(parameters_of(bare), parameters_of(measured))
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.callback_metrics["temporal/kl"] > 0


def test_temporal_callback__weight__holds_the_attention_to_its_past(tmp_path, subject):
    kls = []
    for weight in (0.0, 3.0):
        callback = TemporalEnsembleCallback(subject.site, weight=weight, decay=0.9)
        trainer = make_trainer(tmp_path, callback, max_epochs=5)
        module = seeded_module(subject.module, dropout=0.0)
        trainer.fit(module, make_loader(subject.batches()))
        kls.append(trainer.callback_metrics["temporal/kl"].item())

    assert kls[1] < 0.7 * kls[0]


def test_temporal_callback__beside_the_others__all_act_in_any_order(tmp_path, subject):
    trained = []
    for order in (1, -1):
        plugins = [
            TemporalEnsembleCallback(subject.site, weight=0.3, decay=0.9),
            AEMCallback(subject.site, weight=0.2),
            AnchorCallback(subject.site, weight=0.5, decay=0.9),
        ][::order]
        module = seeded_module(subject.module, dropout=0.0)
        trainer = make_trainer(tmp_path, *plugins, precision="64-true")
        trainer.fit(module, make_loader(subject.batches()))
        trained.append(parameters_of(module))
        assert len({plugin.state_key for plugin in plugins}) == 3

    for name, tensor in trained[0].items():
        assert torch.allclose(tensor, trained[1][name], atol=1e-9), name


def _fit(subject, folder, *, n_epochs=4, checkpoint=None):
    """What a run with dropout and a shuffled loader ends with."""
    module = seeded_module(subject.module)
    callback = TemporalEnsembleCallback(subject.site, weight=0.5, decay=0.9)
    keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    trainer = make_trainer(
        folder, callback, RandomState(), keeper, max_epochs=n_epochs, enable_checkpointing=True
    )
    trainer.fit(module, make_loader(subject.batches(), shuffle=True), ckpt_path=checkpoint)
    return parameters_of(module), callback.state_dict()["ensembles"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_temporal_callback__stop_and_resume__equals_the_uninterrupted_run_bit_for_bit(
    tmp_path, subject, caplog
):
    whole = _fit(subject, tmp_path / "whole")
    _fit(subject, tmp_path / "halves", n_epochs=2)
    with caplog.at_level("INFO"):
        resumed = _fit(subject, tmp_path / "halves", checkpoint=tmp_path / "halves" / "last.ckpt")

    assert_equal_states(whole[0], resumed[0])
    assert_equal_states(whole[1], resumed[1])
    assert "holds no ensembles" not in caplog.text
    saved = torch.load(tmp_path / "halves" / "last.ckpt", weights_only=True)
    assert not any("temporal" in name.lower() for name in saved["state_dict"])


def test_temporal_callback__checkpoint_without_it__says_that_every_bag_starts_anew(
    tmp_path, subject, caplog
):
    loader = make_loader(subject.batches())
    bare = make_trainer(tmp_path, max_epochs=1)
    bare.fit(seeded_module(subject.module), loader)
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    callback = TemporalEnsembleCallback(subject.site, weight=0.5, decay=0.9)

    with caplog.at_level("INFO"):
        make_trainer(tmp_path, callback).fit(
            seeded_module(subject.module), loader, ckpt_path=tmp_path / "bare.ckpt"
        )

    assert "holds no ensembles for TemporalEnsembleCallback" in caplog.text


def test_temporal_callback__second_fit__starts_without_the_ensembles_of_the_first(
    tmp_path, subject
):
    loader = make_loader(subject.batches())
    callback = TemporalEnsembleCallback(subject.site, weight=0.5, decay=0.9)
    first = make_trainer(tmp_path, callback)
    first.fit(seeded_module(subject.module), loader)
    first.save_checkpoint(tmp_path / "first.ckpt")
    first.validate(
        seeded_module(subject.module), loader, ckpt_path=tmp_path / "first.ckpt", verbose=False
    )

    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(seeded_module(subject.module), loader)

    assert trainer.callback_metrics["temporal/kl"] == 0


def test_temporal_callback__bags_of_two_processes__are_united_at_the_end_of_an_epoch(
    tmp_path, monkeypatch
):
    other = {
        "bag0_0": torch.full((2, 5), 0.25, dtype=torch.float16),
        "elsewhere": torch.full((2, 3), 0.5, dtype=torch.float16),
    }
    told = []

    def gather(own):
        told.append(own)
        return [own, other]

    monkeypatch.setattr("mil_anchor.callbacks.temporal.gather_objects", gather)
    callback = TemporalEnsembleCallback(BLOCK, weight=0.5, decay=0.9)
    make_trainer(tmp_path, callback, max_epochs=1).fit(seeded_module(), make_loader())

    # Only the bags that were visited in the epoch are sent; after it there is nothing to send.
    assert sorted(told[0]) == sorted(name for batch in make_batches() for name in batch["bag_id"])
    ensembles = callback.state_dict()["ensembles"]
    assert told[-1] == {}
    assert ensembles.keys() == told[0].keys() | {"elsewhere"}
    assert torch.equal(ensembles["bag0_0"], other["bag0_0"])
    assert torch.equal(ensembles["bag1_0"], told[0]["bag1_0"])


@pytest.mark.slow
def test_temporal_callback__two_processes_that_swap_their_bags__equal_the_method_written_by_hand(
    tmp_path,
):
    batches = make_batches()
    of_ranks = list(zip(batches[::2], batches[1::2], strict=True))
    subject = SUBJECTS["tiny"]
    reference, ensembles, kl = _hand_written_fit(
        subject, seeded_module(dropout=0.0), of_ranks, weight=0.7, decay=0.8, n_epochs=3
    )
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)

    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.ddp_temporal", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert_equal_states(one["module"], two["module"])
    assert_equal_states(one["ensembles"], two["ensembles"])
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(one["module"][name], tensor, atol=1e-9), name
    _assert_ensembles(one["ensembles"], ensembles)
    assert one["kl"] == two["kl"] == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number of at least 0, but got -1.0"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), but got 1.0"),
        ({"schedule": "sine"}, "but got 'sine'"),
        ({"scope": "model"}, "but got 'model'"),
    ],
)
def test_temporal_callback__argument_out_of_range__is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TemporalEnsembleCallback(BLOCK, **{"weight": 0.5, "decay": 0.9, **arguments})


def test_temporal_callback__batch_without_ids__says_what_to_add(tmp_path):
    batches = make_batches()
    del batches[0]["bag_id"]
    callback = TemporalEnsembleCallback(BLOCK, weight=0.5, decay=0.9)

    with pytest.raises(ValueError, match=r"has no 'bag_id'\. Add a list with one id per bag"):
        make_trainer(tmp_path, callback).fit(seeded_module(), make_loader(batches))


class Twice(TinyModule):
    """Pools every bag twice in a step."""

    def loss(self, batch):
        return super().loss(batch) + super().loss(batch)


class Halves(TinyMIL):
    """Gives attention to the first bag of a batch only."""

    def forward(self, features):
        return super().forward(features[:1]).expand(len(features), -1)


class HalvesModule(TinyModule):
    """Trains a model that leaves bags out."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.net = Halves()


@pytest.mark.parametrize(
    ("cls", "n_seen"), [(Twice, 4), (HalvesModule, 1)], ids=["twice", "first_only"]
)
def test_temporal_callback__not_one_attention_per_bag__is_refused(tmp_path, cls, n_seen):
    site = AttentionSite(BLOCK, layout="b n r")
    callback = TemporalEnsembleCallback(site, weight=0.5, decay=0.9)

    with pytest.raises(ValueError, match=f"gave {n_seen} .*for the 2 bag ids") as error:
        make_trainer(tmp_path, callback).fit(seeded_module(cls), make_loader())

    assert "['bag0_0', 'bag0_1']" in str(error.value)


def test_temporal_callback__block_that_runs_once_per_bag__is_seen_as_the_batch_is(tmp_path):
    class OneByOne(nn.Module):
        def __init__(self, inner) -> None:
            super().__init__()
            self.inner = inner
            self.attention = inner.attention

        def forward(self, features):
            return torch.cat([self.inner(bag[None]) for bag in features])

    ends = []
    for wrap in (lambda net: net, OneByOne):
        module = seeded_module(dropout=0.0)
        module.net = wrap(module.net)
        callback = TemporalEnsembleCallback(BLOCK, weight=0.5, decay=0.9)
        trainer = make_trainer(tmp_path, callback, precision="64-true")
        trainer.fit(module, make_loader())
        ends.append((trainer.callback_metrics["temporal/kl"].item(), callback.state_dict()))

    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    for name, ensemble in ends[0][1]["ensembles"].items():
        other = ends[1][1]["ensembles"][name]
        assert torch.allclose(ensemble.float(), other.float(), rtol=2e-3), name
