"""Times variants of a step in turn, with a control; the other scripts build on it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# One variant, timed twice as if it were two, must look like one.
CONTROL_RANGE = (0.97, 1.03)
MIN_ROUNDS = 7

Step = Callable[[], object]


def cpu_seconds(step: Step) -> float:
    """The CPU time of this process that a step takes: waiting for other processes is not in it."""
    start = time.process_time()
    step()
    return time.process_time() - start


def cuda_seconds(step: Step) -> float:
    """The time from a step's first kernel on the GPU to the end of its last."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


CLOCKS = {"cpu": cpu_seconds, "cuda": cuda_seconds}


@dataclass(frozen=True)
class Timings:
    """Seconds of each variant in each round; the reference was timed twice per round.

    Others' work on the machine only ever adds time, so a variant's figure is its minimum.
    """

    seconds: Mapping[str, list[float]]
    reference: str

    def milliseconds(self, name: str) -> float:
        """The fastest step of a variant."""
        return 1000 * min(self.seconds[name])

    def ratio(self, name: str, reference: str | None = None) -> float:
        """A variant's time relative to another's, by default to the table's reference."""
        return self.milliseconds(name) / self.milliseconds(reference or self.reference)

    @property
    def control(self) -> float:
        """The ratio of the reference to itself."""
        return self.ratio(again(self.reference))

    @property
    def is_conclusive(self) -> bool:
        """Whether the control is as near to one as ratios are trusted."""
        return is_conclusive(self.control)


def is_conclusive(control: float | None) -> bool:
    """Whether a control allows a verdict; None: what was measured has none."""
    return control is None or CONTROL_RANGE[0] <= control <= CONTROL_RANGE[1]


def again(name: str) -> str:
    """What the second timing of a variant is called."""
    return f"{name} again"


def time_steps(
    variants: Mapping[str, Step],
    *,
    reference: str | None = None,
    rounds: int = MIN_ROUNDS,
    n_warmup: int = 0,
    clock: Callable[[Step], float] = cpu_seconds,
) -> Timings:
    """Times one step of every variant per round, in orders A B C A' and A' C B A in turn.

    A table whose control fails gets as many rounds again, once.

    Args:
        variants: What runs one step, by name.
        reference: The variant that is timed twice, as A and A'; by default the first.
        rounds: Number of rounds that count.
        n_warmup: Number of rounds before them, which a minimum needs only where the first rounds
            are not like the later ones.
        clock: Seconds of one step.
    """
    reference = reference or next(iter(variants))
    steps = {**variants, again(reference): variants[reference]}
    timings = Timings({name: [] for name in steps}, reference)
    _run(steps, rounds=n_warmup, clock=clock)
    for _ in range(2):
        for name, seconds in _run(steps, rounds=rounds, clock=clock).items():
            timings.seconds[name].extend(seconds)
        if timings.is_conclusive:
            break
    return timings


def _run(
    steps: Mapping[str, Step], *, rounds: int, clock: Callable[[Step], float]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name in list(steps)[:: -1 if index % 2 else 1]:
            seconds[name].append(clock(steps[name]))
    return seconds
