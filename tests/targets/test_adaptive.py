import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mil_anchor.attention import log_softmax, normalized_entropy
from mil_anchor.targets import AdaptiveSigmoidTarget, as_target
from tests.targets.pulling import exact_scores, pull

LAWS = settings(derandomize=True, deadline=None, max_examples=30)
bag_sizes = st.integers(1, 300)
seeds = st.integers(0, 2**31)


@given(
    seed=seeds,
    n_instances=bag_sizes,
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    threshold=st.floats(0.05, 0.95),
    reach=st.floats(0, 3),
    offset=st.sampled_from([-1e3, -4.0, 8.0, 1e3]),
)
@settings(LAWS, max_examples=100)
def test_adaptive__any_scores__equals_its_formula_and_keeps_its_bounds(
    seed, n_instances, scale, threshold, reach, offset
):
    scores = exact_scores(seed, n_instances, scale)
    build = AdaptiveSigmoidTarget(threshold)
    attention = torch.softmax(scores, dim=-1)
    theta = threshold * (attention**2).sum()
    naive = attention**2 / (attention**2 + theta**2)

    target = build(scores).exp()

    assert torch.allclose(target, naive / naive.sum(), rtol=1e-9, atol=1e-15)
    # 1: between uniform and squared attention.
    order = attention.argsort(descending=True)
    ratio = target[order][:-1] / target[order][1:]
    assert (ratio >= 1 - 1e-9).all()
    assert (ratio <= (attention[order][:-1] / attention[order][1:]) ** 2 * (1 + 1e-9)).all()
    # 2: high instances are alike, low ones get nothing.
    high = target[attention >= theta * math.exp(reach)]
    low = target[attention <= theta * math.exp(-reach)]
    if len(high):
        assert high.max() / high.min() <= (1 + math.exp(-2 * reach)) * (1 + 1e-9)
    if len(low) and bool((attention >= theta).any()):
        assert low.max() / target[attention >= theta].min() <= 2 * math.exp(-2 * reach) * 1.000001
    # 3: the offset of the scores.
    assert torch.allclose(build(scores + offset).exp(), target, rtol=1e-6, atol=1e-12)


@given(n_high=st.integers(2, 60), gap=st.floats(0.1, 12), threshold=st.floats(0.1, 0.9), seed=seeds)
@LAWS
def test_adaptive__two_levels__lets_the_low_one_sink_exactly_if_h_w_is_below_theta_squared(
    n_high, gap, threshold, seed
):
    scores = torch.zeros(n_high + 1 + seed % 300, dtype=torch.float64)
    scores[:n_high] = gap
    attention = torch.softmax(scores, dim=-1)
    theta = threshold * (attention**2).sum()
    margin = (attention[0] * attention[-1] / theta**2).log()
    assume(abs(margin) > 1e-6)

    gain = AdaptiveSigmoidTarget(threshold)(scores).exp() / attention

    assert bool(gain[-1] < gain[0]) == bool(margin < 0)


@given(n_high=st.integers(2, 60), threshold=st.floats(0.05, 0.95))
@LAWS
def test_adaptive__any_number_of_equal_weights_and_nothing_else__is_a_stable_fixed_point(
    n_high, threshold
):
    scores = torch.full((200,), -60.0, dtype=torch.float64)
    scores[:n_high] = 0.0
    deviation = torch.zeros_like(scores)
    deviation[0], deviation[1] = 1e-4, -1e-4

    def drift(scores):
        return AdaptiveSigmoidTarget(threshold)(scores).exp() - log_softmax(scores).exp()

    assert drift(scores).abs().max() < 1e-12
    assert drift(scores + deviation)[0] < 0
    assert drift(scores - deviation)[0] > 0


@pytest.mark.parametrize("n_high", [5, 20, 60])
def test_pull__adaptive__ends_with_as_many_equal_weights_as_there_are_high_scores(n_high):
    before, after = pull(as_target("nsf_adaptive"), n_high=n_high, spread=0.3, step_size=10)
    expected = math.log(n_high) / math.log(400)

    assert normalized_entropy(before) > 0.7
    assert normalized_entropy(after).item() == pytest.approx(expected, abs=0.02)
    assert after[:n_high].exp().sum() > 0.98
    assert after.exp().max().item() == pytest.approx(1 / n_high, rel=0.02)
