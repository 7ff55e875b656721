"""What is measured on one bag, and what rounding to float16 leaves of its attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr

from mil_anchor.attention import js_divergence, log_softmax
from mil_anchor.callbacks.measures import (
    correlation,
    divergence,
    labelled_auroc,
    labels_of_bags,
    mixing_of_bags,
    restore_attention,
    round_attention,
)
from mil_anchor.sites.base import ModuleCall

LAWS = settings(derandomize=True, deadline=None, max_examples=40)


def _attention(*shape, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return log_softmax(torch.randn(*shape, generator=generator).double() * spread)


@given(
    n_instances=st.integers(1, 3000),
    spread=st.sampled_from([0.0, 0.01, 0.3, 2.0, 8.0, 300.0]),
    seed=st.integers(0, 99),
)
@LAWS
def test_kept_attention__of_any_sharpness__is_restored_to_2e_7_nats(n_instances, spread, seed):
    exact = _attention(2, n_instances, spread=spread, seed=seed)

    kept = round_attention(exact)
    restored = restore_attention(kept, exact.shape)

    assert kept.dtype == torch.float16
    torch.testing.assert_close(restored.exp().sum(dim=-1), torch.ones(2).double())
    assert js_divergence(restored, exact).max() < 2e-7


@pytest.mark.parametrize("spread", [0.001, 0.01, 0.1])
def test_kept_attention__nearly_uniform__is_finer_than_its_logarithm_or_square_root(spread):
    exact = _attention(1, 2000, spread=spread)
    moved = log_softmax(exact + _attention(1, 2000, spread=spread / 50, seed=1))
    by_logarithm = log_softmax(exact.half().double())
    by_root = log_softmax(2 * (exact / 2).exp().half().double().log())

    kept = restore_attention(round_attention(exact), exact.shape)

    assert divergence(kept, moved) == pytest.approx(divergence(exact, moved), rel=1e-3)
    assert correlation(kept, moved) == pytest.approx(correlation(exact, moved), abs=1e-6)
    for coarse in (by_logarithm, by_root):
        assert divergence(coarse, exact) > 100 * divergence(kept, exact)
        assert correlation(coarse, exact) < correlation(kept, exact)


def test_kept_attention__half_on_one_instance__costs_the_most():
    scores = 0.3 * torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)).double()
    scores[0, 0] = math.log(20_000)
    exact = log_softmax(scores)

    assert divergence(restore_attention(round_attention(exact), exact.shape), exact) < 2.5e-7


def test_kept_attention__masked_instances__stay_at_zero():
    exact = log_softmax(torch.tensor([[0.0, -torch.inf, 1.0]]).double())

    restored = restore_attention(round_attention(exact), exact.shape)

    assert restored[0, 1] == -torch.inf
    assert divergence(restored, exact) < 1e-7


def test_kept_attention__of_another_size__is_none():
    kept = round_attention(_attention(2, 5, spread=1.0))

    assert restore_attention(kept, (2, 4)) is None
    assert restore_attention(None, (2, 5)) is None
    assert divergence(None, _attention(2, 5, spread=1.0)) is None
    assert correlation(None, _attention(2, 5, spread=1.0)) is None


@given(n_instances=st.integers(2, 40), seed=st.integers(0, 99))
@LAWS
def test_comparisons__two_attentions__are_those_of_scipy(n_instances, seed):
    one = _attention(3, n_instances, spread=2.0, seed=seed)
    other = _attention(3, n_instances, spread=2.0, seed=seed + 100)

    pairs = list(zip(one, other, strict=True))
    divergences = [jensenshannon(p.exp(), q.exp()) ** 2 for p, q in pairs]
    correlations = [spearmanr(p, q).statistic for p, q in pairs]
    assert divergence(one, other) == pytest.approx(sum(divergences) / 3, abs=1e-12)
    assert correlation(one, other) == pytest.approx(sum(correlations) / 3, abs=1e-12)
    order = torch.randperm(n_instances, generator=torch.Generator().manual_seed(seed))
    assert divergence(one[:, order], other[:, order]) == pytest.approx(divergence(one, other))
    assert correlation(one[:, order], other[:, order]) == pytest.approx(correlation(one, other))


def test_correlation__a_constant_row__is_left_out():
    one = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]).double()
    other = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]).double()

    assert correlation(one, other) == pytest.approx(0.5)
    assert correlation(one[:1], other[:1]) is None


def test_labelled_auroc__unknown_labels__are_left_out():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    # Of the known instances the first is positive, and class 2 is, too.
    assert labelled_auroc(scores, torch.tensor([1, -1, 0, 2])) == 0.5
    assert labelled_auroc(scores, torch.tensor([1, -1, 0, -1])) == 1.0


@pytest.mark.parametrize("labels", [None, [1, 1, 2, -1], [0, 0, -1, 0], [-1] * 4, [0, 1], [0] * 3])
def test_labelled_auroc__one_class_or_other_instances__is_none(labels):
    labels = None if labels is None else torch.tensor(labels)
    assert labelled_auroc(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), labels) is None


def test_labels_of_bags__padded_batch__are_those_of_real_instances():
    labels = torch.tensor([[1, 0, 2], [1, -1, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def of(batch):
        return [own.tolist() for own in labels_of_bags(batch, 2)]

    assert of({"instance_label": labels, "mask": mask}) == [[1, 0, 2], [1]]
    assert of({"instance_label": labels[..., None], "mask": mask[..., None]}) == [[1, 0, 2], [1]]
    assert of({"instance_label": labels}) == [[1, 0, 2], [1, -1, 0]]
    assert labels_of_bags({"instance_label": labels[0]}, 1)[0].tolist() == [1, 0, 2]


@pytest.mark.parametrize("labels", [None, "none", torch.zeros(3)])
def test_labels_of_bags__no_labels_that_fit__are_none(labels):
    assert labels_of_bags({"instance_label": labels}, 2) == [None, None]
    assert labels_of_bags({}, 0) == []


def _calls(*outputs):
    return [ModuleCall("mix", torch.nn.Identity(), (), {}, output) for output in outputs]


def test_mixing_of_bags__calls_with_repeats__are_cut_to_the_instances():
    row = torch.arange(12.0).view(1, 2, 6)
    of_bags = {"a": torch.zeros(2, 4), "b": torch.zeros(2, 6)}

    one, other = mixing_of_bags("mix", _calls(row, row), of_bags)
    together = mixing_of_bags("mix", _calls(torch.cat([row, row])), of_bags)

    assert one.tolist() == row[0, :, :4].tolist()
    assert torch.equal(other, row[0].double())
    assert [kept.tolist() for kept in together] == [one.tolist(), other.tolist()]


@pytest.mark.parametrize(
    "shapes", [[], [(1, 2, 4)], [(1, 2, 4), (1, 2, 5)], [(1, 3, 6), (1, 2, 6)], [(2, 6)]]
)
def test_mixing_of_bags__other_bags_rows_or_instances__are_refused(shapes):
    of_bags = {"a": torch.zeros(2, 4), "b": torch.zeros(2, 6)}

    message = r"'mix' must put out how .* \[\(2, 4\), \(2, 6\)\] .* bags \['a', 'b'\], but it gave"
    with pytest.raises(ValueError, match=message):
        mixing_of_bags("mix", _calls(*map(torch.zeros, shapes)), of_bags)
