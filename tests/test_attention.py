import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mil_anchor.attention import (
    js_divergence,
    kl_divergence,
    log_normalized_sigmoid,
    log_softmax,
    normalized_entropy,
    normalized_sigmoid,
    softmax,
    top_mass,
    valid_scores,
)

LAWS = settings(derandomize=True, deadline=None, max_examples=60)
NORMALISERS = [log_softmax, log_normalized_sigmoid]
bag_sizes = st.integers(1, 300)
scales = st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0, 1e4])
seeds = st.integers(0, 2**31)


def _scores(seed: int, n_instances: int, scale: float, *, n_bags: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_bags, 3, n_instances, generator=generator) * scale


def _prefix_mask(seed: int, n_bags: int, n_instances: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, n_instances + 1, (n_bags,), generator=generator)
    return torch.arange(n_instances) < lengths[:, None]


def naive_nsf(scores: Tensor) -> Tensor:
    """Equation 5 as it is written."""
    weights = 1 / (1 + torch.exp(-scores))
    return weights / weights.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("normalise", NORMALISERS)
@given(seed=seeds, n_instances=bag_sizes, scale=scales)
@LAWS
def test_attention__any_finite_scores__is_a_distribution_that_is_zero_on_padding(
    normalise, seed, n_instances, scale
):
    scores = _scores(seed, n_instances, scale).clamp(-1e4, 1e4)
    mask = _prefix_mask(seed, 2, n_instances)

    log_attention = normalise(scores, mask)
    attention = log_attention.exp()

    assert torch.allclose(attention.sum(dim=-1), torch.ones(2, 3), atol=1e-5)
    assert (attention.masked_select(~mask[:, None]) == 0).all()
    assert log_attention.masked_select(mask[:, None]).isfinite().all()


@pytest.mark.parametrize("normalise", NORMALISERS)
@given(seed=seeds, n_instances=bag_sizes, scale=scales)
@LAWS
def test_attention__padding_and_instance_order__change_nothing(normalise, seed, n_instances, scale):
    scores = _scores(seed, n_instances, scale)
    order = torch.randperm(n_instances, generator=torch.Generator().manual_seed(seed))
    padded = torch.cat([scores, torch.full((2, 3, 7), 5.0)], dim=-1)
    mask = torch.arange(n_instances + 7).expand(2, -1) < n_instances

    alone = normalise(scores)

    assert torch.equal(normalise(padded, mask)[..., :n_instances], alone)
    assert torch.allclose(normalise(scores[..., order]), alone[..., order], rtol=1e-5, atol=1e-5)


@given(seed=seeds, n_instances=bag_sizes)
@LAWS
def test_normalized_sigmoid__moderate_scores__equals_equation_5(seed, n_instances):
    scores = _scores(seed, n_instances, 5.0).double()

    assert torch.allclose(normalized_sigmoid(scores), naive_nsf(scores), rtol=1e-12, atol=0)
    assert torch.allclose(
        log_normalized_sigmoid(scores),
        torch.log_softmax(torch.nn.functional.logsigmoid(scores), dim=-1),
    )


@given(tau=st.floats(0.1, 12), n_high=st.integers(1, 30), n_low=st.integers(1, 300), seed=seeds)
@LAWS
def test_normalized_sigmoid__high_and_low_scores__keeps_the_bounds_of_theorem_1(
    tau, n_high, n_low, seed
):
    generator = torch.Generator().manual_seed(seed)
    excess = torch.rand(n_high + n_low, generator=generator, dtype=torch.float64) * 20
    high, low = tau + excess[:n_high], -tau - excess[n_high:]

    attention = normalized_sigmoid(torch.cat([high, low])[None])[0]
    highs, lows = attention[:n_high], attention[n_high:]

    assert highs.max() / highs.min() <= (1 + math.exp(-tau)) * (1 + 1e-12)
    assert lows.max() <= math.exp(-tau) / n_high * (1 + 1e-12)


@given(seed=seeds, n_instances=bag_sizes, scale=st.sampled_from([0.1, 1.0, 10.0]))
@LAWS
def test_kl__gradient__is_softmax_minus_target_and_zero_to_the_anchor(seed, n_instances, scale):
    online = _scores(seed, n_instances, scale).double().requires_grad_()
    anchor = _scores(seed + 1, n_instances, scale).double().requires_grad_()

    kl = kl_divergence(log_normalized_sigmoid(anchor).detach(), log_softmax(online))
    kl.sum().backward()

    expected = torch.softmax(online.detach(), dim=-1) - naive_nsf(anchor.detach())
    assert torch.allclose(online.grad, expected, atol=1e-12)
    assert anchor.grad is None


