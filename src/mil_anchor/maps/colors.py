"""Scales of colours for attention."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64
from matplotlib.colors import LogNorm, Normalize
from torch import Tensor

SCALES = ("percentile", "linear", "log")

# Attention spans a dozen decades; what is four below the largest hardly counts for the slide.
_LOG_SPAN = 1e4


class AttentionColors(NamedTuple):
    """What maps show in one scale of colours, and what the colour bar says.

    Args:
        values: The value of every instance, for each map.
        norm: From values to colours.
        label: Name and unit of the values.
        ticks: Values at which the bar has ticks; None: where matplotlib puts them.
        extend: "min" where values below the bar have its lowest colour.
    """

    values: list[Float64[np.ndarray, " instance"]]
    norm: Normalize
    label: str
    ticks: list[float] | None = None
    extend: Literal["neither", "min"] = "neither"


def attention_colors(scale: str, attentions: Sequence[Float32[Tensor, " _"]]) -> AttentionColors:
    """One scale for several maps.

    "linear" and "log" show attention times the number of instances N, and reach from 0, or four
    decades, to the largest of all maps. "percentile" ranks the instances of each map: equal ones
    share the mean of their ranks.

    Args:
        scale: "percentile", "linear" or "log".
        attentions: The attention of each map.

    Raises:
        ValueError: The scale is unknown.

    Example:
        >>> import torch
        >>> attention = torch.tensor([0.5, 0.125, 0.25, 0.125])
        >>> attention_colors("percentile", [attention]).values[0].tolist()
        [87.5, 25.0, 62.5, 25.0]
        >>> attention_colors("linear", [attention]).values[0].tolist()
        [2.0, 0.5, 1.0, 0.5]
    """
    if scale not in SCALES:
        raise ValueError(
            f"A scale must be one of {SCALES}, but {scale!r} came. Choose one of them."
        )
    weights = [attention.double().numpy() for attention in attentions]
    if scale == "percentile":
        return AttentionColors(
            [_percentiles(w) for w in weights],
            Normalize(0, 100),
            "percentile of attention within each panel",
            ticks=[0.0, 25.0, 50.0, 75.0, 100.0],
        )
    relative = [w * len(w) for w in weights]
    # Uniform attention, 1, is to look like itself, and not like the largest value of a range.
    high = max(2.0, *(w.max() for w in relative))
    if scale == "linear":
        label = "attention times N, linear (1 is uniform)"
        return AttentionColors(relative, Normalize(0, high), label)
    low = min(w.min() for w in relative)
    floor = max(min(low, 0.5), high / _LOG_SPAN)
    return AttentionColors(
        # An attention of 0, too: it has no logarithm and would look like a missing tile.
        [w.clip(min=floor) for w in relative],
        LogNorm(floor, high),
        "attention times N, log (1 is uniform)",
        ticks=_log_ticks(floor, high),
        extend="min" if low < floor else "neither",
    )


def _percentiles(weights: Float64[np.ndarray, " instance"]) -> Float64[np.ndarray, " instance"]:
    _, inverse, counts = np.unique(weights, return_inverse=True, return_counts=True)
    middle: Float64[np.ndarray, " instance"] = (np.cumsum(counts) - counts / 2)[inverse]
    return 100 * middle / len(weights)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or where there are few of them, 1, 2 and 5 times these."""
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [float(step * 10.0**power) for power in powers for step in steps]
    return [tick for tick in ticks if low <= tick <= high]
