import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mil_anchor.attention import kl_divergence, log_softmax
from mil_anchor.schedules import Linear
from mil_anchor.targets import (
    TARGETS,
    AdaptiveSigmoidTarget,
    CenteredSigmoidTarget,
    EntmaxTarget,
    SigmoidTarget,
    SoftmaxTarget,
    UniformTarget,
    as_target,
)

LAWS = settings(derandomize=True, deadline=None, max_examples=30)
EVERY = [
    *(as_target(name) for name in TARGETS),
    AdaptiveSigmoidTarget(0.9),
    SoftmaxTarget(0.3),
    SigmoidTarget(temperature=2),
    CenteredSigmoidTarget(count=7.5, temperature=0.1),
    CenteredSigmoidTarget(share=0.5, temperature=3, start_share=1, schedule="ramp"),
    EntmaxTarget(alpha=1.2),
]
# Sums of float32 roots that the package entmax does not normalise once more.
TOLERANCE = 2e-5
every_target = pytest.mark.parametrize("target", EVERY, ids=str)
bag_sizes = st.integers(1, 300)
scales = st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0, 1e4])
seeds = st.integers(0, 2**31)


def _scores(seed: int, n_instances: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, n_instances, generator=generator) * scale


@every_target
@given(seed=seeds, n_instances=bag_sizes, scale=scales)
@LAWS
def test_target__any_finite_scores__is_a_distribution_that_is_zero_on_padding(
    target, seed, n_instances, scale
):
    scores = _scores(seed, n_instances, scale)
    lengths = torch.tensor([n_instances, 1 + seed % n_instances])
    mask = torch.arange(n_instances) < lengths[:, None]

    log_target = target(scores, mask)

    assert log_target.dtype == torch.float32
    assert torch.allclose(log_target.exp().sum(dim=-1), torch.ones(2, 3), atol=TOLERANCE)
    assert (log_target.masked_select(~mask[:, None]) == -torch.inf).all()
    assert not log_target.isnan().any()
    if not isinstance(target, EntmaxTarget):
        assert log_target.masked_select(mask[:, None]).isfinite().all()


@every_target
@given(seed=seeds, n_instances=bag_sizes, scale=scales)
@LAWS
def test_target__padding_and_instance_order__change_nothing(target, seed, n_instances, scale):
    scores = _scores(seed, n_instances, scale).double()
    order = torch.randperm(n_instances, generator=torch.Generator().manual_seed(seed))
    padded = torch.cat([scores, torch.full((2, 3, 7), 5.0)], dim=-1)
    mask = torch.arange(n_instances + 7).expand(2, -1) < n_instances
    masked_by_model = padded.masked_fill(~mask[:, None], -torch.inf)

    alone = target(scores).exp()

    assert torch.allclose(target(padded, mask)[..., :n_instances].exp(), alone, atol=1e-9)
    assert torch.equal(target(masked_by_model), target(padded, mask))
    assert torch.allclose(target(scores[..., order]).exp(), alone[..., order], atol=1e-9)


@every_target
def test_target__any_precision__computes_in_float32_at_least_and_carries_no_gradient(target):
    scores = (torch.randn(1, 1, 500, generator=torch.Generator().manual_seed(0)) * 5).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = target(scores)

    assert low.dtype == torch.float32
    assert torch.equal(low, target(scores.float()))
    assert target(scores.double()).dtype == torch.float64
    assert torch.allclose(target(scores.double()).exp(), low.double().exp(), atol=TOLERANCE)
    assert not target(scores.float().requires_grad_()).requires_grad


@every_target
@pytest.mark.parametrize("extreme", [1e4, -1e4, 88.0, -104.0])
def test_target__extreme_scores__gives_a_finite_divergence_and_gradient(target, extreme):
    online = torch.tensor([[[extreme, 0.0, -extreme]]], requires_grad=True)

    kl = kl_divergence(target(-online.detach()), log_softmax(online))
    kl.sum().backward()

    assert kl.isfinite().all()
    assert online.grad.isfinite().all()