def _plain_kl(log_target: Tensor, log_online: Tensor) -> Tensor:
    """Equation 7 term by term, over the instances that have a target."""
    terms = [
        [t.exp() * (t - o) for t, o in zip(*rows, strict=True) if t > -torch.inf]
        for rows in zip(log_target, log_online, strict=True)
    ]
    return torch.stack([torch.stack(row).sum() for row in terms])


@given(seed=seeds, n_instances=st.integers(1, 12), scale=st.sampled_from([0.1, 1.0, 10.0]))
@LAWS
def test_kl__float64__equals_the_plain_sum_with_its_gradients_to_both(seed, n_instances, scale):
    mask = _prefix_mask(seed, 2, n_instances)
    scores = [
        _scores(seed + shift, n_instances, scale)[:, 0].double().requires_grad_()
        for shift in (0, 1)
    ]
    logs = log_normalized_sigmoid(scores[0], mask), log_softmax(scores[1], mask)

    fast, plain = kl_divergence(*logs), _plain_kl(*logs)

    assert torch.allclose(fast, plain, rtol=1e-12, atol=1e-14)
    of_fast, of_plain = (
        torch.autograd.grad(kl.sum(), scores, retain_graph=True) for kl in (fast, plain)
    )
    for one, other in zip(of_fast, of_plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-13)


def test_valid_scores__rows_of_the_largest_numbers__are_finite():
    scores = torch.full((2, 3, 4), torch.finfo(torch.float32).max)

    assert torch.equal(valid_scores(scores), scores)
    assert torch.equal(valid_scores(-scores), -scores)


def test_kl__target_that_underflows_to_zero__adds_nothing_there():
    target = log_softmax(torch.tensor([[0.0, -200.0]]))
    online = log_softmax(torch.tensor([[0.0, -torch.inf]]))

    assert kl_divergence(target, online).tolist() == [0.0]


def test_kl__masked_bag__has_zero_gradient_on_padding():
    scores = torch.randn(1, 1, 5, requires_grad=True)
    mask = torch.tensor([[True, True, True, False, False]])

    target = log_normalized_sigmoid(torch.randn(1, 1, 5), mask)
    kl_divergence(target, log_softmax(scores, mask)).sum().backward()

    assert (scores.grad[..., 3:] == 0).all()
    assert (scores.grad[..., :3] != 0).any()


@pytest.mark.parametrize("normalise", NORMALISERS)
def test_divergences__float64__pass_gradcheck(normalise):
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    target = log_normalized_sigmoid(torch.randn(2, 2, 5, dtype=torch.float64), mask)
    scores = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)

    def divergences(values: Tensor) -> tuple[Tensor, ...]:
        log_attention = normalise(values, mask)
        return (
            kl_divergence(target, log_attention),
            js_divergence(target, log_attention),
            normalized_entropy(log_attention),
        )

    assert torch.autograd.gradcheck(divergences, scores)


@given(seed=seeds, copies=st.integers(2, 40))
@LAWS
def test_kl__same_shape_of_distribution_with_more_instances__is_the_same(seed, copies):
    online, anchor = _scores(seed, 9, 2.0).double(), _scores(seed + 1, 9, 2.0).double()

    def kl(z_online: Tensor, z_anchor: Tensor) -> Tensor:
        return kl_divergence(log_normalized_sigmoid(z_anchor), log_softmax(z_online))

    repeated = kl(online.repeat(1, 1, copies), anchor.repeat(1, 1, copies))
    assert torch.allclose(repeated, kl(online, anchor), rtol=1e-10)


@given(seed=seeds, n_instances=st.integers(2, 200))
@LAWS
def test_divergences__against_their_definitions__agree(seed, n_instances):
    p = torch.softmax(_scores(seed, n_instances, 2.0).double(), dim=-1)
    q = torch.softmax(_scores(seed + 1, n_instances, 2.0).double(), dim=-1)
    middle = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(dim=-1)

    assert torch.allclose(kl_divergence(p.log(), q.log()), kl(p, q), atol=1e-12)
    jsd = js_divergence(p.log(), q.log())
    assert torch.allclose(jsd, (kl(p, middle) + kl(q, middle)) / 2, atol=1e-12)
    assert (jsd <= math.log(2) + 1e-12).all()
    entropy = -(p * p.log()).sum(dim=-1) / math.log(n_instances)
    assert torch.allclose(normalized_entropy(p.log()), entropy, atol=1e-12)


