"""Export of a quantized network as ONNX, with integer weights and inputs."""

import copy
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fitsmall.compressors.export.engines import ENGINES, session
from fitsmall.compressors.export.folding import fold_norms_
from fitsmall.compressors.export.integer import (
    LAYERS,
    OPSET,
    add_biases_after_,
    float_copy,
    to_integers_,
)
from fitsmall.compressors.extras import install_command
from fitsmall.compressors.torch_internals import require, tensors_in

__all__ = ["Agreement", "Export", "export_onnx", "unquantized", "write_onnx"]


@dataclass(frozen=True)
class Agreement:
    """The agreement of an engine's outputs with those of the module in float32.

    Args:
        difference: Largest difference of an output, relative to the largest output.
        equal: Fraction of examples with equal predictions (the index of the largest output).

    Example:
        >>> print(Agreement(difference=0.0131, equal=0.995))
        99.50 % of the predictions are equal, outputs differ by 0.013 of the largest
    """

    difference: float
    equal: float

    def __str__(self) -> str:
        return (
            f"{100 * self.equal:.2f} % of the predictions are equal, outputs differ by "
            f"{self.difference:.2g} of the largest"
        )


@dataclass(frozen=True)
class Export:
    """An exported file, and its agreement with the module in float32.

    Args:
        path: The ONNX file.
        bytes: Its size.
        integer: Names of layers with integer weights and quantized inputs.
        floating: Names of other layers with weights, which stay in float32.
        agreement: Agreement of each installed engine, by name.
    """

    path: Path
    bytes: int
    integer: tuple[str, ...]
    floating: tuple[str, ...]
    agreement: dict[str, Agreement]

    def table(self, examples: int) -> str:
        """Return a description of the file in a few lines.

        Args:
            examples: Number of examples that were compared.
        """
        floating = f"; in float: {', '.join(self.floating)}" if self.floating else ""
        lines = [
            f"{self.path}: {self.bytes:,} bytes",
            f"integer layers: {len(self.integer)} ({', '.join(self.integer)}){floating}",
        ]
        for engine, (_, extra) in ENGINES.items():
            if engine in self.agreement:
                agreement = self.agreement[engine]
                lines.append(f"{engine} against the module, on {examples:,} examples: {agreement}")
            else:
                lines.append(f"{engine}: not verified, {install_command(extra)}")
        return "\n".join(lines)


@torch.no_grad()
def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    examples: Tensor | tuple[Tensor, ...],
    opset: int = 18,
) -> Export:
    """Write a quantized module as ONNX, and verify that its outputs agree with the module's.

    The file is run in onnxruntime, and in OpenVINO if that is installed.

    Args:
        module: Module that was trained with
            :class:`~fitsmall.callbacks.QuantizationAwareTraining`, or restored from its file.
        path: File to write. It is created only if the outputs agree.
        examples: Real inputs, a tensor for each argument of the forward, with examples in the
            first dimension; the file accepts any number of examples.
        opset: Version of ONNX's operators, 13 or above.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: No layer is quantized, the opset is too old, an engine cannot read the file, or
            its outputs differ from the module's.
    """
    require("export_onnx")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ImportError(f"exporting needs {install_command('onnx')}") from error
    if opset < OPSET:
        raise ValueError(f"opset {opset} has no scales for each channel: choose {OPSET} or above")
    inputs = examples if isinstance(examples, tuple) else (examples,)
    inputs = tuple(x.detach().cpu() for x in inputs)
    quantized = copy.deepcopy(module).cpu().float().eval()
    expected = tensors_in(quantized(*inputs))
    integer = to_integers_(quantized)
    if not integer:
        raise ValueError(
            f"{type(module).__name__} has no layer with integer weights and quantized inputs to "
            "export: train it with QuantizationAwareTraining past its start, with activation_bits, "
            "or restore a file that was"
        )
    floats = tensors_in(float_copy(quantized)(*inputs))
    fold_norms_(quantized, inputs)
    folded = tensors_in(float_copy(quantized)(*inputs))
    if not _compared(floats, folded).difference < _EXACT:
        raise ValueError(
            f"{path} was not written, since folding batch-norm into the layers before it changed "
            "the outputs: please report this"
        )
    layers = {name for name, layer in quantized.named_modules() if isinstance(layer, LAYERS)}
    add_biases_after_(quantized)
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "made.onnx"
        write_onnx(quantized, made, inputs, opset)
        agreement = {}
        for engine in ENGINES:
            try:
                run = session(engine, made, torch.get_num_threads())
            except ImportError:  # Export.table says so
                continue
            agreement[engine] = found = _compared(expected, run(inputs))
            if not (found.difference < _TOLERANCE and found.equal >= _AGREEMENT):
                raise ValueError(
                    f"{path} was not written, since in {engine} {found}: does the forward depend "
                    "on more than its inputs? Or do sums of 8-bit products saturate, as they may "
                    "on a processor without VNNI? Weights of 7 bits never do."
                )
        os.replace(made, path)
    floating = tuple(sorted(layers - set(integer)))
    return Export(path, path.stat().st_size, tuple(integer), floating, agreement)


def write_onnx(
    module: nn.Module, path: str | os.PathLike[str], inputs: tuple[Tensor, ...], opset: int = 18
) -> None:
    """Write a module as ONNX as it is, for any number of examples.

    Args:
        module: The module.
        path: File to write.
        inputs: A tensor for each argument of the forward, with examples in the first dimension.
        opset: Version of ONNX's operators.
    """
    batch = torch.export.Dim("batch")
    with _quietly():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:  # where in the source each comes from
        node.metadata_props.clear()
    program.save(path)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporter's remarks on its own classes, and on packages that are not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def unquantized(module: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Return a float32 network to compare the speed of :func:`export_onnx`'s file with.

    Its weights have the same values and its batch-norms are folded too, but inputs are not rounded.

    Args:
        module: Quantized module; it stays as it is.
        inputs: A tensor for each argument of the forward, with examples in the first dimension.
    """
    quantized = copy.deepcopy(module).cpu().float().eval()
    to_integers_(quantized)
    fold_norms_(quantized, inputs)
    return float_copy(quantized)


# Sums in another order may round an input to the next level, and change later layers by more.
_TOLERANCE, _AGREEMENT = 0.2, 0.99

# Folding is exact up to rounding errors.
_EXACT = 1e-3


def _compared(expected: list[Tensor], found: list[Tensor]) -> Agreement:
    difference, equal = 0.0, 1.0
    for mine, theirs in zip(expected, found, strict=True):
        if mine.shape != theirs.shape:
            return Agreement(float("inf"), 0.0)
        apart = float((mine - theirs).abs().max()) / (float(mine.abs().max()) or 1.0)
        difference = apart if math.isnan(apart) else max(difference, apart)
        if mine.dim() > 1:
            same = mine.flatten(1).argmax(1) == theirs.flatten(1).argmax(1)
            equal = min(equal, float(same.float().mean()))
    return Agreement(difference, equal)
