"""Speed of several versions of a network in each engine, against the first of them.

Versions take turns in one process, in an order that rotates. Tables show the median of ratios
within a round. Efficiency is the speed-up over the reduction of multiply-adds.
"""

import statistics
from collections.abc import Iterable, Mapping

import torch
from rich.table import Table
from torch import Tensor, nn

from fitsmall.compressors.export.latency import LATENCY_ENGINES, forward_of
from fitsmall.compressors.timing import interleaved
from fitsmall.experiments.models.operations import operation_counter

__all__ = ["TURN", "multiply_adds", "speed_table", "times_as_fast"]

# Seconds of a turn.
TURN = 0.3


def times_as_fast(seconds: Mapping[str, list[float]], name: str, than: str) -> list[float]:
    """Return how many times as fast a function is as another, in each round."""
    return [before / after for before, after in zip(seconds[than], seconds[name], strict=True)]


def speed_table(
    title: str,
    networks: Mapping[str, nn.Module],
    images: Tensor,
    rounds: int,
    engines: Iterable[str] = tuple(LATENCY_ENGINES),
) -> Table:
    """Time networks in engines, with torch's number of threads.

    Args:
        title: Title of the table.
        networks: Networks in evaluation mode by name; the first is the one to compare with.
        images: A batch.
        rounds: Turns of each network.
        engines: Names among :data:`~fitsmall.compressors.export.latency.LATENCY_ENGINES`.
    """
    first = next(iter(networks))
    flops = {name: multiply_adds(network, images) for name, network in networks.items()}
    table = Table(title=title, show_edge=False)
    for column in ("engine", "network", "x fewer multiply-adds", "ms", "x faster", "efficiency"):
        table.add_column(column, justify="left" if column in ("engine", "network") else "right")
    for engine in engines:
        runs = {n: forward_of(engine, own, (images,), {}) for n, own in networks.items()}
        seconds = interleaved(runs, rounds, TURN)
        for name, mine in seconds.items():
            faster = statistics.median(times_as_fast(seconds, name, first))
            fewer = flops[first] / flops[name]
            table.add_row(
                engine,
                name,
                f"{fewer:.2f}",
                f"{1000 * statistics.median(mine):.1f}",
                f"{faster:.2f}",
                f"{faster / fewer:.2f}",
            )
    return table


def multiply_adds(network: nn.Module, images: Tensor) -> int:
    """Return the multiply-adds of a forward pass."""
    with operation_counter() as counter, torch.no_grad():
        network(images)
    return int(counter.get_total_flops())