def test_js__disjoint_distributions__is_ln_2():
    p = torch.tensor([[1.0, 0.0]]).log()
    q = torch.tensor([[0.0, 1.0]]).log()

    assert js_divergence(p, q).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalise", NORMALISERS)
def test_attention__half_precision_under_autocast__is_computed_in_float32(normalise, dtype):
    scores = (torch.randn(1, 1, 5000) * 5).to(dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_attention = normalise(scores)
        kl = kl_divergence(log_attention, log_softmax(scores))

    assert log_attention.dtype == kl.dtype == torch.float32
    assert torch.allclose(log_attention, normalise(scores.float()))


@pytest.mark.parametrize("extreme", [1e4, -1e4, 88.0, -104.0])
def test_kl__extreme_scores__is_finite_with_finite_gradient(extreme):
    online = torch.tensor([[[extreme, 0.0, -extreme]]], requires_grad=True)

    kl = kl_divergence(log_normalized_sigmoid(-online.detach()), log_softmax(online))
    kl.sum().backward()

    assert kl.isfinite().all()
    assert online.grad.isfinite().all()


def test_attention__scores_that_the_model_masked_with_minus_infinity__count_as_padding():
    masked = torch.tensor([[[1.0, 2.0, -torch.inf]]])

    assert torch.equal(softmax(masked)[..., :2], softmax(masked[..., :2]))
    assert normalized_entropy(log_softmax(masked)) == normalized_entropy(
        log_softmax(masked[..., :2])
    )


def test_valid_scores__masked_half_precision__are_float32_and_minus_infinity_on_padding():
    scores = torch.tensor([[1.5, torch.nan, -2.0]], dtype=torch.bfloat16)

    valid = valid_scores(scores, torch.tensor([[True, False, True]]))

    assert valid.dtype == torch.float32
    assert valid.tolist() == [[1.5, -torch.inf, -2.0]]


def test_entropy__uniform_peaked_and_single__is_one_zero_one():
    assert normalized_entropy(log_softmax(torch.zeros(1, 7))).item() == pytest.approx(1)
    assert normalized_entropy(log_softmax(torch.tensor([[1e4, 0, 0]]))).item() == 0
    assert normalized_entropy(log_softmax(torch.tensor([[3.0]]))).item() == 1


def test_top_mass__count_and_share__sum_the_highest_of_the_real_instances():
    attention = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]])

    assert torch.allclose(top_mass(attention.log(), count=2), torch.tensor([0.8, 0.7]))
    assert torch.allclose(top_mass(attention.log(), count=10), torch.ones(2))
    # Half of three real instances is rounded up to two; half of four is two.
    assert torch.allclose(top_mass(attention.log(), share=0.5), torch.tensor([0.8, 0.7]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either count or share"),
        ({"count": 1, "share": 0.1}, "either count or share"),
        ({"count": 0}, "at least 1, but got 0"),
        ({"share": 1.5}, r"\(0, 1\], but got 1.5"),
    ],
)
def test_top_mass__wrong_arguments__are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_mass(torch.zeros(1, 3), **arguments)


@pytest.mark.parametrize("normalise", NORMALISERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_attention__bad_score__names_the_bag(normalise, bad):
    scores = torch.zeros(3, 2, 4)
    scores[1, 0, 2] = bad

    with pytest.raises(ValueError, match=r"must be finite, but bags \[1\]"):
        normalise(scores)


@pytest.mark.parametrize("normalise", NORMALISERS)
def test_attention__bag_of_padding__names_the_bag(normalise):
    mask = torch.tensor([[True, True], [False, False]])

    with pytest.raises(ValueError, match=r"bags \[1\] of these scores are all padding"):
        normalise(torch.zeros(2, 1, 2), mask)


def test_attention__bad_score_on_padding__does_not_matter():
    scores = torch.tensor([[[1.0, torch.nan]]])

    assert softmax(scores, torch.tensor([[True, False]])).tolist() == [[[1.0, 0.0]]]


def test_attention__mask_of_another_shape__is_refused():
    with pytest.raises(ValueError, match=r"scores are \(2, 1, 4\) and the mask is \(2, 3\)"):
        softmax(torch.zeros(2, 1, 4), torch.ones(2, 3, dtype=torch.bool))


def test_log_softmax__bag_without_instances__is_refused():
    with pytest.raises(ValueError, match=r"Every bag needs a real instance.*\(2, 1, 0\)"):
        log_softmax(torch.zeros(2, 1, 0))
