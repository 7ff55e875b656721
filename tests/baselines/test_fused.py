"""The fused passes against the plain layers that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import baselines.fused
import baselines.scorer
from baselines.abmil import ABMIL
from baselines.clam import CLAMMB, CLAMSB
from baselines.fused import can_fuse, kept_entries, nearest_keep
from baselines.scorer import GatedScorer, Projection

LAWS = settings(derandomize=True, deadline=None, max_examples=25)
MODELS = {
    "abmil": lambda **more: ABMIL(6, 3, hidden=8, attention_width=4, n_rows=2, **more),
    "clam_sb": lambda **more: CLAMSB(6, 3, hidden=8, attention_width=4, dropout=0.0, **more),
    "clam_mb": lambda **more: CLAMMB(
        6, 3, hidden=8, attention_width=4, dropout=0.0, subtyping=True, **more
    ),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(baselines.fused, "_CHUNK", 4)
    monkeypatch.setattr(baselines.scorer, "FEWEST_TO_FUSE", {False: 0, True: 0})


def run_plain(function):
    """What the layers themselves give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines.scorer, "can_fuse", lambda *_: False)
        return function()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def scorer_of(n_rows=1, *, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return GatedScorer(5, 3, n_rows, dropout=dropout).double()


def projection_of(dropout):
    return Projection(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(dropout))


def gradients(outputs, inputs, *, seed=0):
    """Of a random combination of the outputs."""
    seeds = [draw(*output.shape, seed=seed + i) for i, output in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, seeds)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@given(
    n_bags=st.integers(1, 3),
    n_instances=st.integers(1, 11),
    n_rows=st.integers(1, 3),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 999),
)
@LAWS
def test_gated_scorer__any_instances__gives_scores_and_gradients_of_its_layers(
    n_bags, n_instances, n_rows, scale, seed
):
    scorer = scorer_of(n_rows, seed=seed)
    instances = (scale * draw(n_bags, n_instances, 5, seed=seed)).requires_grad_()
    inputs = [instances, *scorer.parameters()]

    fused, plain = scorer(instances), run_plain(lambda: scorer(instances))

    assert type(fused[0].grad_fn) is not type(plain[0].grad_fn)
    assert_same(fused, plain)
    assert_same(gradients(fused, inputs), gradients(plain, inputs))


@pytest.mark.parametrize("consumer", [lambda s, _: s, lambda _, h: h.square(), lambda s, h: s + h])
def test_gated_scorer__one_of_its_results_unused__has_the_gradient_of_the_other(consumer):
    scorer, instances = scorer_of(), draw(2, 7, 5).requires_grad_()
    inputs = [instances, *scorer.parameters()]

    found, expected = (
        torch.autograd.grad(consumer(*result).sum(), inputs, materialize_grads=True)
        for result in (scorer(instances), run_plain(lambda: scorer(instances)))
    )

    assert_same(found, expected)


def test_gated_scorer__gradient_that_others_hold__is_not_overwritten():
    scorer, instances = scorer_of(), draw(1, 7, 5).requires_grad_()

    def gradient():
        scores, handed_on = scorer(instances)
        # The sum gives the same tensor to both of its terms.
        total = scores.square().sum() + ((instances + handed_on) * 3).square().sum()
        return torch.autograd.grad(total, instances)

    assert_same(gradient(), run_plain(gradient))


KEEPERS = [lambda g: g, lambda g: g.detach(), lambda g: g.numpy(), lambda g: g[0]]


@pytest.mark.parametrize("keep", KEEPERS)
def test_gated_scorer__gradient_that_a_hook_keeps__is_not_overwritten(keep):
    scorer, instances, kept = scorer_of(), draw(1, 7, 5).requires_grad_(), []
    weights = draw(1, 1, 7)
    scores, handed_on = scorer(instances)
    handed_on.register_hook(lambda gradient: kept.append(keep(gradient)))

    (scores.sum() + torch.bmm(weights, handed_on).sum()).backward()

    expected = weights.transpose(1, 2).expand(1, 7, 5)
    assert_same(torch.as_tensor(kept[0]).view(-1, 7, 5), expected)


