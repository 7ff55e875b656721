"""ASMIL against a naive model, token by token and head by head, and its token dropping."""

import math

import pytest
import torch

from baselines.asmil import ASMIL
from mil_anchor import AnchorCallback
from mil_anchor.targets import SigmoidTarget
from tests.callbacks.tiny import Recipe, make_loader, make_trainer

BLOCKS = pytest.mark.parametrize("token_blocks", ["shared", "per_token"])


def build(*, seed=0, n_tokens=3, n_heads=2, **options):
    torch.manual_seed(seed)
    return ASMIL(5, 2, hidden=8, n_tokens=n_tokens, n_heads=n_heads, **options).double()


def bags_of(*shape, seed=0):
    return torch.randn(*shape, 5, generator=torch.Generator().manual_seed(seed)).double()


def softmax(values):
    exponentials = [value.exp() for value in values]
    return [exponential / sum(exponentials) for exponential in exponentials]


def naive_norm(norm, x):
    deviation = ((x - x.mean()).square().mean() + 1e-5).sqrt()
    return (x - x.mean()) / deviation * norm.weight + norm.bias


def naive_attention(query, keys, values):
    """What one head of width d gives for one query, and its scores."""
    scores = [query @ key / math.sqrt(len(query)) for key in keys]
    weights = softmax(scores)
    return sum(a * value for a, value in zip(weights, values, strict=True)), scores


def naive_heads(query, keys, values, n_heads):
    d = len(query) // n_heads
    heads, rows = [], []
    for h in range(n_heads):
        part = slice(h * d, (h + 1) * d)
        head, scores = naive_attention(
            query[part], [k[part] for k in keys], [v[part] for v in values]
        )
        heads.append(head)
        rows.append(torch.stack(scores))
    return torch.cat(heads), rows


def naive_asmil(model, features, n_heads, dropped=()):
    """Logits and scores of one bag, (instance, width), with these FEAT tokens dropped."""
    linear, scorer, readout = model.projection[0], model.attention, model.readout
    instances = [(linear.weight @ x + linear.bias).clamp(min=0) for x in features]
    kept, rows = [], []
    for t, token in enumerate(scorer.tokens):
        # Shared maps are the only ones.
        query, key, value, output = (
            maps[min(t, len(maps) - 1)]
            for maps in (scorer.query, scorer.key, readout.value, readout.output)
        )
        keys, values = [key @ h for h in instances], [value @ h for h in instances]
        pooled, own_rows = naive_heads(query @ token, keys, values, n_heads)
        rows += own_rows
        if t not in dropped:
            kept.append(naive_norm(readout.norm, output @ pooled))
    attention = model.class_attention
    sequence = [model.class_token[0, 0], *kept]
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    queries, keys, values = (
        [weight @ x + bias for x in sequence] for weight, bias in zip(weights, biases, strict=True)
    )
    attended, _ = naive_heads(queries[0], keys, values, n_heads)
    projected = attention.out_proj.weight @ attended + attention.out_proj.bias
    return model.head(naive_norm(model.norm, sequence[0] + projected)), torch.stack(rows)


def dropped_in(model, features):
    """Which FEAT tokens each bag loses in one forward pass, and its output."""
    seen = []
    handle = model.class_attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["key_padding_mask"]), with_kwargs=True
    )
    output = model(features)
    handle.remove()
    assert seen[0] is None or not seen[0][:, 0].any()  # the class token
    return (None if seen[0] is None else seen[0][:, 1:]), output


@BLOCKS
@pytest.mark.parametrize("n_heads", [1, 2])
def test_asmil__evaluation__agrees_with_the_naive_model(token_blocks, n_heads):
    model = build(n_heads=n_heads, token_blocks=token_blocks).eval()
    features = bags_of(2, 6)

    output = model(features)

    for bag in range(2):
        logits, scores = naive_asmil(model, features[bag], n_heads)
        torch.testing.assert_close(output.logits[bag], logits)
        torch.testing.assert_close(output.scores[bag], scores)
        weights = list(model.parameters())
        actual, expected = (
            torch.autograd.grad(
                total, weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for total in (
                output.logits[bag].square().sum() + output.scores[bag].square().sum(),
                logits.square().sum() + scores.square().sum(),
            )
        )
        torch.testing.assert_close(actual, expected)


@BLOCKS
@pytest.mark.parametrize("drop", ["bernoulli", "count"])
def test_asmil__training__is_the_naive_model_without_the_dropped_tokens(token_blocks, drop):
    model, features = build(token_blocks=token_blocks, drop=drop), bags_of(4, 6)

    dropped, output = dropped_in(model, features)

    assert dropped.any()
    for bag in range(4):
        tokens = dropped[bag].nonzero().flatten().tolist()
        logits, scores = naive_asmil(model, features[bag], 2, tokens)
        torch.testing.assert_close(output.logits[bag], logits)
        torch.testing.assert_close(output.scores[bag], scores)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.9])
