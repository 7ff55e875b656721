import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.attention import log_normalized_sigmoid, log_softmax
from mil_anchor.matching import attention_distance, bag_feature_distance

SETTINGS = settings(derandomize=True, deadline=None, max_examples=40)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 12))


def _draw(shape, seed=0):
    """Scores of the anchor and of the model, and features."""
    bags, rows, instances, width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    return (
        3 * normal(bags, rows, instances),
        3 * normal(bags, rows, instances),
        normal(bags, instances, width),
    )


def _other_attention_of_same_feature(log_attention, features):
    """Another attention of one bag whose bag feature is the same, from the null space of [H 1]."""
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    constraints = torch.cat([features, ones], dim=1).T
    null_space = torch.linalg.svd(constraints).Vh[torch.linalg.matrix_rank(constraints) :]
    attention = log_attention.exp()
    direction = null_space[0]
    # As far as all weights stay positive.
    longest = (attention / direction.abs()).amin()
    return (attention + 0.9 * longest * direction).log()


@SETTINGS
@given(SHAPES, st.integers(0, 5))
def test_attention_distance__mean__is_the_sum_over_n(shape, seed):
    target, online, _ = _draw(shape, seed)
    log_target, log_online = log_normalized_sigmoid(target), log_softmax(online)

    total = attention_distance(log_target, log_online)
    mean = attention_distance(log_target, log_online, reduction="mean")

    naive = (log_target.exp() * (log_target - log_online)).sum(dim=-1)
    assert torch.allclose(total, naive, atol=1e-12)
    assert torch.equal(mean, total / shape[2])


@pytest.mark.parametrize("n_instances", [1, 8, 4096])
def test_attention_distance__mean__has_a_gradient_exactly_n_times_smaller(n_instances):
    # N is a power of two: then nothing is rounded.
    target, online, _ = _draw((2, 2, n_instances, 1))
    log_target = log_normalized_sigmoid(target)
    gradients = {}
    for reduction in ("sum", "mean"):
        scores = online.clone().requires_grad_()
        value = attention_distance(log_target, log_softmax(scores), reduction=reduction)
        (gradients[reduction],) = torch.autograd.grad(value.sum(), scores)

    assert torch.equal(gradients["sum"], n_instances * gradients["mean"])
    closed_form = torch.softmax(online, dim=-1) - log_target.exp()
    assert torch.allclose(gradients["sum"], closed_form, atol=1e-12)


def test_attention_distance__mean__counts_real_instances_only():
    target, online, _ = _draw((2, 2, 7, 1))
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    padded = attention_distance(
        log_softmax(target, mask), log_softmax(online, mask), reduction="mean"
    )
    alone = attention_distance(
        log_softmax(target[1:, :, :3]), log_softmax(online[1:, :, :3]), reduction="mean"
    )

    assert torch.allclose(padded[1:], alone, rtol=1e-12)


def test_attention_distance__unknown_reduction__is_named():
    log_attention = log_softmax(torch.zeros(1, 1, 2))

    with pytest.raises(ValueError, match="reduction must be one of sum, mean, but got max"):
        attention_distance(log_attention, log_attention, reduction="max")


@SETTINGS
@given(SHAPES, st.integers(0, 5))
def test_bag_feature_distance__any_bags__equals_the_naive_definition(shape, seed):
    target, online, features = _draw(shape, seed)

    distance = bag_feature_distance(log_softmax(target), log_softmax(online), features)

    for bag, (held, own, rows) in enumerate(zip(target, online, features, strict=True)):
        for row in range(len(held)):
            pooled = [
                sum(weight * instance for weight, instance in zip(weights, rows, strict=True))
                for weights in (torch.softmax(held[row], 0), torch.softmax(own[row], 0))
            ]
            expected = sum((pooled[0] - pooled[1]) ** 2) / shape[3]
            assert distance[bag, row].item() == pytest.approx(expected.item(), abs=1e-12)


