"""Time of a network whose zeros are skipped: ``fitsmall bench --sparse RUN/model.fitsmall``.

The rivals are the dense network in torch, and in OpenVINO in float32 and in integers of 8 bits, for
which the command quantizes a copy: its speed is what is asked for here, not its accuracy. All take
turns in one process, in an order that rotates from round to round.
"""

import copy
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fitsmall.compressors import Quantize, compress
from fitsmall.compressors.export.engines import session
from fitsmall.compressors.export.onnx import export_onnx, unquantized, write_onnx
from fitsmall.compressors.kernels import Choices, accelerate
from fitsmall.compressors.surgery.quantizers import attach_quantizer, takes_quantizer
from fitsmall.compressors.timing import interleaved

__all__ = ["Comparison", "compare", "integer_network", "sparse_bench"]

DENSE, ACCELERATED = "torch, dense", "torch, accelerated"
FLOAT, INTEGER = "OpenVINO, float32", "OpenVINO, int8"


@dataclass(frozen=True)
class Comparison:
    """Times of a network and its rivals.

    Args:
        choices: The kernel of each layer.
        seconds: Seconds of a batch in each round, by rival.
        missing: A line on each rival that cannot run.
    """

    choices: Choices
    seconds: Mapping[str, Sequence[float]]
    missing: Sequence[str]

    def ratios(self, rival: str) -> list[float]:
        """Speed of the accelerated network over that of a rival, in each round."""
        pairs = zip(self.seconds[rival], self.seconds[ACCELERATED], strict=True)
        return [theirs / mine for theirs, mine in pairs]

    def __str__(self) -> str:
        """Return the table of kernels, and a line for each rival."""
        lines = []
        for rival, seconds in self.seconds.items():
            ratios = self.ratios(rival)
            lines.append(
                f"{rival:<19} {1000 * statistics.median(seconds):9.3f} ms; accelerated is "
                f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
                f"{max(ratios):.2f})"
            )
        return "\n".join([str(self.choices), "", *lines, *self.missing])


def sparse_bench(
    module: nn.Module, images: Tensor, batch: int, threads: int, rounds: int
) -> Comparison:
    """Time a network on a batch, filled by repeating images; see :func:`compare`.

    Raises:
        ValueError: ``batch``, ``threads`` or ``rounds`` is less than 1.
    """
    if min(batch, threads, rounds) < 1:
        raise ValueError(
            f"batch, threads and rounds must be 1 or more; got {batch}, {threads} and {rounds}"
        )
    return compare(module, images[torch.arange(batch) % len(images)], threads, rounds)


def compare(
    module: nn.Module, inputs: Tensor, threads: int, rounds: int = 11, least: float = 0.02
) -> Comparison:
    """Time a network, its accelerated copy, and OpenVINO.

    Args:
        module: The network. Its batch-norms are folded, and its inputs are not rounded, but for
            OpenVINO's integers.
        inputs: A batch.
        threads: Threads of torch and of OpenVINO.
        rounds: Turns of each.
        least: Seconds of a turn.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dense = unquantized(module, inputs)
        fast = accelerate(dense, inputs)
        runs: dict[str, Callable[[], object]] = {
            DENSE: lambda: dense(inputs),
            ACCELERATED: lambda: fast(inputs),
        }
        missing = []
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for name, write in ((FLOAT, write_onnx), (INTEGER, _write_integers)):
                path = Path(folder) / f"{len(runs)}.onnx"
                try:
                    write(dense, path, inputs)
                    run = session("OpenVINO", path, threads)
                except (ImportError, ValueError) as error:
                    missing.append(f"{name}: not measured. {error}")
                    continue
                runs[name] = lambda run=run: run((inputs,))  # type: ignore[misc]
            seconds = interleaved(runs, rounds, least)
    finally:
        torch.set_num_threads(before)
    return Comparison(fast.choices, seconds, missing)  # type: ignore[arg-type]


@torch.no_grad()
def integer_network(module: nn.Module, inputs: Tensor) -> nn.Module:
    """Return a copy with weights and inputs of 8 bits, whose ranges are those of a batch.

    Args:
        module: The network.
        inputs: The batch.

    Example:
        >>> net = integer_network(nn.Linear(2, 2).eval(), torch.ones(3, 2))
        >>> net.input_quantizer.active
        True
    """
    net = copy.deepcopy(module)
    quantizers = [attach_quantizer(layer, 8) for layer in net.modules() if takes_quantizer(layer)]
    for quantizer in quantizers:
        quantizer.observing, quantizer.active = True, False
    net(inputs)
    for quantizer in quantizers:
        quantizer.commit()
        quantizer.observing, quantizer.active = False, True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "compress: nothing makes up")  # it is for speed alone
        compress(net, {"*": Quantize(8)})
    return net


def _write_integers(module: nn.Module, path: Path, inputs: Tensor) -> None:
    export_onnx(integer_network(module, inputs), path, inputs, engines=())