def test_bernoulli_drop__many_bags__drops_at_the_rate_and_keeps_one(rate):
    n_bags, n_tokens = 20_000, 4
    torch.manual_seed(0)
    model = ASMIL(5, 2, hidden=2, n_tokens=n_tokens, n_heads=1, drop_rate=rate)

    dropped, _ = dropped_in(model, torch.zeros(n_bags, 1, 5))

    assert (~dropped).any(dim=1).all()
    # Where all would go, with probability B^T, one drawn evenly stays.
    expected = rate - rate**n_tokens / n_tokens
    frequencies = dropped.float().mean(dim=0)
    torch.testing.assert_close(frequencies, torch.full((4,), expected), atol=0.015, rtol=0)
    together = (dropped[:, 0] & dropped[:, 1]).float().mean()
    both = rate**2 - rate**n_tokens * 2 / n_tokens
    assert together.item() == pytest.approx(both, abs=0.015)
    n_all_but_one = (dropped.sum(dim=1) == n_tokens - 1).float().mean().item()
    assert n_all_but_one == pytest.approx(
        n_tokens * (1 - rate) * rate ** (n_tokens - 1) + rate**n_tokens, abs=0.015
    )


@pytest.mark.parametrize(
    ("n_tokens", "rate", "n_dropped"), [(8, 0.5, 4), (8, 0.99, 7), (8, 0.0, 0), (1, 0.9, 0)]
)
def test_count_drop__every_bag__loses_the_same_number(n_tokens, rate, n_dropped):
    model = build(n_tokens=n_tokens, drop_rate=rate, drop="count")

    dropped, _ = dropped_in(model, bags_of(200, 1))

    assert (dropped.sum(dim=1) == n_dropped).all()
    if n_dropped == 4:
        assert dropped.unique(dim=0).shape[0] > 50
        assert (dropped.float().mean(dim=0) - 0.5).abs().max() < 0.12


@pytest.mark.parametrize("drop", ["bernoulli", "count"])
def test_drop__evaluation__does_not_take_place(drop):
    dropped, _ = dropped_in(build(drop=drop).eval(), bags_of(2, 3))

    assert dropped is None


@BLOCKS
def test_asmil__parameters__grow_with_the_tokens_only_if_each_has_its_own_maps(token_blocks):
    sizes = [
        sum(p.numel() for p in build(n_tokens=n, token_blocks=token_blocks).parameters())
        for n in (3, 4)
    ]

    per_token = 4 * 8 * 8 if token_blocks == "per_token" else 0
    assert sizes[1] - sizes[0] == 8 + per_token


def test_asmil__scores__tell_the_tokens_and_heads_apart_from_the_start():
    scores = build(n_heads=4).eval()(bags_of(1, 30)).scores[0]

    correlation = torch.corrcoef(scores) - torch.eye(12).double()
    assert correlation.max() < 0.99


def test_asmil__huge_features__give_finite_logits_scores_and_gradients():
    model = build().float()
    output = model(1e4 * bags_of(1, 6).float())

    output.logits.sum().backward()

    assert output.logits.isfinite().all()
    assert output.scores.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("n_instances", [1, 7, 50])
def test_released_divergence__mean_over_tiles__has_exactly_one_nth_of_the_gradient(n_instances):
    model, features = build(token_blocks="per_token", drop="count").eval(), bags_of(1, n_instances)
    log_online = model(features).scores.log_softmax(dim=-1)
    # A frozen second initialisation, its scores normalised by a sigmoid of temperature 0.5.
    raw = build(seed=1, token_blocks="per_token").eval()(features).scores.detach()
    target = torch.sigmoid(raw / 0.5) / torch.sigmoid(raw / 0.5).sum(dim=-1, keepdim=True)
    weights = list(model.attention.parameters())

    released, published = (
        torch.autograd.grad(loss, weights, retain_graph=True)
        for loss in (
            -(target * log_online).mean(),
            (target * (target.log() - log_online)).sum(dim=-1).mean(),
        )
    )

    for of_mean, of_sum in zip(released, published, strict=True):
        torch.testing.assert_close(n_instances * of_mean, of_sum, rtol=1e-10, atol=1e-14)
    if n_instances > 1:
        assert max(of_sum.abs().max() for of_sum in published) > 1e-6


