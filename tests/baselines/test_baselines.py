"""Laws that every baseline obeys."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.abmil import ABMIL
from baselines.asmil import ASMIL
from baselines.clam import CLAMMB, CLAMSB
from baselines.dsmil import DSMIL
from baselines.transmil import TransMIL

WIDTH, N_CLASSES = 6, 3
LAWS = settings(derandomize=True, deadline=None, max_examples=12)


def _clam(model, dropout, **options):
    return model(
        WIDTH, N_CLASSES, hidden=8, attention_width=4, dropout=dropout, k_sample=3, **options
    )


def _asmil(drop_rate, **options):
    return ASMIL(WIDTH, N_CLASSES, hidden=8, n_tokens=4, n_heads=2, drop_rate=drop_rate, **options)


BUILDERS = {
    "abmil": lambda p: ABMIL(WIDTH, N_CLASSES, hidden=8, attention_width=4, n_rows=2, dropout=p),
    "abmil_tanh": lambda p: ABMIL(WIDTH, N_CLASSES, hidden=8, gated=False, dropout=p),
    "clam_sb": lambda p: _clam(CLAMSB, p),
    "clam_mb": lambda p: _clam(CLAMMB, p, subtyping=True),
    "transmil": lambda p: TransMIL(WIDTH, N_CLASSES, hidden=16, n_heads=4, dropout=p),
    "dsmil": lambda p: DSMIL(WIDTH, N_CLASSES, attention_width=4),
    "asmil": _asmil,
    "asmil_released": lambda p: _asmil(p, drop="count", token_blocks="per_token"),
}
BLOCKS = {"transmil": "layers.1.attention.query_key"}
ROWS_FIRST = {"transmil", "dsmil"}
WITH_AUXILIARY_LOSS = {"clam_sb", "clam_mb", "dsmil"}
every_model = pytest.mark.parametrize("name", BUILDERS)


def build(name, *, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return BUILDERS[name](dropout).double()


def features_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def training_loss(output, label):
    loss = F.cross_entropy(output.logits, label) * output.bag_loss_weight
    return loss if output.auxiliary_loss is None else loss + output.auxiliary_loss


def gradient(model, loss):
    gradients = torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([of_parameter.flatten() for of_parameter in gradients])


@every_model
@pytest.mark.parametrize("training", [True, False])
@given(sizes=st.lists(st.integers(1, 11), min_size=1, max_size=3), seed=st.integers(0, 999))
@LAWS
def test_baseline__padded_batch__gives_each_bag_its_own_result(name, training, sizes, seed):
    model = build(name, seed=seed).train(training)
    label = torch.arange(len(sizes)) % N_CLASSES
    n_slots = max(sizes) + 2
    # Padding lies anywhere, and holds numbers that would be noticed.
    features = 100 * features_of(len(sizes), n_slots, WIDTH, seed=seed)
    mask = torch.zeros(len(sizes), n_slots, dtype=torch.bool)
    bags = []
    for i, size in enumerate(sizes):
        place = torch.randperm(n_slots, generator=torch.Generator().manual_seed(seed + i))[:size]
        mask[i, place] = True
        features[i, mask[i]] = features_of(size, WIDTH, seed=seed + i)
        bags.append(features[i : i + 1, mask[i]])

    output = model(features, mask, label)
    alone = [model(bag, label=label[i : i + 1]) for i, bag in enumerate(bags)]

    torch.testing.assert_close(output.logits, torch.cat([bag.logits for bag in alone]))
    for i, bag in enumerate(alone):
        torch.testing.assert_close(output.scores[i, :, mask[i]], bag.scores[0])
    assert (output.scores[(~mask)[:, None].expand_as(output.scores)] == -torch.inf).all()
    if name in WITH_AUXILIARY_LOSS:
        own_losses = torch.stack([bag.auxiliary_loss for bag in alone])
        torch.testing.assert_close(output.auxiliary_loss, own_losses.mean())
    own_total = torch.stack([training_loss(bag, label[i : i + 1]) for i, bag in enumerate(alone)])
    torch.testing.assert_close(
        gradient(model, training_loss(output, label)), gradient(model, own_total.mean())
    )


@every_model
def test_baseline__batch__gives_the_result_of_each_bag_alone(name):
    model = build(name).eval()
    features = features_of(3, 9, WIDTH) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1)

    output = model(features)

    for i in range(3):
        alone = model(features[i : i + 1])
        torch.testing.assert_close(output.logits[i : i + 1], alone.logits)
        torch.testing.assert_close(output.scores[i : i + 1], alone.scores)


# TransMIL lays the instances out on a square, in their order.
@pytest.mark.parametrize("name", BUILDERS.keys() - {"transmil"})
@given(n_instances=st.integers(1, 40), seed=st.integers(0, 999))
@LAWS
def test_baseline__instances_in_another_order__only_reorder_the_scores(name, n_instances, seed):
    model = build(name)
    features, label = features_of(2, n_instances, WIDTH, seed=seed), torch.tensor([0, 2])
    order = torch.randperm(n_instances, generator=torch.Generator().manual_seed(seed))

    output, reordered = model(features, label=label), model(features[:, order], label=label)

    torch.testing.assert_close(reordered.logits, output.logits)
    torch.testing.assert_close(reordered.scores, output.scores[..., order])
    torch.testing.assert_close(reordered.auxiliary_loss, output.auxiliary_loss)


@every_model
def test_baseline__bag_of_one_instance__gives_finite_results(name):
    output = build(name)(features_of(1, 1, WIDTH), label=torch.tensor([1]))

    assert output.logits.isfinite().all()
    assert output.scores.shape[-1] == 1
    assert training_loss(output, torch.tensor([1])).isfinite()


@every_model
def test_baseline__evaluation__is_repeatable_and_draws_no_random_numbers(name):
    model = build(name, dropout=0.5).eval()
    features, label = features_of(2, 7, WIDTH), torch.tensor([0, 2])
    state = torch.get_rng_state()

    first, second = model(features, label=label), model(features, label=label)

    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.scores, second.scores)


@every_model
def test_baseline__training_twice_from_one_seed__gives_the_same_loss_and_gradient(name):
    features, label = features_of(2, 7, WIDTH), torch.tensor([0, 2])

    def step():
        model = build(name, dropout=0.5)
        return gradient(model, training_loss(model(features, label=label), label))

    assert torch.equal(step(), step())


@pytest.mark.parametrize("name", BUILDERS.keys() - {"dsmil"})
def test_baseline__training_with_dropout__drops(name):
    model, features = build(name, dropout=0.5), features_of(2, 7, WIDTH)

    assert not torch.equal(model(features).logits, model(features).logits)


@every_model
def test_baseline__training_step__reaches_every_parameter(name):
    model = build(name)
    label = torch.arange(N_CLASSES)
    features = features_of(N_CLASSES, 20, WIDTH)

    training_loss(model(features, label=label), label).backward()

    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        # A softmax does not see a constant added to all scores.
        if path != "attention.score.bias":
            assert parameter.grad.abs().max() > 1e-9, path


@every_model
def test_baseline__label__decides_whether_there_is_an_auxiliary_loss(name):
    model, features = build(name), features_of(2, 7, WIDTH)

    assert model(features).auxiliary_loss is None
    labelled = model(features, label=torch.tensor([0, 2]))
    assert (labelled.auxiliary_loss is not None) == (name in WITH_AUXILIARY_LOSS)
    assert (labelled.bag_loss_weight < 1) == (name in WITH_AUXILIARY_LOSS)


@every_model
def test_attention_block__rerun_on_its_recorded_input__gives_the_scores(name):
    model = build(name, dropout=0.5).eval()
    block = model.get_submodule(BLOCKS.get(name, "attention"))
    mirror = copy.deepcopy(block)
    calls = []
    handle = block.register_forward_hook(lambda _, args, output: calls.append((args, output)))

    scores = model(features_of(1, 7, WIDTH)).scores
    handle.remove()

    ((args, recorded),) = calls
    if isinstance(recorded, tuple):
        recorded, pooled = recorded
        assert torch.equal(pooled, args[0])
        mirrored, _ = mirror(*args)
    else:
        mirrored = mirror(*args)
    assert torch.equal(mirrored, recorded)
    in_rows = recorded if name in ROWS_FIRST else recorded.mT
    assert torch.equal(in_rows, scores)


@every_model
def test_attention_block__all_its_parameters_zero__makes_every_score_zero(name):
    model = build(name).eval()
    features = features_of(1, 7, WIDTH)
    before = model(features).scores
    block = model.get_submodule(BLOCKS.get(name, "attention"))

    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()

    assert before.abs().max() > 0
    assert (model(features).scores == 0).all()


@every_model
def test_baseline__deepcopy__computes_the_same_with_its_own_parameters(name):
    model, features = build(name).eval(), features_of(2, 7, WIDTH)
    expected = model(features)

    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert torch.equal(duplicate(features).logits, expected.logits)
    assert torch.equal(duplicate(features).scores, expected.scores)


@every_model
def test_baseline__bag_that_is_all_padding__names_it(name):
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2] = False

    with pytest.raises(ValueError, match=r"needs a real instance, but bags \[2\] are all padding"):
        build(name)(features_of(3, 4, WIDTH), mask)


@every_model
def test_baseline__bags_without_instances__names_them(name):
    with pytest.raises(ValueError, match=r"bags \[0, 1\] are all padding"):
        build(name)(features_of(2, 0, WIDTH))


@every_model
def test_baseline__features_of_another_width__names_both_widths(name):
    message = f"{type(build(name)).__name__} expects features of width {WIDTH}, but got 10"
    with pytest.raises(ValueError, match=message):
        build(name)(features_of(1, 4, 10))


@pytest.mark.parametrize("model", [ABMIL, CLAMSB, CLAMMB, TransMIL])
@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_baseline__dropout_out_of_range__is_refused(model, dropout):
    with pytest.raises(ValueError, match=rf"dropout must lie in \[0, 1\), but got {dropout}"):
        model(WIDTH, N_CLASSES, dropout=dropout)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (ABMIL, "hidden"),
        (ABMIL, "attention_width"),
        (ABMIL, "n_rows"),
        (CLAMSB, "hidden"),
        (CLAMSB, "k_sample"),
        (CLAMMB, "attention_width"),
        (TransMIL, "hidden"),
        (TransMIL, "n_heads"),
        (DSMIL, "attention_width"),
        (ASMIL, "hidden"),
        (ASMIL, "n_tokens"),
        (ASMIL, "n_heads"),
    ],
)
def test_baseline__count_of_zero__is_refused(model, count):
    with pytest.raises(ValueError, match=f"{count} must be at least 1, but got 0"):
        model(WIDTH, N_CLASSES, **{count: 0})


@pytest.mark.parametrize("model", [ABMIL, CLAMSB, CLAMMB, TransMIL, DSMIL, ASMIL])
def test_baseline__no_features_or_no_classes__is_refused(model):
    with pytest.raises(ValueError, match="in_features must be at least 1, but got 0"):
        model(0, N_CLASSES)
    with pytest.raises(ValueError, match="n_classes must be at least 1, but got 0"):
        model(WIDTH, 0)