def test_gated_scorer__backward_hook__keeps_the_gradients_that_it_was_shown():
    def shown():
        scorer, seen = scorer_of(), []
        scorer.register_full_backward_hook(lambda _, inner, outer: seen.extend([*inner, *outer]))
        scores, handed_on = scorer(draw(1, 7, 5).requires_grad_())
        (scores.softmax(dim=1) * handed_on).sum(dim=1).square().sum().backward()
        return seen

    assert_same(shown(), run_plain(shown))


def test_gated_scorer__scores_changed_in_place__have_the_gradient_of_the_change():
    scorer, instances = scorer_of(), draw(1, 7, 5).requires_grad_()
    weights = list(scorer.parameters())

    scores, _ = scorer(instances)
    doubled = torch.autograd.grad(scores.mul_(2).sum(), weights)

    plain = torch.autograd.grad(2 * scorer(instances)[0].sum(), weights)
    assert_same(doubled, plain)


def test_gated_scorer__gradient_of_nobody_else__is_added_to_in_place():
    scorer, instances = scorer_of(), draw(1, 7, 5).requires_grad_()
    scores, handed_on = scorer(instances)
    places = []
    weights = draw(1, 1, 7)
    handed_on.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    pooled = torch.bmm(weights, handed_on)

    (gradient,) = torch.autograd.grad([scores.sum(), pooled.sum()], instances)

    assert gradient.data_ptr() == places[0]


def test_gated_scorer__frozen_instances__hands_them_on_without_a_gradient():
    scorer, instances = scorer_of(), draw(1, 7, 5)

    scores, handed_on = scorer(instances)

    assert handed_on is instances
    found = gradients([scores], list(scorer.parameters()))
    plain = run_plain(lambda: gradients([scorer(instances)[0]], list(scorer.parameters())))
    assert_same(found, plain)


def test_gated_scorer__without_gradients__gives_the_same_scores():
    scorer, instances = scorer_of(2), draw(2, 7, 5)
    with torch.no_grad():
        scores, handed_on = scorer(instances)

    assert handed_on is instances
    assert torch.equal(scores, scorer(instances)[0])


def test_gated_scorer__dropout__is_that_of_both_factors():
    scorer, instances = scorer_of(2, dropout=0.25), draw(1, 9, 5).requires_grad_()
    inputs = [instances, *scorer.parameters()]
    torch.manual_seed(1)
    fused = scorer(instances)
    torch.manual_seed(1)
    kept = kept_entries((9, 3), 0.75**2)

    product = scorer.eval().value(instances) * scorer.gate(instances) * kept / 0.75**2
    plain = scorer.score(product), instances

    assert 0 < kept.sum() < kept.numel()
    assert_same(fused, plain)
    assert_same(gradients(fused, inputs), gradients(plain, inputs))


@given(n_instances=st.integers(1, 11), seed=st.integers(0, 999))
@LAWS
def test_projection__any_instances__gives_values_and_gradients_of_its_layers(n_instances, seed):
    torch.manual_seed(seed)
    projection = projection_of(0.0).double()
    features = draw(2, n_instances, 6, seed=seed).requires_grad_()
    inputs = [features, *projection.parameters()]

    fused, plain = projection(features), run_plain(lambda: projection(features))

    assert_same(fused, plain)
    assert_same(gradients([fused], inputs), gradients([plain], inputs))


def test_projection__dropout__drops_after_the_relu():
    torch.manual_seed(0)
    projection, features = projection_of(0.25).double(), draw(1, 4, 6).requires_grad_()
    inputs = [features, *projection.parameters()]
    torch.manual_seed(1)
    fused = projection(features)
    torch.manual_seed(1)
    plain = projection.eval()(features) * kept_entries((4, 5), 0.75) / 0.75

    assert_same(fused, plain)
    assert_same(gradients([fused], inputs), gradients([plain], inputs))


