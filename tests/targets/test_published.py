import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor

from mil_anchor.attention import log_normalized_sigmoid, log_softmax, normalized_entropy
from mil_anchor.targets import (
    EntmaxTarget,
    SigmoidTarget,
    SoftmaxTarget,
    UniformTarget,
    as_target,
)
from tests.targets.pulling import exact_scores, pull

LAWS = settings(derandomize=True, deadline=None, max_examples=30)
bag_sizes = st.integers(1, 300)
seeds = st.integers(0, 2**31)


def naive_sparsemax(scores: Tensor) -> Tensor:
    """The nearest point of the simplex, by trying every size of the support."""
    highest_first = scores.sort(descending=True).values
    for size in range(len(scores), 0, -1):
        threshold = (highest_first[:size].sum() - 1) / size
        if highest_first[size - 1] > threshold:
            return (scores - threshold).clamp(min=0)
    raise RuntimeError("The support of a sparsemax is never empty.")


def naive_entmax(scores: Tensor, alpha: float) -> Tensor:
    """``[(alpha - 1) z - threshold]_+ ^ (1 / (alpha - 1))`` with the threshold that sums to one."""
    scaled = (alpha - 1) * scores

    def powers(threshold: float) -> Tensor:
        return (scaled - threshold).clamp(min=0) ** (1 / (alpha - 1))

    highest = float(scaled.max())
    return powers(
        brentq(lambda t: float(powers(t).sum()) - 1, highest - 1.001, highest, xtol=1e-15)
    )


@given(seed=seeds, n_instances=bag_sizes, temperature=st.floats(0.1, 5))
@LAWS
def test_softmax_and_sigmoid__with_temperature__equal_their_formulas(
    seed, n_instances, temperature
):
    scores = exact_scores(seed, n_instances, 3.0)
    powers = torch.exp(scores / temperature)
    sigmoids = 1 / (1 + torch.exp(-scores / temperature))

    assert torch.allclose(SoftmaxTarget(temperature)(scores).exp(), powers / powers.sum())
    assert torch.allclose(SigmoidTarget(temperature)(scores).exp(), sigmoids / sigmoids.sum())


def test_softmax_and_sigmoid__temperature_1__are_the_papers_bit_for_bit():
    scores = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))

    assert torch.equal(as_target("softmax")(scores), log_softmax(scores))
    assert torch.equal(as_target("nsf")(scores), log_normalized_sigmoid(scores))


@given(seed=seeds, n_instances=bag_sizes, alpha=st.sampled_from([1.1, 1.5, 1.8, 2, 3.0]))
@LAWS
def test_entmax__any_alpha__equals_the_thresholded_power(seed, n_instances, alpha):
    scores = exact_scores(seed, n_instances, 2.0)

    sparse = EntmaxTarget(alpha)(scores).exp()

    assert torch.allclose(sparse, naive_entmax(scores, alpha), atol=1e-9)
    if alpha == 2:
        assert torch.allclose(sparse, naive_sparsemax(scores), atol=1e-12)
    assert (sparse[scores <= scores.max() - 1 / (alpha - 1)] == 0).all()


def test_uniform__padded_bags__shares_equally():
    mask = torch.tensor([[True, True, True], [True, False, True]])
    scores = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0))

    log_target = UniformTarget()(scores, mask)

    expected = torch.tensor([[[1 / 3, 1 / 3, 1 / 3]], [[0.5, 0, 0.5]]])
    assert torch.allclose(log_target.exp(), expected)


def test_pull__softmax__leaves_the_attention_as_it_is():
    before, after = pull(as_target("softmax"))

    assert torch.allclose(after, before, atol=1e-9)


def test_pull__nsf__ends_uniform():
    before, after = pull(as_target("nsf"))

    assert normalized_entropy(before) < 0.7
    assert normalized_entropy(after) > 0.99


@pytest.mark.parametrize("alpha", [1.5, 2])
def test_pull__entmax__ends_with_one_instance(alpha):
    _, after = pull(EntmaxTarget(alpha), step_size=10)

    assert after.exp().max() > 0.99


def test_entmax__package_missing__says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "entmax", None)

    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mil_anchor\[entmax\]'"):
        EntmaxTarget()
