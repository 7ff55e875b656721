"""How coefficients change while a model trains; shared by all plug-ins."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import override


@dataclass(frozen=True)
class Schedule(ABC):
    """A factor in [0, 1] as a function of the training's progress.

    One of your own is a subclass with the method `factor`.
    """

    @abstractmethod
    def factor(self, progress: float) -> float:
        """The factor at a progress between 0 (first step) and 1 (end of the training)."""

    def __call__(self, progress: float) -> float:
        """The factor at this progress.

        Raises:
            ValueError: The progress lies outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"The progress of a training lies in [0, 1], but got {progress}.")
        return self.factor(progress)


@dataclass(frozen=True)
class Constant(Schedule):
    """Always 1."""

    @override
    def factor(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class _Between(Schedule):
    """What changes between two points of the training and is constant before and after.

    Args:
        begin: Progress at which the change begins.
        end: Progress at which it is complete.

    Raises:
        ValueError: Not ``0 <= begin < end <= 1``.
    """

    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(
                "A schedule must have 0 <= begin < end <= 1, as shares of the training, but got "
                f"begin={self.begin}, end={self.end}."
            )

    def _share(self, progress: float) -> float:
        return min(1.0, max(0.0, (progress - self.begin) / (self.end - self.begin)))


@dataclass(frozen=True)
class Ramp(_Between):
    """0, then a line up, then 1: the penalty waits until the attention has followed the data.

    ``(p - begin) / (end - begin)``, clipped to [0, 1], at progress p.

    Args:
        begin: Progress up to which the factor is 0.
        end: Progress from which it is 1.

    Raises:
        ValueError: Not ``0 <= begin < end <= 1``.

    Example:
        >>> [Ramp(0.25, 0.75)(progress) for progress in (0.0, 0.5, 1.0)]
        [0.0, 0.5, 1.0]
    """

    begin: float = 0.2
    end: float = 0.6

    @override
    def factor(self, progress: float) -> float:
        return self._share(progress)


@dataclass(frozen=True)
class Linear(_Between):
    """1, then a line down, then 0: ``1 - (p - begin) / (end - begin)``, clipped, at progress p.

    Args:
        begin: Progress up to which the factor is 1.
        end: Progress from which it is 0.

    Raises:
        ValueError: Not ``0 <= begin < end <= 1``.
    """

    @override
    def factor(self, progress: float) -> float:
        return 1 - self._share(progress)


@dataclass(frozen=True)
class Cosine(_Between):
    """1, then half a cosine down, then 0: ``(1 + cos(pi s)) / 2`` at the share s of the way.

    Args:
        begin: Progress up to which the factor is 1.
        end: Progress from which it is 0.

    Raises:
        ValueError: Not ``0 <= begin < end <= 1``.

    Source: AEM (arXiv 2406.15303), "cosine weight annealing"; the paper has the words only.
    """

    @override
    def factor(self, progress: float) -> float:
        return (1 + math.cos(math.pi * self._share(progress))) / 2


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "ramp": Ramp,
    "linear": Linear,
    "cosine": Cosine,
}


def as_schedule(schedule: Schedule | str) -> Schedule:
    """A schedule by its name, ``constant``, ``ramp``, ``linear`` or ``cosine``, or as it is.

    Raises:
        ValueError: There is no schedule of this name.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(
            f"A schedule must be one of {', '.join(SCHEDULES)}, or a Schedule, but got "
            f"'{schedule}'."
        )
    return SCHEDULES[schedule]()


def warmed_up(decay: float, n_updates: int) -> float:
    """The EMA factor of one update that follows early, fast-changing weights.

    ``min(decay, (1 + t) / (10 + t))`` before the t-th update, counted from 0.

    Args:
        decay: The factor that is reached in the end.
        n_updates: How many updates have been made.
    """
    return min(decay, (1 + n_updates) / (10 + n_updates))
