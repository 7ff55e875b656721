import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_anchor.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    Linear,
    Ramp,
    as_schedule,
    warmed_up,
)

LAWS = settings(derandomize=True, deadline=None)
PROGRESS = st.floats(0, 1)


@LAWS
@given(PROGRESS)
def test_schedules__by_name__equal_their_closed_forms(progress):
    expected = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "ramp": min(1.0, max(0.0, (progress - 0.2) / 0.4)),
    }

    for name, value in expected.items():
        assert as_schedule(name)(progress) == pytest.approx(value, abs=1e-12)
    assert set(expected) == set(SCHEDULES)


@LAWS
@given(st.floats(0, 0.9), st.floats(0.01, 0.1), PROGRESS, PROGRESS)
def test_schedules__between_two_points__stay_in_range_and_are_monotone(begin, length, one, other):
    low, high = sorted((one, other))

    for kind, direction in ((Ramp, 1), (Linear, -1), (Cosine, -1)):
        schedule = kind(begin, begin + length)
        assert 0 <= schedule(low) <= 1
        assert direction * (schedule(high) - schedule(low)) >= 0
        assert schedule(0.0) == (0 if kind is Ramp else 1)
        assert schedule(1.0) == pytest.approx(1 if kind is Ramp else 0)


def test_schedules__of_the_same_kind_and_points__are_equal():
    assert as_schedule("ramp") == Ramp(0.2, 0.6) != Ramp(0.1, 0.6)
    assert as_schedule(Constant()) == Constant()


@pytest.mark.parametrize(("begin", "end"), [(-0.1, 0.5), (0.5, 0.5), (0.6, 0.2), (0.1, 1.1)])
def test_schedule__impossible_points__are_refused(begin, end):
    with pytest.raises(ValueError, match=f"begin={begin}, end={end}"):
        Ramp(begin, end)


def test_schedule__progress_outside_the_training__is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], but got 1.5"):
        Cosine()(1.5)


def test_as_schedule__unknown_name__lists_the_known_ones():
    with pytest.raises(ValueError, match=r"constant, ramp, linear, cosine.* but got 'cosin'"):
        as_schedule("cosin")


@LAWS
@given(st.floats(0, 0.9999), st.integers(0, 10**6))
def test_warmed_up__any_update__is_the_smaller_of_both(decay, n_updates):
    assert warmed_up(decay, n_updates) == min(decay, (1 + n_updates) / (10 + n_updates))
    assert warmed_up(decay, n_updates) <= warmed_up(decay, n_updates + 1) <= decay
