"""Mid-ranks, rank correlation and AUROC against scipy and scikit-learn."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from mil_anchor.ranks import mid_ranks, rank_auroc, rank_correlation

LAWS = settings(derandomize=True, deadline=None, max_examples=60)
# Few values, so that there are ties.
ROWS = st.lists(st.sampled_from([-math.inf, -1e30, -1.0, 0.0, 1e-30, 2.0]), min_size=1, max_size=9)


@given(values=ROWS)
@LAWS
def test_mid_ranks__any_values__are_those_of_scipy(values):
    assert mid_ranks(torch.tensor(values)).tolist() == rankdata(values).tolist()


@given(n_rows=st.integers(1, 3), n_instances=st.integers(2, 30), seed=st.integers(0, 99))
@LAWS
def test_rank_correlation__rows_with_ties__is_that_of_scipy(n_rows, n_instances, seed):
    generator = torch.Generator().manual_seed(seed)
    one = torch.randint(0, 8, (n_rows, n_instances), generator=generator).float()
    other = one + torch.randint(0, 6, (n_rows, n_instances), generator=generator)
    one[:, 0], one[:, 1] = -torch.inf, 9  # never constant
    other[:, 0], other[:, 1] = 20, 21

    result = rank_correlation(one, other)

    expected = [spearmanr(*pair).statistic for pair in zip(one, other, strict=True)]
    assert result.tolist() == pytest.approx(expected, abs=1e-12)


@given(values=st.lists(st.integers(-50, 50), min_size=2, max_size=9, unique=True))
@LAWS
def test_rank_correlation__same_or_reversed_order__is_one_or_minus_one(values):
    row = torch.tensor(values).double()

    assert rank_correlation(row, row.exp()).item() == pytest.approx(1, abs=1e-12)
    assert rank_correlation(row, -row).item() == pytest.approx(-1, abs=1e-12)
    assert abs(rank_correlation(row, row.exp()).item()) <= 1


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [-math.inf, -math.inf], [3.0]])
def test_rank_correlation__equal_values__is_not_defined(values):
    row = torch.tensor(values)
    ramp = torch.arange(len(values)).float()

    assert rank_correlation(row, ramp).isnan()
    assert rank_correlation(ramp, row).isnan()


@given(
    pairs=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=20),
)
@LAWS
def test_rank_auroc__scores_with_ties__is_that_of_scikit_learn(pairs):
    scores = torch.tensor([float(score) for score, _ in pairs])
    positive = torch.tensor([label for _, label in pairs])

    result = rank_auroc(torch.stack([scores, -scores]), positive)

    if positive.all() or not positive.any():
        assert result.isnan().all()
    else:
        expected = roc_auc_score(positive, scores)
        assert result.tolist() == pytest.approx([expected, 1 - expected], abs=1e-12)


def test_rank_auroc__many_instances__counts_the_pairs_without_rounding():
    n_instances = 20_000
    scores = torch.arange(n_instances, dtype=torch.float32)
    positive = torch.zeros(n_instances, dtype=torch.bool)
    positive[-1] = positive[0] = True

    assert rank_auroc(scores, positive).item() == 0.5
