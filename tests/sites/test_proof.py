"""What is wrong with a site is said, for each way of being wrong."""

import pytest
import torch
from torch import nn

from mil_anchor import AttentionSite
from mil_anchor.sites.base import RecordedAttention
from mil_anchor.sites.normalizations import NormalizationWatch
from mil_anchor.sites.proof import is_provable
from tests.sites.watching import bag, read

MASK = torch.ones(2, 7, dtype=torch.bool)
MASK[1, 5:] = False


class Model(nn.Module):
    """A scorer, its probabilities, and a function from scores to attention."""

    def __init__(self, normalize) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scorer = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        with torch.no_grad():
            self.scorer[-1].weight.mul_(4)
        self.probabilities = nn.Identity()
        self.normalize = normalize

    def forward(self, features):
        attention = self.probabilities(self.normalize(self.scorer(features)))
        return (attention * features).sum(dim=1)


def _difference(normalize, site="scorer", **batch):
    features = bag(2)
    return read(Model(normalize), site, {"features": features, **batch})[1]


def _masked(scores, value=-torch.inf):
    return scores.masked_fill(~MASK[..., None], value)


@pytest.mark.parametrize(
    "normalize",
    [
        lambda s: s.softmax(dim=1),
        lambda s: torch.softmax(s, 1),
        lambda s: nn.Softmax(dim=1)(s),
        lambda s: torch.nn.functional.log_softmax(s, dim=1).exp(),
        lambda s: (
            (s - s.amax(dim=1, keepdim=True)).exp() / (s - s.amax(1, True)).exp().sum(1, True)
        ),
        lambda s: s.mT.softmax(dim=2).mT,
        lambda s: (s.exp() * 1.0) / (s.exp() * 1.0).sum(1, True),
        lambda s: (s + 3).softmax(dim=1),
        lambda s: torch.cat([one.softmax(dim=0)[None] for one in s]),
    ],
)
def test_proof__softmax_in_any_spelling__is_recognised(normalize):
    assert _difference(normalize) is None


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        (
            lambda s: (s / 2).softmax(dim=1),
            r"multiplies them by 0\.5 before.*constant, write.*scale=0\.5",
        ),
        (lambda s: s.sigmoid() / s.sigmoid().sum(1, True), "normalises their sigmoids"),
        (lambda s: s.exp() / (1 + s.exp().sum(1, True)), r"weights sum to 0\.\d+"),
        (lambda s: s, "it ran no softmax over 7 instances"),
        (lambda s: (s * s).softmax(dim=1), "none of the 1 normalisations"),
        (lambda s: _masked(s).softmax(dim=1), r"masks 2 of 7 of them afterwards.*'mask' entry"),
        (lambda s: _masked(s, -1e4).softmax(dim=1), "masks 2 of 7 of them afterwards"),
    ],
)
def test_proof__something_else__is_told_by_what_it_is(normalize, message):
    difference = _difference(normalize)

    assert difference is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(difference)


def test_proof__probabilities_tapped__says_so():
    assert "they are probabilities" in _difference(lambda s: s.softmax(dim=1), "probabilities")


def test_proof__second_row_of_another_softmax__is_seen():
    class Rows(Model):
        def __init__(self) -> None:
            super().__init__(None)
            self.scorer[-1] = nn.Linear(4, 2)

        def forward(self, features):
            scores = self.scorer(features)
            rows = [scores[..., 0].softmax(dim=1), (scores[..., 1] ** 3).softmax(dim=1)]
            return torch.stack(rows, dim=1) @ features

    features = bag(2)
    assert "none of the 2 normalisations" in read(Rows(), "scorer", {"features": features})[1]


def test_proof__scale_given__is_accepted():
    site = AttentionSite("scorer", scale=0.5)

    assert _difference(lambda s: (s / 2).softmax(dim=1), site) is None


def test_proof__padding_that_the_batch_tells__is_accepted():
    assert _difference(lambda s: _masked(s).softmax(dim=1), mask=MASK) is None
    for value in (-1e9, -65504.0, -1e4):
        assert _difference(lambda s, v=value: _masked(s, v).softmax(dim=1), mask=MASK) is None


def test_proof__mask_the_wrong_way_round__is_told():
    inverted = ~MASK
    inverted[0] = inverted[1]
    both = _difference(
        lambda s: s.masked_fill(inverted[..., None], -torch.inf).softmax(dim=1), mask=inverted
    )
    assert "True must mean a real instance" in both


def test_proof__model_that_ignores_the_mask__is_told():
    difference = _difference(lambda s: s.softmax(dim=1), mask=MASK)

    assert "also covers 2 instances that the batch's mask calls padding" in difference


def test_proof__bfloat16__allows_for_its_rounding():
    model = Model(lambda s: s.softmax(dim=1)).bfloat16()
    features = bag(2).bfloat16()

    assert read(model, "scorer", {"features": features})[1] is None
    model.normalize = lambda s: (s / 2).softmax(dim=1)
    assert "scale=0.5" in read(model, "scorer", {"features": features})[1]


def test_is_provable__one_instance_or_nan__is_not():
    def attention(scores, mask=None):
        return [RecordedAttention(scores, mask, None)]

    scores = torch.tensor([[[0.0, 1.0]]])
    assert is_provable(attention(scores))
    assert is_provable(attention(torch.tensor([[[100.0, 100.01]]])))
    assert not is_provable(attention(torch.zeros(1, 1, 2)))
    assert not is_provable(attention(torch.full((1, 1, 3), 0.1)))
    assert not is_provable(attention(torch.zeros(3, 1, 1)))
    assert not is_provable(attention(scores, torch.tensor([[True, False]])))
    assert not is_provable(attention(torch.tensor([[[0.0, torch.nan]]])))
    assert not is_provable([])


def test_normalization_watch__entered__changes_no_result_and_draws_nothing():
    scores = torch.randn(3, 5)
    torch.manual_seed(0)
    plain = nn.functional.dropout(scores.softmax(-1)), torch.get_rng_state()
    torch.manual_seed(0)
    watch = NormalizationWatch()
    with watch:
        watched = nn.functional.dropout(scores.softmax(-1))
    assert torch.equal(watched, plain[0])
    assert torch.equal(torch.get_rng_state(), plain[1])
    assert len(watch.seen) == 1
    watch.stop()
    assert not watch.seen


@pytest.mark.parametrize("kind", [None, "bool", "float"])
def test_normalization_watch__fused_attention__gives_its_scores(kind):
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    real = torch.tensor([True, True, False, True]).expand(4, 4)
    bias = torch.zeros(4, 4).masked_fill(~real, -torch.inf)
    mask = {None: None, "bool": real, "float": bias}[kind]
    watch = NormalizationWatch()
    with watch:
        nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    expected = q @ k.mT / 8**0.5
    if kind:
        expected = expected.masked_fill(~real, -torch.inf)
    (seen,) = [one for one in watch.seen if one.function == "softmax"]
    assert torch.allclose(seen.scores.softmax(-1), expected.softmax(-1), atol=1e-6)