class Released(AnchorCallback):
    """The anchor of the released code, and the gradient that it gives to the first scores."""

    def __init__(self, reduction):
        super().__init__(
            target=SigmoidTarget(temperature=0.5),
            start="random",
            update="never",
            reduction=reduction,
            weight=1.0,
            scope="encoder",
        )
        self.gradients = []

    def penalty(self, attention):
        penalty = super().penalty(attention)
        (gradient,) = torch.autograd.grad(penalty.mean(), attention.scores, retain_graph=True)
        self.gradients.append(gradient)
        return penalty


class ASMILModule(Recipe):
    def __init__(self):
        super().__init__()
        self.model = build(token_blocks="per_token", drop="count")

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(
            self.model(batch["features"]).logits, batch["label"]
        )


def test_released_anchor__mean_over_tiles__has_exactly_one_nth_of_the_gradient(tmp_path):
    n_instances, gradients = 37, {}
    batches = [{"features": bags_of(1, n_instances), "label": torch.tensor([1])}]
    for reduction in ("mean", "sum"):
        callback = Released(reduction)
        trainer = make_trainer(tmp_path, callback, max_steps=1, precision="64-true")
        trainer.fit(ASMILModule(), train_dataloaders=make_loader(batches))
        gradients[reduction] = callback.gradients[0]

    torch.testing.assert_close(
        n_instances * gradients["mean"], gradients["sum"], rtol=1e-12, atol=1e-16
    )
    assert gradients["sum"].abs().max() > 1e-5


@BLOCKS
def test_asmil__reset_parameters__draws_every_parameter_anew(token_blocks):
    model = build(token_blocks=token_blocks)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = (model, model.attention, model.readout)
    own = [p for part in parts for p in part.parameters(recurse=False)]
    for parameter in own:
        torch.nn.init.constant_(parameter, torch.nan)

    for part in parts:
        part.reset_parameters()

    assert len(own) == 1 + 3 + 2
    assert all(parameter.isfinite().all() for parameter in own)
    drawn = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert drawn == {
        "class_token",
        "attention.tokens",
        "attention.query",
        "attention.key",
        "readout.value",
        "readout.output",
    }


def test_asmil__defaults__are_those_of_the_paper():
    model = ASMIL(1024, 2)

    assert model.attention.tokens.shape == (8, 512)
    assert model.attention.n_heads == model.class_attention.num_heads == 8
    assert model.attention.query.shape == (1, 512, 512)
    assert (model.drop_rate, model.drop) == (0.5, "bernoulli")


@pytest.mark.parametrize("drop_rate", [-0.1, 1.0])
def test_asmil__drop_rate_out_of_range__is_refused(drop_rate):
    with pytest.raises(ValueError, match=rf"drop_rate must lie in \[0, 1\), but got {drop_rate}"):
        ASMIL(5, 2, drop_rate=drop_rate)


@pytest.mark.parametrize(
    ("name", "choices"), [("drop", "bernoulli, count"), ("token_blocks", "shared, per_token")]
)
def test_asmil__unknown_choice__names_those_there_are(name, choices):
    with pytest.raises(ValueError, match=f"{name} must be one of {choices}, but got 'some'"):
        ASMIL(5, 2, **{name: "some"})


def test_asmil__heads_that_do_not_divide_the_width__are_refused():
    with pytest.raises(ValueError, match="hidden must be a multiple of n_heads=8, but got 20"):
        ASMIL(5, 2, hidden=20)


@BLOCKS
def test_asmil__maps_of_the_tokens__start_like_those_of_an_attention(token_blocks):
    torch.manual_seed(0)
    model = ASMIL(5, 2, hidden=64, token_blocks=token_blocks)
    scorer, readout = model.attention, model.readout

    for maps in (scorer.query, scorer.key, readout.value, readout.output):
        # Xavier: variance 2 / (64 + 64), uniform.
        assert maps.var().item() == pytest.approx(1 / 64, rel=0.1)
        assert maps.abs().max() <= math.sqrt(3 / 64)
