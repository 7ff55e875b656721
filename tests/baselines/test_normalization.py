"""Online normalised sigmoid and its mixture with the softmax, in the baselines that offer them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from baselines.abmil import ABMIL
from baselines.asmil import ASMIL
from baselines.clam import CLAMMB, CLAMSB
from baselines.dsmil import DSMIL
from baselines.normalization import MixtureScorer, SigmoidScorer, normalized_scorer
from mil_anchor import AnchorCallback
from mil_anchor.data.bags import Bag
from mil_anchor.data.datamodule import BagDataModule
from mil_anchor.module import MILModule
from tests.callbacks.tiny import make_trainer

LAWS = settings(derandomize=True, deadline=None, max_examples=25)
BUILDERS = {
    "abmil": lambda n: ABMIL(6, 2, hidden=8, attention_width=4, n_rows=2, normalization=n),
    "abmil_tanh": lambda n: ABMIL(6, 2, hidden=8, gated=False, normalization=n),
    "clam_sb": lambda n: CLAMSB(6, 2, hidden=8, attention_width=4, dropout=0.0, normalization=n),
    "clam_mb": lambda n: CLAMMB(6, 2, hidden=8, attention_width=4, dropout=0.0, normalization=n),
    "dsmil": lambda n: DSMIL(6, 2, attention_width=4, normalization=n),
    "asmil": lambda n: ASMIL(6, 2, hidden=8, n_tokens=2, n_heads=2, drop_rate=0.0, normalization=n),
}
every_model = pytest.mark.parametrize("name", BUILDERS)
both = pytest.mark.parametrize("normalization", ["nsf", "mixture"])
rows_first_or_last = pytest.mark.parametrize("rows_first", [True, False])


def build(name, normalization, *, seed=0):
    """A model of always the same weights, whatever its normalisation."""
    torch.manual_seed(seed)
    return BUILDERS[name](normalization).double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def mixture(scores, mask, *, share=0.0, rows_first=False):
    scorer = MixtureScorer(nn.Identity(), rows_first=rows_first).double()
    nn.init.constant_(scorer.share, share)
    return scorer(scores, mask)


def naive_mixture(scores, share):
    """Equation 34 for one row of real instances."""
    exponentials = [math.exp(z) for z in scores]
    sigmoids = [1 / (1 + math.exp(-z)) for z in scores]
    weight = 1 / (1 + math.exp(-share))
    return [
        weight * e / sum(exponentials) + (1 - weight) * s / sum(sigmoids)
        for e, s in zip(exponentials, sigmoids, strict=True)
    ]


@rows_first_or_last
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    share=st.floats(-6, 6),
    spread=st.floats(0, 9),
    seed=st.integers(0, 999),
)
@LAWS
def test_mixture__padded_bags__agrees_with_the_equation(rows_first, sizes, share, spread, seed):
    scores = spread * randn(len(sizes), 2, max(sizes) + 1, seed=seed)
    mask = torch.arange(max(sizes) + 1) < torch.tensor(sizes)[:, None]

    given_scores = scores if rows_first else scores.mT
    effective = mixture(given_scores, mask, share=share, rows_first=rows_first)

    effective = effective if rows_first else effective.mT
    assert (effective[(~mask)[:, None].expand_as(effective)] == -torch.inf).all()
    for bag, size in enumerate(sizes):
        for row in range(2):
            own = effective[bag, row, :size]
            expected = naive_mixture(scores[bag, row, :size].tolist(), share)
            torch.testing.assert_close(own.exp(), torch.tensor(expected).double())
            torch.testing.assert_close(own.softmax(dim=-1), own.exp())


@given(spread=st.floats(0, 9), seed=st.integers(0, 999))
@LAWS
def test_nsf__any_scores__has_their_normalized_sigmoid_as_its_softmax(spread, seed):
    scores = spread * randn(2, 3, 7, seed=seed)

    attention = SigmoidScorer(nn.Identity())(scores).softmax(dim=-1)

    sigmoids = 1 / (1 + (-scores).exp())
    torch.testing.assert_close(attention, sigmoids / sigmoids.sum(dim=-1, keepdim=True))


@both
def test_effective_scores__higher_raw_score__are_higher(normalization):
    raw = torch.linspace(-30, 30, 400).double().view(1, -1, 1)
    mask = torch.ones(1, 400, dtype=torch.bool)

    effective = SigmoidScorer(nn.Identity())(raw) if normalization == "nsf" else mixture(raw, mask)

    assert (effective.diff(dim=1) > 0).all()


def test_mixture__share_far_out__is_one_of_its_parts():
    scores, mask = 3 * randn(1, 6, 2), torch.ones(1, 6, dtype=torch.bool)
    nsf = scores.sigmoid() / scores.sigmoid().sum(dim=1, keepdim=True)

    torch.testing.assert_close(mixture(scores, mask, share=50.0).exp(), scores.softmax(dim=1))
    torch.testing.assert_close(mixture(scores, mask, share=-50.0).exp(), nsf)


def test_mixture__reset_parameters__goes_back_to_half_and_half():
    scorer = MixtureScorer(nn.Identity(), rows_first=False)
    nn.init.constant_(scorer.share, torch.nan)

    scorer.reset_parameters()

    assert scorer.share.item() == 0


@rows_first_or_last
def test_mixture__gradients__are_those_of_finite_differences(rows_first):
    scores = randn(2, 3, 4).requires_grad_()
    n_instances = 4 if rows_first else 3
    mask = torch.ones(2, n_instances, dtype=torch.bool)
    mask[1, 2:] = False
    scorer = MixtureScorer(nn.Identity(), rows_first=rows_first).double()

    def attention(scores, share):
        effective = torch.func.functional_call(scorer, {"share": share}, (scores, mask))
        return effective.softmax(dim=2 if rows_first else 1)

    share = torch.tensor(0.3).double().requires_grad_()
    assert torch.autograd.gradcheck(attention, (scores, share))


def test_nsf__gradients__are_those_of_finite_differences():
    scores = randn(2, 3, 4).requires_grad_()

    assert torch.autograd.gradcheck(
        lambda scores: SigmoidScorer(nn.Identity())(scores).softmax(dim=1), scores
    )


def test_mixture__its_share__gets_the_gradient_of_the_equation():
    scores, mask = randn(1, 5, 1), torch.ones(1, 5, dtype=torch.bool)
    values = randn(1, 5, 1, seed=1)
    scorer = MixtureScorer(nn.Identity(), rows_first=False).double()

    (scorer(scores, mask).exp() * values).sum().backward()

    nsf = scores.sigmoid() / scores.sigmoid().sum()
    # d lambda / d share = 1/4 where they are half and half.
    expected = ((scores.softmax(dim=1) - nsf) * values).sum() / 4
    torch.testing.assert_close(scorer.share.grad, expected)


@pytest.mark.parametrize("size", [80.0, 1e4, 1e30])
def test_mixture__extreme_scores_beside_padding__stay_finite_in_value_and_gradient(size):
    scores = torch.tensor([[[size], [-size], [0.0], [5.0]]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    scorer = MixtureScorer(nn.Identity(), rows_first=False)

    attention = scorer(scores, mask).softmax(dim=1)
    attention[0, 0].sum().backward()

    expected = torch.tensor([0.5 + 0.5 / 1.5, 0.0, 0.25 / 1.5, 0.0])
    torch.testing.assert_close(attention.detach()[0, :, 0], expected)
    assert scores.grad.isfinite().all()
    assert scorer.share.grad.isfinite()


@every_model
@both
def test_normalization__of_a_model__is_the_formula_on_its_plain_scores(name, normalization):
    features = 3 * randn(2, 7, 6)
    raw = build(name, "softmax").eval()(features).scores

    effective = build(name, normalization).eval()(features).scores

    if normalization == "nsf":
        expected = raw.sigmoid() / raw.sigmoid().sum(dim=-1, keepdim=True)
    else:
        rows = [naive_mixture(row.tolist(), 0.0) for row in raw.flatten(0, 1)]
        expected = torch.tensor(rows).double().view_as(raw)
    torch.testing.assert_close(effective.softmax(dim=-1), expected)


@every_model
@both
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 999))
@settings(LAWS, max_examples=8)
def test_normalization__padded_batch__gives_each_bag_its_own_result(
    name, normalization, sizes, seed
):
    model = build(name, normalization, seed=seed)
    features = 100 * randn(len(sizes), max(sizes) + 2, 6, seed=seed)
    mask = torch.arange(max(sizes) + 2) < torch.tensor(sizes)[:, None]
    features[mask] /= 100

    output = model(features, mask)

    for i, size in enumerate(sizes):
        alone = model(features[i : i + 1, :size])
        torch.testing.assert_close(output.logits[i], alone.logits[0])
        torch.testing.assert_close(output.scores[i, :, :size], alone.scores[0])
    assert (output.scores[(~mask)[:, None].expand_as(output.scores)] == -torch.inf).all()
    output.logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_mixture__of_a_model__has_one_share_that_starts_at_a_half_and_is_learned(name):
    model = build(name, "mixture")
    ((path, share),) = [(k, p) for k, p in model.named_parameters() if k.endswith("share")]

    # In training DSMIL's critical instance is one; a bag of several makes every row matter.
    model(3 * randn(2, 9, 6)).logits.square().sum().backward()

    assert path == "attention.share"
    assert share.sigmoid() == 0.5
    assert share.grad.abs() > 1e-9


@every_model
def test_softmax__of_a_model__leaves_the_scorer_as_it_is(name):
    plain, wrapped = build(name, "softmax"), build(name, "nsf")

    renamed = {
        key.replace("attention.scorer.", "attention."): value
        for key, value in wrapped.state_dict().items()
    }

    assert plain.state_dict().keys() == renamed.keys()
    assert not any(isinstance(m, SigmoidScorer | MixtureScorer) for m in plain.modules())


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
@both
def test_clam__instance_loss__ranks_alike_under_every_normalization(name, normalization):
    features, label = randn(2, 30, 6), torch.tensor([0, 1])

    plain = build(name, "softmax")(features, label=label).auxiliary_loss
    other = build(name, normalization)(features, label=label).auxiliary_loss

    torch.testing.assert_close(other, plain)


@pytest.mark.parametrize("batch_size", [1, 3])
@every_model
@both
def test_plugin__other_normalization__is_proven_and_starts_at_no_divergence(
    tmp_path, name, normalization, batch_size
):
    generator = torch.Generator().manual_seed(0)
    bags = [
        Bag(torch.randn(3 + 3 * i % 7, 6, generator=generator), label=i % 2, bag_id=f"bag{i}")
        for i in range(6)
    ]
    penalties = []

    class Looking(AnchorCallback):
        def penalty(self, attention):
            penalties.append(super().penalty(attention))
            return penalties[-1]

    torch.manual_seed(0)
    module = MILModule(BUILDERS[name](normalization), n_classes=2, lr=0.01)
    callback = Looking(target="softmax", weight=0.1, decay=0.5)
    trainer = make_trainer(tmp_path, callback, max_epochs=2, limit_val_batches=0)

    trainer.fit(module, datamodule=BagDataModule(bags, bags[:2], batch_size=batch_size))

    # Strict: that the fit has gone on is the proof. The anchor starts as a copy.
    assert len(penalties) == 2 * (6 // batch_size)
    assert penalties[0].abs().max() < 1e-6
    anchor, online = callback.state_dict()["anchor"], module.model.attention.state_dict()
    assert anchor.keys() == online.keys()
    assert ("share" in anchor) == (normalization == "mixture")
    assert any(not torch.equal(anchor[key], online[key]) for key in anchor)


@pytest.mark.parametrize("name", BUILDERS)
def test_normalization__unknown_name__names_those_there_are(name):
    message = "normalization must be one of softmax, nsf, mixture, but got 'sparsemax'"
    with pytest.raises(ValueError, match=message):
        BUILDERS[name]("sparsemax")


def test_normalized_scorer__softmax__is_the_scorer_itself():
    scorer = nn.Linear(3, 2)

    assert normalized_scorer(scorer, "softmax", rows_first=False) is scorer
