"""Speed of several versions of a network in each engine, against the first of them.

Versions take turns in one process, in an order that rotates. Tables show the median of ratios
within a round. Efficiency is the speed-up over the reduction of multiply-adds.
"""

import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from fitsmall.compressors.export.engines import ENGINES, session
from fitsmall.compressors.export.latency import forward_of, median_seconds
from fitsmall.compressors.export.onnx import write_onnx
from fitsmall.experiments.models.operations import operation_counter

__all__ = ["Turns", "multiply_adds", "speed_table"]


class Turns:
    """Seconds of functions that take turns.

    Args:
        runs: Functions by name.
        rounds: Number of turns.

    Attributes:
        seconds: Median seconds of a call in each round, by name.
    """

    def __init__(self, runs: Mapping[str, Callable[[], object]], rounds: int) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in runs}
        order = deque(runs)
        for _ in range(rounds):
            for name in order:
                self.seconds[name].append(median_seconds(runs[name], least=0.3))
            order.rotate(-1)

    def faster(self, name: str, than: str) -> list[float]:
        """Return how many times as fast a function is as another, in each round."""
        pairs = zip(self.seconds[than], self.seconds[name], strict=True)
        return [before / after for before, after in pairs]


def speed_table(
    title: str,
    networks: Mapping[str, nn.Module],
    images: Tensor,
    threads: int,
    rounds: int,
    engines: Iterable[str] = ("eager", "compiled", *ENGINES),
) -> Table:
    """Time networks in every engine.

    Args:
        title: Title of the table.
        networks: Networks in evaluation mode by name; the first is the one to compare with.
        images: A batch.
        threads: Threads of the engines.
        rounds: Turns of each network.
        engines: Names of engines.
    """
    first = next(iter(networks))
    flops = {name: multiply_adds(network, images) for name, network in networks.items()}
    table = Table(title=title, show_edge=False)
    for column in ("engine", "network", "x fewer multiply-adds", "ms", "x faster", "efficiency"):
        table.add_column(column, justify="left" if column in ("engine", "network") else "right")
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            runs = {
                name: _runner(engine, network, images, Path(folder) / f"{number}.onnx", threads)
                for number, (name, network) in enumerate(networks.items())
            }
            turns = Turns(runs, rounds)
            for name, seconds in turns.seconds.items():
                faster = statistics.median(turns.faster(name, first))
                fewer = flops[first] / flops[name]
                table.add_row(
                    engine,
                    name,
                    f"{fewer:.2f}",
                    f"{1000 * statistics.median(seconds):.1f}",
                    f"{faster:.2f}",
                    f"{faster / fewer:.2f}",
                )
    return table


def multiply_adds(network: nn.Module, images: Tensor) -> int:
    """Return the multiply-adds of a forward pass."""
    with operation_counter() as counter, torch.no_grad():
        network(images)
    return int(counter.get_total_flops())


def _runner(
    engine: str, network: nn.Module, images: Tensor, path: Path, threads: int
) -> Callable[[], object]:
    """Return a function that runs a batch in an engine."""
    if engine in ENGINES:
        write_onnx(network, path, (images,))
        run = session(engine, path, threads)
        return lambda: run((images,))
    return forward_of("torch" if engine == "eager" else engine, network, (images,), {})
