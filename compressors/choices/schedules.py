"""Schedules: progress in [0, 1] to strength in [0, 1], pure and stateless.

Progress is the fraction of a method's own window (from its start to its stop) that has passed;
strength multiplies what the method aims at, so a pruning target of 0.95 stands at sparsity
``0.95 * strength``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from fitsmall.compressors.naming import name_of

__all__ = [
    "Cosine",
    "Cubic",
    "Exponential",
    "Iterative",
    "LinearRamp",
    "OneShot",
    "Schedule",
    "as_schedule",
]

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class OneShot:
    """Full strength at once: ``s(t) = 1``.

    Example:
        >>> OneShot()(0.0)
        1.0
    """

    def __call__(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class LinearRamp:
    """Equal steps: ``s(t) = t``.

    Example:
        >>> LinearRamp()(0.25)
        0.25
    """

    def __call__(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cubic:
    """Fast first, slow at the end, when few weights are left: ``s(t) = 1 - (1 - t)^3``.

    Zhu and Gupta (2017), "To prune, or not to prune". The cube is of what *remains*; ``t^3``
    would do the opposite and take most weights at the very end.

    Example:
        >>> Cubic()(0.5)
        0.875
    """

    def __call__(self, progress: float) -> float:
        return 1.0 - (1.0 - progress) ** 3


@dataclass(frozen=True)
class Cosine:
    """Slow at both ends: ``s(t) = (1 - cos(pi t)) / 2``.

    Example:
        >>> round(Cosine()(0.25), 4)
        0.1464
    """

    def __call__(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Exponential:
    """The same factor in equal times: ``s(t) = first^(1 - t)``.

    Args:
        first: Strength at the beginning, in (0, 1].

    Example:
        >>> [round(Exponential(first=0.01)(t), 4) for t in (0.0, 0.5, 1.0)]
        [0.01, 0.1, 1.0]
    """

    first: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 < self.first <= 1.0:
            raise ValueError(f"Exponential starts above 0 and not above 1, got first={self.first}")

    def __call__(self, progress: float) -> float:
        return float(self.first ** (1.0 - progress))


@dataclass(frozen=True)
class Iterative:
    """Prune, fine-tune, prune again: ``s(t) = (floor(t R) + 1) / R``, at most 1.

    Each of the ``R`` rounds strengthens once at its beginning and fine-tunes for the rest, the
    loop of Han et al. (2015), "Learning both weights and connections".

    Args:
        rounds: Number of rounds ``R``, at least 1.

    Example:
        >>> [Iterative(rounds=4)(t) for t in (0.0, 0.2, 0.25, 0.8, 1.0)]
        [0.25, 0.25, 0.5, 1.0, 1.0]
    """

    rounds: int = 5

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"Iterative needs at least 1 round, got rounds={self.rounds}")

    def __call__(self, progress: float) -> float:
        return min(1.0, (math.floor(progress * self.rounds) + 1) / self.rounds)


def as_schedule(value: Schedule) -> Schedule:
    """The schedule itself, any function of progress, checked at its beginning, middle and end.

    Raises:
        TypeError: It is no function, or a class instead of an object, or returns no number.
        ValueError: It returns a number outside [0, 1].

    Example:
        >>> as_schedule(Cubic())
        Cubic()
        >>> as_schedule(math.exp)
        Traceback (most recent call last):
        ValueError: schedule exp must return a strength in [0, 1], not 1.6487212707001282 at 0.5
    """
    if isinstance(value, type):
        raise TypeError(f"a schedule is an object, {value.__name__}(), not the class")
    if not callable(value):
        raise TypeError(f"a schedule is a function of progress, as Cubic() is, got {value!r}")
    for progress in (0.0, 0.5, 1.0):
        strength = value(progress)
        must = f"schedule {name_of(value)} must return a strength in [0, 1]"
        if not isinstance(strength, Real):
            raise TypeError(f"{must}, not {strength!r}")
        if not 0 <= strength <= 1:
            raise ValueError(f"{must}, not {strength} at {progress:g}")
    return value
