"""Time and memory of an exported network in each engine: ``fitsmall bench RUN/model.onnx``.

Engines run the network in float32 and in integers, OpenVINO also in bfloat16 if the processor has
instructions for it. The float32 network has the same weights, with batch-norms folded.

Each row of the table is a process. All of them live at the same time and take turns, in an order
that rotates from round to round, so that a busy machine slows all alike. The table shows medians
over rounds: of the time of a batch, and of the ratio of times within a round.

Memory is the peak of the process while it loads the network, compiles it and runs batches (Linux's
VmHWM), above the memory of the same engine after it has run a tiny network.
"""

import statistics
import tempfile
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
from fitsmall.compressors.timing import median_seconds
from fitsmall.experiments.cli.process_memory import peak_memory, reset_peak_memory

__all__ = ["bench"]

EAGER, COMPILED = "eager", "compiled"


class Row(NamedTuple):
    """An engine, ``"fp32"``, ``"bf16"`` or ``"int8"``, and the file that it loads."""

    engine: str
    precision: str
    file: Path


class Measurement(NamedTuple):
    """Seconds of a batch in each round, bytes of peak memory, and bytes of the file."""

    seconds: list[float]
    memory: int
    size: int


def bench(
    file: Path, module: nn.Module, images: Tensor, batch: int, threads: int, rounds: int
) -> Table:
    """Time a network in every engine.

    Args:
        file: Integer network that :func:`~fitsmall.compressors.export.onnx.export_onnx` wrote.
        module: Module that it was exported from.
        images: Inputs, repeated to fill a batch.
        batch: Examples in a batch.
        threads: Threads of each process.
        rounds: Turns of each process.

    Returns:
        A row for each engine and precision. Columns named ``x ...`` say how many times as fast it
        is; below the table stand the errors of engines that failed.

    Raises:
        ValueError: ``batch``, ``threads`` or ``rounds`` is less than 1.
    """
    if min(batch, threads, rounds) < 1:
        raise ValueError(
            f"batch, threads and rounds must be 1 or more; got {batch}, {threads} and {rounds}"
        )
    inputs = images[torch.arange(batch) % len(images)]
    processor = Path("/proc/cpuinfo").read_text()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        networks = {"tiny": nn.Linear(1, 1).eval(), "float": unquantized(module, (inputs,))}
        for (name, network), x in zip(networks.items(), (torch.ones(2, 1), inputs), strict=True):
            torch.save(network, folder / f"{name}.pt")
            write_onnx(network, folder / f"{name}.onnx", (x,))
        rows = [Row(engine, "fp32", folder / "float.pt") for engine in (EAGER, COMPILED)]
        for engine in ENGINES:
            rows.append(Row(engine, "fp32", folder / "float.onnx"))
            if engine == "OpenVINO" and "bf16" in processor:
                rows.append(Row(engine, "bf16", folder / "float.onnx"))
            rows.append(Row(engine, "int8", file))
        measured, errors = _measure(rows, folder, inputs, threads, rounds)
    vnni = "yes" if "vnni" in processor else "no"
    table = Table(
        title=f"{escape(str(file))}, batch: {batch}, threads: {threads}, VNNI: {vnni}",
        caption="\n".join(dict.fromkeys(errors)),
        show_edge=False,  # fits into 80 columns
    )
    columns = ("ms", "images/s", "MB", "bytes", "x fp32", "x eager")
    for column in ("engine", "", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    float32 = {row.engine: m.seconds for row, m in measured.items() if row.precision == "fp32"}
    for row in rows:
        if row not in measured:
            table.add_row(row.engine, row.precision, "failed")
            continue
        seconds, memory, size = measured[row]
        latency = statistics.median(seconds)
        table.add_row(
            row.engine,
            row.precision,
            f"{1000 * latency:.4g}",
            f"{batch / latency:,.0f}",
            f"{memory / 1e6:.0f}",
            f"{size:,}",
            *(_speedup(float32.get(engine), seconds) for engine in (row.engine, EAGER)),
        )
    return table


def _measure(
    rows: Sequence[Row], folder: Path, inputs: Tensor, threads: int, rounds: int
) -> tuple[dict[Row, Measurement], list[str]]:
    """Start a process for each row and let them take turns; also the errors of rows that failed."""
    pools, memory, errors = {}, {}, []
    # The server imports torch once, and all processes are forked from it.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ExitStack() as stack:
        for row in rows:
            pool = stack.enter_context(ProcessPoolExecutor(1, context))
            try:
                tiny = folder / f"tiny{row.file.suffix}"
                memory[row] = pool.submit(_load, row, tiny, inputs, threads).result()
            except (ImportError, RuntimeError) as error:
                errors.append(escape(" ".join(str(error).split())))
            else:
                pools[row] = pool
        seconds: dict[Row, list[float]] = {row: [] for row in pools}
        order = deque(pools)
        for _ in range(rounds):
            for row in order:
                seconds[row].append(pools[row].submit(_take_turn).result())
            order.rotate(-1)
    measured = {
        row: Measurement(seconds[row], memory[row], row.file.stat().st_size) for row in pools
    }
    return measured, errors


def _speedup(reference: list[float] | None, seconds: list[float]) -> str:
    if reference is None:
        return ""
    ratios = [theirs / mine for theirs, mine in zip(reference, seconds, strict=True)]
    return f"{statistics.median(ratios):.2f}"


# State of a row's process.
_run: Run
_inputs: Tensor


def _load(row: Row, tiny: Path, inputs: Tensor, threads: int) -> int:
    """Load a row's network and run it.

    Returns:
        Peak memory above that of the tiny network, in bytes.
    """
    global _run, _inputs
    _inputs = inputs
    try:
        _open(row, tiny, threads)((torch.ones(2, 1),))
        before = reset_peak_memory()
        _run = _open(row, row.file, threads)
        for _ in range(3):
            _run((inputs,))
    except ImportError:
        raise
    except Exception as error:  # engines have exceptions of their own, not all can be pickled
        raise RuntimeError(f"{row.engine}, {row.precision}: {error}") from error
    return peak_memory() - before


def _take_turn() -> float:
    return median_seconds(lambda: _run((_inputs,)))


def _open(row: Row, path: Path, threads: int) -> Run:
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