def test_projection__gradient_that_others_hold__is_not_overwritten():
    torch.manual_seed(0)
    projection, features = projection_of(0.0).double(), draw(1, 4, 6)
    kept = torch.ones(1, 4, 5).double()

    projection(features).backward(kept)

    assert (kept == 1).all()


@pytest.mark.parametrize("keep", KEEPERS)
def test_projection__gradient_that_a_hook_keeps__is_not_overwritten(keep):
    torch.manual_seed(0)
    projection, kept = projection_of(0.0).double(), []
    hidden, weights = projection(draw(1, 4, 6)), draw(1, 1, 4)
    hidden.register_hook(lambda gradient: kept.append(keep(gradient)))

    torch.bmm(weights, hidden).sum().backward()

    assert (hidden == 0).any()
    expected = weights.transpose(1, 2).expand(1, 4, 5)
    assert_same(torch.as_tensor(kept[0]).view(-1, 4, 5), expected)


@pytest.mark.parametrize("normalization", ["softmax", "nsf", "mixture"])
@pytest.mark.parametrize("name", MODELS)
def test_model__padded_batch__gives_what_its_layers_give(name, normalization):
    torch.manual_seed(0)
    model = MODELS[name](normalization=normalization).double()
    features, label = draw(2, 21, 6).requires_grad_(), torch.tensor([0, 2])
    mask = torch.arange(21) < torch.tensor([[21], [6]])

    def step():
        output = model(features, mask, label)
        loss = torch.nn.functional.cross_entropy(output.logits, label)
        loss = loss if output.auxiliary_loss is None else loss + output.auxiliary_loss
        # The plug-ins pull at the scores themselves.
        loss = loss + output.scores.masked_fill(~mask[:, None], 0).square().sum()
        inputs = [features, *model.parameters()]
        return loss, torch.autograd.grad(loss, inputs, materialize_grads=True)

    loss, found = step()
    plain_loss, expected = run_plain(step)

    torch.testing.assert_close(loss, plain_loss, rtol=1e-12, atol=0)
    assert_same(found, expected)


@pytest.mark.parametrize("keep", [0.75, 0.5625, 0.9, 0.999, 1e-9, 1 - 1e-9])
def test_kept_entries__many_draws__are_kept_by_their_probability(keep):
    torch.manual_seed(0)
    kept = kept_entries((1000, 999), keep)

    probability = nearest_keep(keep)
    assert kept.shape == (1000, 999)
    assert abs(probability - keep) <= 2**-16
    spread = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - probability) < 4 * spread
    assert 0 < probability < 1


def test_kept_entries__neighbours_of_one_draw__are_independent():
    torch.manual_seed(0)
    kept = kept_entries((100_000, 4), 0.5).double()

    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max() < 0.015


def test_nearest_keep__multiple_of_a_draw__is_exact():
    assert nearest_keep(0.75) == 0.75
    assert nearest_keep(0.75**2) == 0.75**2


def test_projection__without_its_dropout__is_a_projection_of_the_same_layers():
    projection, features = projection_of(0.0).double(), draw(1, 4, 6)
    torch.testing.assert_close(projection[:2](features), projection(features))


def test_can_fuse__plain_layers_on_the_cpu__may():
    assert can_fuse(draw(1, 4, 5))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_scorer__few_instances__run_through_the_layers(monkeypatch, dropout):
    scorer, instances = scorer_of(dropout=dropout), draw(2, 7, 5).requires_grad_()
    fused = type(scorer(instances)[0].grad_fn)

    fewest = {False: 0, True: 0, dropout > 0: 14}
    monkeypatch.setattr(baselines.scorer, "FEWEST_TO_FUSE", fewest)
    assert type(scorer(instances)[0].grad_fn) is fused
    assert type(scorer(instances[:, :6])[0].grad_fn) is not fused


def test_gated_scorer__watched_layer__must_run_itself():
    scorer, seen = scorer_of(), []
    scorer.value[1].register_forward_hook(lambda *_: seen.append(True))

    scorer(draw(1, 4, 5))

    assert seen


