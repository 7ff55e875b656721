import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor

from mil_anchor.attention import log_softmax, normalized_entropy
from mil_anchor.schedules import Constant, Ramp
from mil_anchor.targets import CenteredSigmoidTarget, UniformTarget, as_target
from tests.targets.pulling import exact_scores, pull

LAWS = settings(derandomize=True, deadline=None, max_examples=30)
seeds = st.integers(0, 2**31)


def naive_center(scores: Tensor, count: float, temperature: float) -> float:
    """The offset at which the sigmoids sum to the count, by a general root finder."""

    def excess(center: float) -> float:
        return float(torch.sigmoid((scores - center) / temperature).sum()) - count

    reach = 60 * temperature
    low, high = float(scores.min()) - reach, float(scores.max()) + reach
    return float(brentq(excess, low, high, xtol=1e-13, rtol=1e-15))


@given(
    seed=seeds,
    n_instances=st.integers(2, 300),
    scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    temperature=st.floats(0.1, 2),
    share=st.floats(0, 1),
    reach=st.floats(0, 3),
    offset=st.sampled_from([-1e3, -4.0, 8.0, 1e3]),
)
@settings(LAWS, max_examples=150)
def test_centered__any_scores__equals_its_formula_and_keeps_its_bounds(
    seed, n_instances, scale, temperature, share, reach, offset
):
    scores = exact_scores(seed, n_instances, scale)
    count = 1 + share * (n_instances - 1.001)  # up to just below all of them
    build = CenteredSigmoidTarget(count=count, temperature=temperature)
    center = naive_center(scores, count, temperature)
    naive = torch.sigmoid((scores - center) / temperature) / count

    target = build(scores).exp()

    assert torch.allclose(target, naive, rtol=1e-6, atol=1e-12)
    # 1: the cap.
    rounding = 1 + 1e-9
    assert target.max() <= rounding / count
    entropy = -(target * target.clamp(min=1e-300).log()).sum()
    assert entropy >= math.log(count) - 1e-9
    # 2 and 3: high instances are alike, low ones get nothing.
    distance = reach * temperature
    high, low = target[scores >= center + distance], target[scores <= center - distance]
    if len(high):
        assert high.max() / high.min() <= (1 + math.exp(-reach)) * rounding
    if len(low):
        assert low.max() <= math.exp(-reach) / count * rounding
    # 4: how many are high.
    assert (scores > center + distance).sum() < count * (1 + math.exp(-reach)) * rounding
    # 5: the offset of the scores.
    assert torch.allclose(build(scores + offset).exp(), target, rtol=1e-6, atol=1e-12)


@given(
    seed=seeds,
    scale=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    count=st.sampled_from([1, 2.5, 20, 399.5, 399.999]),
)
@LAWS
def test_centered__float32_and_any_scale__keeps_the_cap(seed, scale, count):
    scores = exact_scores(seed, 400, scale).float()

    target = CenteredSigmoidTarget(count=count)(scores).exp()

    # A center far below the highest score is known to as many digits as their distance.
    assert target.max() <= (1 + 1e-2) / count


def test_centered__two_groups_far_apart__finds_the_center_between_and_inside_them():
    scores = torch.tensor([1e4] * 20 + [-1e4] * 380, dtype=torch.float64)

    # 20 sigmoids of 1, and nothing or 10 in sum from the others.
    for count, low in ((20, 0.0), (30, 10 / 380 / 30)):
        target = CenteredSigmoidTarget(count=count)(scores).exp()
        assert torch.allclose(target[:20], torch.tensor(1 / count).double())
        assert torch.allclose(target[20:], torch.tensor(low).double())


@pytest.mark.parametrize("target", [CenteredSigmoidTarget(count=5), as_target("nsf_centered")])
def test_centered__bag_of_no_more_than_k_instances__is_uniform(target):
    n_instances = 5 if target.count else 1
    scores = torch.tensor([3.0, -2.0, 8.0, 0.0, 1.0, 9.0])
    mask = torch.arange(6) < n_instances

    assert torch.equal(target(scores, mask), UniformTarget()(scores, mask))
    # One instance more, and there is something to choose.
    assert target(scores, torch.arange(6) < n_instances + 1).exp().isfinite().all()
    assert not torch.equal(target(scores[:6]), UniformTarget()(scores[:6]))


