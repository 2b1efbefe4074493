"""Timing: the seconds of functions that take turns, so that a busy machine slows all alike."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping

__all__ = ["interleaved", "median_seconds"]


def median_seconds(run: Callable[[], object], least: float = 0.2) -> float:
    """Median duration of a call, after one call that warms caches up.

    Args:
        run: Function to time.
        least: Seconds to repeat it for; it is called at least once.
    """
    run()
    seconds: list[float] = []
    total = 0.0
    while total < least or not seconds:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        total += seconds[-1]
    return statistics.median(seconds)


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int = 11, least: float = 0.002
) -> dict[str, list[float]]:
    """Return the median duration of a call of each function, in each of some rounds.

    The functions take turns, in an order that rotates. Compare two of them by their ratios within
    rounds.

    Args:
        runs: Functions by name.
        rounds: Turns of each.
        least: Seconds of a turn; the function is called at least once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = deque(runs)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(median_seconds(runs[name], least))
        order.rotate(-1)
    return seconds
