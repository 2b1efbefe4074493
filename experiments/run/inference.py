"""Time and memory of an exported network in each engine, in float32 and in integers; in OpenVINO
also in bfloat16, where the processor has instructions for it.

fitsmall bench RUN/model.onnx [--batch 8] [--threads 1] [--rounds 15]

The float32 network has the same weights, and its batch-norms are folded as well. Each row of the
table is a process of its own; all of them are alive at once and have a turn in each round, in an
order that rotates, so that a busy machine slows all alike. What counts is the median over rounds,
of the time of a batch and of its ratios within a round.

Memory is what the process needs beyond an engine that has run a tiny network, at its highest: while
it loads the network, compiles it and runs batches (Linux's VmHWM).
"""

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fitsmall.compressors.export.engines import ENGINES, Run, session
from fitsmall.compressors.export.onnx import unquantized, write_onnx
from fitsmall.experiments.benchmarks.large import peak, reset_peak

__all__ = ["bench"]

EAGER, COMPILED = "eager", "compiled"
TURN = 0.2  # seconds, in which at least one batch runs


class Row(NamedTuple):
    """An engine, ``"fp32"``, ``"bf16"`` or ``"int8"``, and the file that it loads."""

    engine: str
    precision: str
    file: Path


def bench(
    file: Path, module: nn.Module, images: Tensor, batch: int, threads: int, rounds: int
) -> Table:
    """Time a network in every engine, a row each; ``x`` says how many times as fast it is.

    Args:
        file: The integer network that :func:`~fitsmall.compressors.export.onnx.export_onnx` wrote.
        module: The module that it was made of.
        images: Inputs, which are repeated to fill a batch.
        batch: Examples that run at once.
        threads: Threads that compute.
        rounds: Turns of each engine.

    Raises:
        ValueError: One of the numbers is less than 1.
    """
    if min(batch, threads, rounds) < 1:
        raise ValueError(
            f"batch, threads and rounds are 1 or more, and got {batch}, {threads} and {rounds}"
        )
    inputs = images[torch.arange(batch) % len(images)]
    processor = Path("/proc/cpuinfo").read_text()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        networks = {"tiny": nn.Linear(1, 1).eval(), "float": unquantized(module, (inputs,))}
        for (name, network), x in zip(networks.items(), (torch.ones(2, 1), inputs), strict=True):
            torch.save(network, Path(folder) / f"{name}.pt")
            write_onnx(network, Path(folder) / f"{name}.onnx", (x,))
        rows = [Row(engine, "fp32", Path(folder) / "float.pt") for engine in (EAGER, COMPILED)]
        for engine in ENGINES:
            rows.append(Row(engine, "fp32", Path(folder) / "float.onnx"))
            if engine == "OpenVINO" and "bf16" in processor:
                rows.append(Row(engine, "bf16", Path(folder) / "float.onnx"))
            rows.append(Row(engine, "int8", file))
        pools, memory, size, failed = {}, {}, {}, {}
        for row in rows:
            pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            try:
                tiny = Path(folder) / f"tiny{row.file.suffix}"
                memory[row] = pool.submit(_load, row, tiny, inputs, threads).result()
            except (ImportError, RuntimeError) as error:
                failed[row] = escape(" ".join(str(error).split()))
                continue
            pools[row], size[row] = pool, row.file.stat().st_size
        seconds: dict[Row, list[float]] = {row: [] for row in pools}
        order = deque(pools)
        for _ in range(rounds):
            for row in order:
                seconds[row].append(pools[row].submit(_turn).result())
            order.rotate(-1)

    vnni = "yes" if "vnni" in processor else "no"
    table = Table(
        title=f"{escape(str(file))}, batch: {batch}, threads: {threads}, VNNI: {vnni}",
        caption="\n".join(dict.fromkeys(failed.values())),
        show_edge=False,  # fits into 80 columns
    )
    columns = ("ms", "images/s", "MB", "bytes", "x fp32", "x eager")
    for column in ("engine", "", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    baseline = {row.engine: times for row, times in seconds.items() if row.precision == "fp32"}
    for row in rows:
        if row in failed:
            table.add_row(row.engine, row.precision, "failed")
            continue
        latency = statistics.median(seconds[row])
        table.add_row(
            row.engine,
            row.precision,
            f"{1000 * latency:.4g}",
            f"{batch / latency:,.0f}",
            f"{memory[row] / 1e6:.0f}",
            f"{size[row]:,}",
            *(_ratio(baseline.get(engine), seconds[row]) for engine in (row.engine, EAGER)),
        )
    return table


def _ratio(reference: list[float] | None, seconds: list[float]) -> str:
    if reference is None:
        return ""
    ratios = [theirs / mine for theirs, mine in zip(reference, seconds, strict=True)]
    return f"{statistics.median(ratios):.2f}"


# In the process of a row.
_run: Run
_inputs: Tensor


def _load(row: Row, tiny: Path, inputs: Tensor, threads: int) -> int:
    """Load a row's network, and run it; the bytes of memory that this took."""
    global _run, _inputs
    _inputs = inputs
    try:
        _session(row, tiny, threads)((torch.ones(2, 1),))
        before = reset_peak()
        _run = _session(row, row.file, threads)
        for _ in range(3):
            _run((inputs,))
    except ImportError:
        raise
    except Exception as error:  # each engine raises its own, and not all can be sent
        raise RuntimeError(f"{row.engine}, {row.precision}: {error}") from error
    return peak() - before


def _turn() -> float:
    """Seconds of a batch, the median of a turn, after one that warms the caches."""
    _run((_inputs,))
    seconds: list[float] = []
    while sum(seconds) < TURN:
        start = time.perf_counter()
        _run((_inputs,))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _session(row: Row, path: Path, threads: int) -> Run:
    if row.engine in ENGINES:
        return session(row.engine, path, threads, exact=row.precision != "bf16")
    torch.set_num_threads(threads)
    module = torch.load(path, weights_only=False)
    if row.engine == COMPILED:
        module.compile()

    @torch.inference_mode()
    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        return tree_leaves(module(*inputs))

    return run