def test_centered__count_towards_all_and_share_below_one__ends_uniform_and_at_one():
    scores = exact_scores(0, 50, 2.0)

    nearly_all = CenteredSigmoidTarget(count=50 - 1e-9)(scores).exp()
    least = CenteredSigmoidTarget(share=0.001)(scores)

    assert torch.allclose(nearly_all, torch.full_like(scores, 1 / 50), atol=1e-8)
    assert torch.allclose(least, CenteredSigmoidTarget(count=1)(scores))


@pytest.mark.parametrize("n_instances", [30, 1000])
def test_centered__share__is_the_count_of_each_bag(n_instances):
    scores = exact_scores(1, n_instances, 2.0)
    padded = torch.stack(
        [torch.cat([scores, torch.zeros(9)]), exact_scores(2, n_instances + 9, 1.0)]
    )
    mask = torch.arange(n_instances + 9) < torch.tensor([[n_instances], [n_instances + 9]])

    by_share = CenteredSigmoidTarget(share=0.2)(padded, mask)

    by_count = CenteredSigmoidTarget(count=0.2 * n_instances)(scores)
    assert torch.allclose(by_share[0, :n_instances], by_count, atol=1e-9)


@pytest.mark.parametrize(
    ("progress", "count"), [(0, 200), (0.2, 200), (0.4, 40), (0.6, 8), (1.0, 8)]
)
def test_centered__start_share__moves_k_geometrically_with_the_schedule(progress, count):
    scores = exact_scores(4, 400, 2.0)
    moving = CenteredSigmoidTarget(count=8, start_share=0.5, schedule=Ramp(0.2, 0.6))

    still = CenteredSigmoidTarget(count=count)

    assert torch.allclose(moving(scores, progress=progress), still(scores), atol=1e-7)


def test_centered__constant_schedule_as_an_object__is_the_one_by_name():
    scores = torch.tensor([1.0, 2.0, 3.0])

    by_object = CenteredSigmoidTarget(count=2, schedule=Constant())(scores)

    assert torch.equal(by_object, CenteredSigmoidTarget(count=2)(scores))


@given(n_high=st.integers(2, 60), temperature=st.floats(0.1, 0.9), count=st.floats(1, 40))
@LAWS
def test_centered__n_equal_weights_and_nothing_else__stay_exactly_if_n_is_between_its_bounds(
    n_high, temperature, count
):
    """A small deviation shrinks if and only if n < K / (1 - tau)."""
    assume(count < n_high and abs(n_high * (1 - temperature) / count - 1) > 0.02)
    target = CenteredSigmoidTarget(count=count, temperature=temperature)
    low = torch.full((200,), -60.0, dtype=torch.float64)
    scores = torch.cat([torch.zeros(n_high, dtype=torch.float64), low])

    def drift(scores):
        return target(scores).exp() - log_softmax(scores).exp()

    deviation = torch.zeros_like(scores)
    deviation[0], deviation[1] = 1e-4, -1e-4

    assert drift(scores).abs().max() < 1e-9
    is_stable = bool(drift(scores + deviation)[0] < 0)
    assert is_stable == (n_high < count / (1 - temperature))


def test_pull__centered_at_temperature_1__ends_uniform_as_the_nsf_does():
    _, after = pull(CenteredSigmoidTarget(count=20, temperature=1))

    assert normalized_entropy(after) > 0.99


@pytest.mark.parametrize("temperature", [0.5, 0.2])
def test_pull__centered__ends_with_k_equal_weights(temperature):
    before, after = pull(CenteredSigmoidTarget(count=20, temperature=temperature))
    n_equal = int((after.exp() > 0.01).sum())

    assert normalized_entropy(before) > 0.6
    assert 20 <= n_equal < 20 / (1 - temperature)
    assert normalized_entropy(after).item() == pytest.approx(math.log(20) / math.log(400), abs=0.02)
    # The average that the target is made of runs behind.
    assert after.exp().max() <= 1.001 / 20
    assert after[:20].exp().sum() > 0.9


def test_centered__progress_outside_the_training__is_refused():
    moving = CenteredSigmoidTarget(count=2, start_share=0.5, schedule="ramp")

    with pytest.raises(ValueError, match=r"lies in \[0, 1\], but got 1.5"):
        moving(torch.zeros(5), progress=1.5)
