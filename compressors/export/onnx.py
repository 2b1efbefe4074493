"""Export of a quantized network as ONNX, with integer weights and inputs."""

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fitsmall.compressors.export.agreement import Agreement, agreement_of, sensitivity
from fitsmall.compressors.export.engines import ENGINES, session
from fitsmall.compressors.export.folding import fold_norms_
from fitsmall.compressors.export.integer import (
    OPSET,
    add_biases_after_,
    float_copy,
    to_integers_,
)
from fitsmall.compressors.export.tracing import (
    PREFIX,
    Arguments,
    Examples,
    cause_of,
    outputs_of,
    trace,
)
from fitsmall.compressors.extras import install_command
from fitsmall.compressors.surgery.quantizers import takes_quantizer
from fitsmall.compressors.torch_internals import has_vnni, require
from fitsmall.compressors.weights import detach_computed_

__all__ = ["Export", "export_onnx", "fused", "unquantized", "write_onnx"]


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

    def table(self) -> str:
        """Return a description of the file in a few lines."""
        floating = f"; in float: {', '.join(self.floating)}" if self.floating else ""
        lines = [
            f"{self.path}: {self.bytes:,} bytes",
            f"integer layers: {len(self.integer)} ({', '.join(self.integer)}){floating}",
        ]
        for engine, (_, extra) in ENGINES.items():
            if engine in self.agreement:
                lines.append(f"{engine} against the module: {self.agreement[engine]}")
            else:
                lines.append(f"{engine}: not verified, {install_command(extra)}")
        return "\n".join(lines)


@torch.no_grad()
def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    examples: Examples,
    opset: int = 18,
    weight_bits: int = 8,
    engines: Sequence[str] = tuple(ENGINES),
) -> Export:
    """Write a quantized module as ONNX, and verify that its outputs agree with the module's.

    The file is run in onnxruntime and OpenVINO, if they are installed. Of outputs in tuples,
    dictionaries and the classes of Hugging Face, the tensors count, in order.

    Args:
        module: Module that was trained with
            :class:`~fitsmall.callbacks.QuantizationAwareTraining`, or restored from its file.
        path: File to write. It is created only if the outputs agree.
        examples: Real inputs with examples in the first dimension: a tensor, a tuple with one for
            each argument of the forward, or a mapping from names of arguments,
            ``{"input_ids": ids, "attention_mask": mask}``. The file has inputs of these names, and
            accepts any number of examples.
        opset: Version of ONNX's operators, 13 or above.
        weight_bits: Most bits of a weight in the file. Weights of more are rounded to this many;
            the module stays as it is. With 7, sums of products fit into the 16 bits in which a
            processor without VNNI adds them.
        engines: Engines that must agree, of :data:`~fitsmall.compressors.export.engines.ENGINES`.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: No layer is quantized, the opset is too old, the forward cannot be traced, an
            engine cannot read the file, or its outputs differ from the module's.
    """
    require("export_onnx")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ImportError(f"exporting needs {install_command('onnx')}") from error
    if opset < OPSET:
        raise ValueError(f"opset {opset} has no scales for each channel: choose {OPSET} or above")
    if weight_bits not in range(2, 9):
        raise ValueError(
            f"weights in the file are of 2 to 8 bits, and got weight_bits={weight_bits}"
        )
    if unknown := [engine for engine in engines if engine not in ENGINES]:
        raise ValueError(f"unknown engine {unknown[0]!r}, choose among {', '.join(ENGINES)}")
    rounding = _copied(module)
    quantized = copy.deepcopy(rounding)
    integer = to_integers_(quantized, weight_bits)
    if not integer:
        raise ValueError(
            f"{type(module).__name__} has no layer with integer weights and quantized inputs to "
            "export: train it with QuantizationAwareTraining past its start, with activation_bits "
            "and granularity='channel'; or compress(module, Quantize(8), data=loader, "
            "activation_bits=8); or restore the file of either. Inputs of other layers than "
            "Linear, convolutions and Conv1D are not quantized"
        )
    arguments = Arguments.of(examples)
    expected = outputs_of(rounding, arguments)
    if not expected:
        raise ValueError(f"the forward of {type(module).__name__} returns no tensors to compare")
    if not agreement_of(expected, outputs_of(rounding, arguments)).difference < _EXACT:
        raise ValueError(
            f"{path} was not written, since the forward of {type(module).__name__} returns NaN, or "
            "other outputs each time: it must depend on nothing but its inputs"
        )
    tolerance = max(_TOLERANCE, 2 * sensitivity(rounding, arguments, expected))
    layers = {name for name, layer in quantized.named_modules() if takes_quantizer(layer)}
    quantized = fused(quantized, arguments)
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "made.onnx"
        write_onnx(quantized, made, examples, opset)
        names = arguments.names(quantized)
        agreement, failures = _run(engines, made, names, arguments, expected, tolerance)
        if failures:
            remedy = _remedy(list(agreement), "cannot run it" in failures[0], weight_bits)
            raise ValueError(f"{path} was not written, since {failures[0]}. {remedy}")
        os.replace(made, path)
    floating = tuple(sorted(layers - set(integer)))
    return Export(path, path.stat().st_size, tuple(integer), floating, agreement)


