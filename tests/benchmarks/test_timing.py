import pytest

from benchmarks.timing import Timings, again, is_conclusive, time_steps


def told(step):
    """A clock that the steps tell what they took."""
    return step()


def test_time_steps__three_variants__go_forth_and_back_with_the_reference_twice():
    order = []
    variants = {name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}
    time_steps(variants, rounds=2, n_warmup=0, clock=told)
    assert order == ["A", "B", "C", "A", "A", "C", "B", "A"]


def test_time_steps__warmup__is_dropped():
    seconds = iter([9.0, 9.0, 1.0, 1.0, 2.0, 2.0])
    timings = time_steps({"A": lambda: next(seconds)}, rounds=2, n_warmup=1, clock=told)
    assert dict(timings.seconds) == {"A": [1.0, 2.0], "A again": [1.0, 2.0]}


def test_time_steps__another_reference__is_timed_twice():
    variants = {"A": lambda: 1.0, "B": lambda: 2.0}
    timings = time_steps(variants, reference="B", rounds=1, clock=told)
    assert list(timings.seconds) == ["A", "B", "B again"]
    assert timings.ratio("A") == 0.5


def test_time_steps__control_fails__measures_once_more():
    # The reference is first and last of a round in turn: its fast calls are all in one name.
    calls = iter([1.0, 2.0, 2.0, 1.0] * 20)
    timings = time_steps({"A": lambda: next(calls)}, rounds=2, n_warmup=0, clock=told)
    assert timings.seconds["A"] == [1.0, 1.0, 1.0, 1.0]
    assert timings.control == 2.0
    assert not timings.is_conclusive


def test_time_steps__control_fails_once__both_passes_count():
    calls = iter([1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    timings = time_steps({"A": lambda: next(calls)}, rounds=2, n_warmup=0, clock=told)
    assert timings.seconds[again("A")] == [2.0, 2.0, 1.0, 1.0]
    assert timings.is_conclusive


def test_ratio__several_rounds__compares_minima():
    timings = Timings({"A": [3.0, 2.0], "B": [1.0, 5.0], "A again": [2.0, 2.0]}, "A")
    assert timings.ratio("B") == 0.5
    assert timings.ratio("A", "B") == 2.0
    assert timings.milliseconds("B") == 1000.0


@pytest.mark.parametrize(
    ("control", "expected"), [(0.969, False), (0.97, True), (1.03, True), (1.031, False)]
)
def test_is_conclusive__control__within_three_percent(control, expected):
    assert is_conclusive(control) is expected


def test_is_conclusive__no_control__allows_a_verdict():
    assert is_conclusive(None)
