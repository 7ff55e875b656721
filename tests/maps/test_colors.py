import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from mil_anchor.maps.colors import SCALES, attention_colors


def _attention(n_instances, *, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Rounded, so that some are equal.
    return (scale * torch.randn(n_instances, generator=generator).round(decimals=1)).softmax(dim=0)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 200), st.floats(0, 20), st.integers(0, 2**31))
def test_attention_colors__percentile__is_the_mean_rank(n_instances, scale, seed):
    attention = _attention(n_instances, scale=scale, seed=seed)
    colors = attention_colors("percentile", [attention])

    expected = 100 * (rankdata(attention.numpy()) - 0.5) / n_instances
    np.testing.assert_allclose(colors.values[0], expected)
    assert (colors.norm.vmin, colors.norm.vmax) == (0, 100)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.sampled_from(SCALES), st.integers(1, 200), st.floats(0, 80), st.integers(0, 2**31))
def test_attention_colors__any_attention__has_a_colour_on_the_bar(scale, n_instances, spread, seed):
    attentions = [_attention(n_instances, scale=s, seed=seed) for s in (0, spread / 2, spread)]
    colors = attention_colors(scale, attentions)

    assert colors.norm.vmin < colors.norm.vmax
    for attention, values in zip(attentions, colors.values, strict=True):
        position = np.ma.filled(colors.norm(values), np.nan)
        assert ((position >= 0) & (position <= 1)).all()
        # The order of instances is the order of colours, but below the end of a log scale.
        order = attention.argsort().numpy()
        assert (np.diff(position[order]) >= 0).all()
    for tick in colors.ticks or []:
        assert colors.norm.vmin <= tick <= colors.norm.vmax


@pytest.mark.parametrize("scale", SCALES)
def test_attention_colors__uniform_attention__is_in_the_middle(scale):
    colors = attention_colors(scale, [torch.full((50,), 0.02)])
    np.testing.assert_allclose(colors.norm(colors.values[0]), 0.5, atol=1e-6)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_attention_colors__several_maps__share_the_scale(scale):
    flat, peaked = torch.full((4,), 0.25), torch.tensor([0.7, 0.1, 0.1, 0.1])
    colors = attention_colors(scale, [flat, peaked])
    np.testing.assert_allclose(colors.values[0], 1)
    np.testing.assert_allclose(colors.values[1], [2.8, 0.4, 0.4, 0.4], rtol=1e-6)
    assert colors.norm.vmax == pytest.approx(2.8)
    assert colors.extend == "neither"


def test_attention_colors__attention_of_zero__takes_the_lowest_colour_of_a_log_scale():
    colors = attention_colors("log", [torch.tensor([0.0, 0.5, 0.5, 0.0])])
    assert colors.norm(colors.values[0]).tolist() == [0, 1, 1, 0]
    assert colors.norm.vmin == pytest.approx(2e-4)
    assert colors.extend == "min"
    assert colors.ticks == pytest.approx([0.001, 0.01, 0.1, 1])


def test_attention_colors__narrow_log_scale__has_ticks_between_powers_of_ten():
    colors = attention_colors("log", [torch.tensor([0.5, 0.3, 0.2])])
    assert colors.ticks == pytest.approx([0.5, 1, 2])


def test_attention_colors__unknown_scale__is_refused():
    with pytest.raises(ValueError, match=r"one of .*'log'.*, but 'rank' came"):
        attention_colors("rank", [torch.ones(1)])