def fused(module: nn.Module, arguments: Arguments) -> nn.Module:
    """Return an integer network in the form that engines run fastest, of the same outputs.

    Args:
        module: Module with integer layers, which is changed in place.
        arguments: Arguments of its forward.

    Raises:
        ValueError: The forward cannot be traced.
    """
    floats = outputs_of(float_copy(module), arguments)
    fold_norms_(module, arguments)
    folded = outputs_of(float_copy(module), arguments)
    if not agreement_of(floats, folded).difference < _EXACT:
        raise ValueError(
            "the integer network was not written, since folding batch-norm into the layers before "
            "it changed the outputs: please report this"
        )
    separate = copy.deepcopy(module)
    add_biases_after_(separate)
    if agreement_of(folded, outputs_of(float_copy(separate), arguments)).difference < _EXACT:
        return separate
    return module  # a bias is read by others too


def _run(
    engines: Sequence[str],
    file: Path,
    names: Sequence[str],
    arguments: Arguments,
    expected: Sequence[Tensor],
    tolerance: float,
) -> tuple[dict[str, Agreement], list[str]]:
    """Return the agreement of engines that agree, and what is wrong in each of the others."""
    agreement, failures = {}, []
    for engine in engines:
        try:
            run = session(engine, file, torch.get_num_threads(), names=names)
            found = agreement_of(expected, run(arguments.tensors))
        except ImportError:  # Export.table says so
            continue
        except Exception as error:  # noqa: BLE001  each engine has its own classes
            failures.append(f"{engine} cannot run it: {cause_of(error)}")
            continue
        if found.difference < tolerance and found.equal >= _AGREEMENT:
            agreement[engine] = found
        else:
            failures.append(f"in {engine} {found}, where {tolerance:.2g} is tolerated")
    return agreement, failures


def _remedy(agree: list[str], unread: bool, weight_bits: int) -> str:
    """Return the remedy for a file that an engine cannot read, or in which outputs differ."""
    if not unread and weight_bits == 8 and not has_vnni():
        return (
            "This processor has no VNNI, so that sums of 8-bit products may saturate: export with "
            "weight_bits=7 (--weight-bits 7), which rounds the weights in the file."
        )
    if agree:
        words = f"engines={agree} (--engines {' '.join(agree)})"
        return f"For a file that is run in {' and '.join(agree)} alone, pass {words}."
    if unread:
        return "Export the part of the network without the operators that it names."
    return "Train with more bits or for longer, so that rounding moves its outputs less."


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy in float32 on the CPU, in evaluation mode."""
    detach_computed_(module)
    return copy.deepcopy(module).cpu().float().eval()


def _no_operator(cause: str) -> str:
    if "grouped_mm" in cause:  # of Hugging Face's experts
        return "Call set_experts_implementation('batched_mm') of the network first."
    return "Export the part of the network without it."


def write_onnx(
    module: nn.Module, path: str | os.PathLike[str], examples: Examples, opset: int = 18
) -> None:
    """Write a module as ONNX as it is, for any number of examples.

    Args:
        module: The module, in evaluation mode.
        path: File to write.
        examples: Inputs with examples in the first dimension, as for :func:`export_onnx`.
        opset: Version of ONNX's operators.

    Raises:
        ValueError: The forward cannot be traced, or ONNX has no operator for a part of it.
    """
    arguments = Arguments.of(examples)
    traced = trace(module, arguments, dynamic=True)
    try:
        with _quietly():
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=opset,
                input_names=arguments.names(module),
                verbose=False,
            )
    except Exception as error:
        cause = cause_of(error)
        raise ValueError(
            f"torch.onnx cannot write {type(module).__name__}: {cause}. {_no_operator(cause)}"
        ) from error
    assert program is not None
    for value in list(program.model.graph.initializers.values()):
        value.name = (value.name or "").removeprefix(PREFIX)
    for node in program.model.graph:  # where in the source each comes from
        node.metadata_props.clear()
    program.save(path)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporter's remarks on its own work, and on packages that are not installed."""
    loggers = [logging.getLogger(name) for name in _REMARKING]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_REMARKING = ("torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


@torch.no_grad()
def unquantized(module: nn.Module, examples: Examples) -> nn.Module:
    """Return a float32 network to compare the speed of :func:`export_onnx`'s file with.

    Its weights have the same values and its batch-norms are folded too, but inputs are not rounded.

    Args:
        module: Quantized module; it stays as it is.
        examples: Inputs with examples in the first dimension, as for :func:`export_onnx`.
    """
    quantized = _copied(module)
    to_integers_(quantized)
    fold_norms_(quantized, Arguments.of(examples))
    return float_copy(quantized)


# Sums in another order may round an input to the next level, and change later layers by more. Of
# the outputs of a network that is sensitive to it, twice its sensitivity is tolerated.
_TOLERANCE, _AGREEMENT = 0.2, 0.99

# Folding is exact up to rounding errors.
_EXACT = 1e-3