def test_bag_feature_distance__online_scores__have_the_numerical_gradient_and_features_none():
    target, online, features = _draw((2, 2, 5, 3))
    online.requires_grad_()
    features.requires_grad_()

    assert torch.autograd.gradcheck(
        lambda scores: bag_feature_distance(
            log_softmax(target), log_softmax(scores), features.detach()
        ),
        online,
    )
    bag_feature_distance(log_softmax(target), log_softmax(online), features).sum().backward()
    assert features.grad is None


@SETTINGS
@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 5))
def test_bag_feature_distance__affinely_dependent_bag__has_another_attention_of_no_distance(
    width, more, seed
):
    # More than width + 1 instances are always affinely dependent.
    _, online, features = _draw((1, 1, width + more, width), seed)
    log_online = log_softmax(online / 3)
    other = _other_attention_of_same_feature(log_online[0, 0], features[0])[None, None]

    assert other.exp().sum().item() == pytest.approx(1)
    assert bag_feature_distance(other, log_online, features).item() < 1e-28
    assert (other.exp() - log_online.exp()).abs().max() > 1e-3


def test_bag_feature_distance__bag_of_the_paper_s_kind__hides_a_large_divergence():
    _, online, features = _draw((1, 1, 12, 4))
    log_online = log_softmax(online / 3)
    other = _other_attention_of_same_feature(log_online[0, 0], features[0])[None, None]

    assert bag_feature_distance(other, log_online, features).item() < 1e-28
    assert attention_distance(other, log_online).item() > 0.01


@SETTINGS
@given(st.integers(1, 8), st.integers(0, 4), st.integers(0, 5))
def test_bag_feature_distance__affinely_independent_bag__bounds_the_attention(
    n_instances, wider, seed
):
    # With [H 1] of full row rank the bag feature tells the attention: the distance is at least
    # the smallest singular value squared times that of the attentions.
    width = n_instances - 1 + wider + 1
    target, online, features = _draw((1, 1, n_instances, width), seed)
    ones = torch.ones(n_instances, 1, dtype=torch.float64)
    singular = torch.linalg.svdvals(torch.cat([features[0], ones], dim=1))
    held, own = log_softmax(target), log_softmax(online)

    assert len(singular) == n_instances
    assert singular[-1] > 1e-6
    distance = bag_feature_distance(held, own, features).item()
    apart = (held.exp() - own.exp()).square().sum().item()
    assert distance * width >= singular[-1].item() ** 2 * apart * (1 - 1e-9)


def test_bag_feature_distance__padding_and_order__change_nothing():
    target, online, features = _draw((1, 2, 6, 3))
    whole = bag_feature_distance(log_softmax(target), log_softmax(online), features)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 6 + [False] * 2])
    padded = [torch.nn.functional.pad(scores, (0, 2), value=9.0) for scores in (target, online)]
    broken = torch.cat([features, torch.full((1, 2, 3), torch.nan)], dim=1)

    shuffled = bag_feature_distance(
        log_softmax(target[..., order]), log_softmax(online[..., order]), features[:, order]
    )
    masked = bag_feature_distance(
        log_softmax(padded[0], mask), log_softmax(padded[1], mask), broken
    )
    assert torch.allclose(whole, shuffled, rtol=1e-12)
    assert torch.allclose(whole, masked, rtol=1e-12)


def test_bag_feature_distance__features_of_any_width__keep_their_scale():
    target, online, features = _draw((1, 1, 5, 4))
    held, own = log_softmax(target), log_softmax(online)
    repeated = features.repeat(1, 1, 8)

    one, other = (bag_feature_distance(held, own, x) for x in (features, repeated))
    assert torch.allclose(one, other, rtol=1e-12)


def test_bag_feature_distance__half_features_under_autocast__are_pooled_in_float32():
    target, online, features = (x.float() for x in _draw((1, 1, 50, 8)))
    held, own = log_softmax(target), log_softmax(online)
    features = features.bfloat16()
    expected = bag_feature_distance(held, own, features.float())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bag_feature_distance(held, own, features), expected)