def test_gated_scorer__parametrized_layer__must_run_itself():
    scorer, instances = scorer_of(), draw(1, 4, 5)
    torch.nn.utils.parametrizations.weight_norm(scorer.gate[0])

    scores, _ = scorer(instances)

    plain = run_plain(lambda: scorer(instances)[0])
    assert type(scores.grad_fn) is type(plain.grad_fn)
    assert_same(scores, plain)
    scores.sum().backward()
    assert scorer.gate[0].parametrizations.weight.original0.grad is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda scorer: scorer.value.__setitem__(1, nn.ReLU()),
        lambda scorer: scorer.gate.append(nn.Tanh()),
        lambda scorer: scorer.gate.__setitem__(2, nn.Identity()),
        lambda scorer: scorer.value.__setitem__(0, nn.Linear(5, 3, bias=False).double()),
        lambda scorer: setattr(scorer, "value", nn.Linear(5, 3).double()),
        lambda scorer: setattr(scorer, "score", nn.Linear(3, 1, bias=False).double()),
    ],
)
def test_gated_scorer__layer_in_place_of_another__is_run(change):
    scorer, instances = scorer_of(), draw(1, 4, 5)
    change(scorer)

    assert_same(scorer(instances), run_plain(lambda: scorer(instances)))


def test_projection__one_layer_more__is_run():
    projection, features = projection_of(0.0).double().append(nn.Tanh()), draw(1, 4, 6)

    assert_same(projection(features), run_plain(lambda: projection(features)))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_can_fuse__tracing__may_not():
    found = []

    def traced(instances):
        found.append(can_fuse(instances))
        return 2 * instances

    torch.jit.trace(traced, draw(1, 4, 5), check_trace=False)

    assert found == [False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_can_fuse__low_precision__may_not(dtype):
    assert not can_fuse(draw(1, 4, 5).to(dtype))
    assert not can_fuse(draw(1, 4, 5).to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_fuse(draw(1, 4, 5))


def test_can_fuse__vmap__runs_the_layers():
    scorer, instances = scorer_of(), draw(3, 2, 4, 5)

    mapped, _ = torch.vmap(scorer)(instances)

    assert_same(mapped, torch.stack([scorer(bags)[0] for bags in instances]))


def test_gated_scorer__that_may_not_fuse__asks_for_no_size(monkeypatch):
    # torch.compile would make a graph for either side of it, and torch.export refuses.
    monkeypatch.setattr(baselines.scorer, "FEWEST_TO_FUSE", {})

    scores, _ = run_plain(lambda: scorer_of()(draw(1, 4, 5)))

    assert scores.shape == (1, 4, 1)


@pytest.mark.parametrize(
    "result",
    [
        lambda features: scorer_of()(features)[0],
        lambda features: Projection(nn.Linear(5, 3), nn.ReLU(), nn.Dropout()).double()(features),
    ],
    ids=["gated_scorer", "projection"],
)
def test_fused_pass__differentiated_twice__says_that_it_cannot(result):
    instances = draw(1, 4, 5)

    # torch's decorator lets this pass, and every second derivative is zero.
    with pytest.raises(RuntimeError, match=r"differentiated once only, but create_graph=True"):
        torch.autograd.functional.hessian(lambda x: result(x).square().sum(), instances)


def test_gated_scorer__penalty_on_its_gradient_by_torch_func__is_that_of_the_layers():
    scorer, instances = scorer_of(), draw(1, 4, 5)

    def penalty(instances):
        slope = torch.func.grad(lambda x: scorer(x)[0].square().sum())(instances)
        return slope.square().sum()

    found = torch.func.grad(penalty)(instances)

    copy = instances.clone().requires_grad_()
    plain = run_plain(lambda: scorer(copy)[0].square().sum())
    (slope,) = torch.autograd.grad(plain, copy, create_graph=True)
    assert_same(found, torch.autograd.grad(slope.square().sum(), copy)[0])