@every_target
def test_target__divergence_from_it__has_the_gradient_softmax_minus_target(target):
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    log_target = target(torch.randn(2, 2, 6, generator=generator, dtype=torch.float64), mask)
    online = torch.randn(2, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)

    def divergence(scores: Tensor) -> Tensor:
        return kl_divergence(log_target, log_softmax(scores, mask))

    (gradient,) = torch.autograd.grad(divergence(online).sum(), online)

    assert torch.autograd.gradcheck(divergence, online)
    assert torch.allclose(gradient, log_softmax(online, mask).exp() - log_target.exp(), atol=1e-12)


@every_target
def test_target__reads_scores__is_false_for_the_uniform_control_only(target):
    scores = torch.arange(10) - 3.0

    assert target.reads_scores == (not isinstance(target, UniformTarget))
    assert target.reads_scores == (not torch.equal(target(scores), target(-scores)))


def test_as_target__name_and_target__gives_the_target():
    expected = {
        "softmax": SoftmaxTarget(temperature=1),
        "nsf": SigmoidTarget(temperature=1),
        "nsf_centered": CenteredSigmoidTarget(share=0.1, temperature=0.5),
        "nsf_adaptive": AdaptiveSigmoidTarget(threshold=0.5),
        "entmax": EntmaxTarget(alpha=1.5),
        "sparsemax": EntmaxTarget(alpha=2),
        "uniform": UniformTarget(),
    }

    assert {name: as_target(name) for name in TARGETS} == expected
    assert as_target(expected["nsf"]) is expected["nsf"]


def test_as_target__unknown_name__lists_the_names():
    with pytest.raises(ValueError, match=r"one of softmax, nsf, .*uniform.*but got 'frozen'"):
        as_target("frozen")


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (SoftmaxTarget, {"temperature": 0}, "temperature must be .* above 0, but got 0"),
        (SigmoidTarget, {"temperature": -1.0}, "temperature must be .* above 0, but got -1"),
        (SigmoidTarget, {"temperature": math.nan}, "above 0, but got nan"),
        (CenteredSigmoidTarget, {"count": 2, "temperature": math.inf}, "above 0, but got inf"),
        (CenteredSigmoidTarget, {}, "either count or share.*count=None and share=None"),
        (CenteredSigmoidTarget, {"count": 2, "share": 0.1}, "either count or share.*count=2"),
        (CenteredSigmoidTarget, {"count": 0.5}, "count must be .* at least 1, but got 0.5"),
        (CenteredSigmoidTarget, {"share": 0.0}, r"share must lie in \(0, 1\], but got 0"),
        (CenteredSigmoidTarget, {"share": 1.5}, r"share must lie in \(0, 1\], but got 1.5"),
        (
            CenteredSigmoidTarget,
            {"count": 2, "start_share": 2},
            r"start_share must lie in \(0, 1\]",
        ),
        (CenteredSigmoidTarget, {"count": 2, "start_share": 0.5}, "needs a schedule"),
        (CenteredSigmoidTarget, {"count": 2, "schedule": Linear()}, "start_share=None and sched"),
        (CenteredSigmoidTarget, {"count": 2, "schedule": "steep"}, "must be one of .*'steep'"),
        (AdaptiveSigmoidTarget, {"threshold": 1.0}, r"threshold must lie in \(0, 1\), but got 1"),
        (EntmaxTarget, {"alpha": 1}, "above 1, but got 1.*target='softmax'"),
        (EntmaxTarget, {"alpha": math.inf}, "above 1, but got inf"),
    ],
)
def test_targets__argument_out_of_range__is_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@every_target
def test_target__bad_scores__are_refused(target):
    with pytest.raises(ValueError, match=r"bags \[1\] of these scores have a NaN"):
        target(torch.tensor([[[1.0]], [[torch.nan]]]))
    with pytest.raises(ValueError, match=r"bags \[0\] of these scores are all padding"):
        target(torch.zeros(1, 1, 2), torch.zeros(1, 2, dtype=torch.bool))
