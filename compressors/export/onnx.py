"""Export: a quantized network as ONNX with integer weights, for engines that compute in integers.

Weights become int8 constants with a DequantizeLinear behind them, inputs of layers pass a
QuantizeLinear and a DequantizeLinear; engines fuse these with the layer between them. Batch-norm is
folded into the steps of the layer before it, which is exact: a channel's integers stay what they
are, or are negated.
"""

import copy
import logging
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fitsmall.compressors.export.engines import ENGINES, session
from fitsmall.compressors.extras import install_command
from fitsmall.compressors.lattice import blocked, lattice, unblocked
from fitsmall.compressors.quantize import QUANTIZER, TRANSPOSED, detach_quantizer, layout

__all__ = ["Agreement", "Export", "export_onnx", "unquantized", "write_onnx"]

# The oldest that has a DequantizeLinear for each channel.
OPSET = 13

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


@dataclass(frozen=True)
class Agreement:
    """How well an engine's outputs agree with those of the module in float32.

    Args:
        difference: Largest difference of an output, relative to the largest output.
        equal: Fraction of examples with equal predictions, the largest output of each.

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
    """What was exported, and how well it agrees with the module in float32.

    Args:
        path: The ONNX file.
        bytes: Its size.
        integer: Layers that have integer weights and quantized inputs.
        floating: Other layers with weights, which stay as they are.
        agreement: That of each engine which is installed.
    """

    path: Path
    bytes: int
    integer: tuple[str, ...]
    floating: tuple[str, ...]
    agreement: dict[str, Agreement]

    def table(self, examples: int) -> str:
        """What stands in the file, in a few lines."""
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
    """Write a quantized module as ONNX, run it, and compare it with the module in float32.

    It is run in onnxruntime, and in OpenVINO where that is installed.

    Args:
        module: Module that was trained with
            :class:`~fitsmall.callbacks.QuantizationAwareTraining`, or restored from its file.
        path: File to write. It appears only if it agrees.
        examples: Real inputs, a tensor for each argument of the forward, with examples in the
            first dimension; the file takes any number of them.
        opset: Version of ONNX's operators.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: No layer is quantized, the opset is too old, an engine cannot read the file, or
            its outputs differ from the module's.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ImportError(f"exporting needs {install_command('onnx')}") from error
    if opset < OPSET:
        raise ValueError(f"opset {opset} has no steps for each channel: choose {OPSET} or above")
    inputs = examples if isinstance(examples, tuple) else (examples,)
    inputs = tuple(x.detach().cpu() for x in inputs)
    quantized = copy.deepcopy(module).cpu().float().eval()
    expected = [y for y in tree_leaves(quantized(*inputs)) if isinstance(y, Tensor)]
    integer = _integers(quantized)
    if not integer:
        raise ValueError(
            f"{type(module).__name__} has no layer with integer weights and quantized inputs to "
            "export: train it with QuantizationAwareTraining past its start, with activation_bits, "
            "or restore a file that was"
        )
    floats = [y for y in tree_leaves(_plain(quantized)(*inputs)) if isinstance(y, Tensor)]
    _fold_norms(quantized, inputs)
    folded = [y for y in tree_leaves(_plain(quantized)(*inputs)) if isinstance(y, Tensor)]
    if not _compared(floats, folded).difference < _EXACT:
        raise ValueError(
            f"{path} was not written, since folding batch-norm into the layers before it changed "
            "the outputs: please report this"
        )
    layers = {name for name, layer in quantized.named_modules() if isinstance(layer, _LAYERS)}
    _part_biases(quantized)
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "made.onnx"
        write_onnx(quantized, made, inputs, opset)
        agreement = {}
        for engine in ENGINES:
            try:
                run = session(engine, made, torch.get_num_threads())
            except ImportError:  # the table says so
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
    """Without the exporter's remarks on its own classes, and on packages that are not there."""
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
    """The float32 network beside the one that :func:`export_onnx` writes.

    Its weights have the same values and its batch-norms are folded as well, but no input is
    rounded.

    Args:
        module: Quantized module; it stays as it is.
        inputs: A tensor for each argument of the forward, with examples in the first dimension.
    """
    quantized = copy.deepcopy(module).cpu().float().eval()
    _integers(quantized)
    _fold_norms(quantized, inputs)
    return _plain(quantized)


# A sum in another order may round to the next level of a grid, and that to more behind it.
_TOLERANCE, _AGREEMENT = 0.2, 0.99

# Folding is exact but for the rounding of floats.
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


def _integers(module: nn.Module) -> list[str]:
    """Replace weights that stand on grids, of layers with quantized inputs, by integers."""
    names = []
    for name, layer in module.named_modules():
        quantizer = getattr(layer, QUANTIZER, None)
        if not isinstance(layer, _LAYERS) or quantizer is None or not quantizer.active:
            continue
        blocks = layout(layer.weight.shape, "channel", int(isinstance(layer, TRANSPOSED)))
        found = lattice(blocked(layer.weight, blocks))
        if found is None:
            continue
        steps, integers = found
        shape = layer.weight.shape
        del layer.weight
        layer.register_buffer("steps", torch.where(steps > 0, steps, 1.0))
        layer.register_buffer("integers", unblocked(integers, blocks, shape).contiguous())
        step, zero = quantizer.log_step.exp(), quantizer.zero_point
        layer.register_buffer("input_step", step.clone())
        layer.register_buffer("input_zero", zero.round().to(torch.uint8))
        # Fewer bits are a part of a grid of 8 bits with the same steps.
        clip = float(-zero * step), float((quantizer.high - zero) * step)
        layer.clip = clip if quantizer.high < 255 else None  # type: ignore[assignment]
        layer.largest = quantizer.high * int(integers.abs().max())
        detach_quantizer(layer)
        layer.register_forward_pre_hook(_dequantize, with_kwargs=True)
        names.append(name)
    return names


def _dequantize(
    layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a layer the weight and the input that ONNX's operators make of integers."""
    symbolic: Any = torch.onnx.ops.symbolic
    axis = int(isinstance(layer, TRANSPOSED))
    weight, x = layer.integers, inputs[0] if inputs else named.pop("input")
    layer.weight = symbolic(
        "DequantizeLinear",
        (weight, layer.steps),
        attrs={"axis": axis},
        dtype=torch.float32,
        shape=weight.shape,
        version=OPSET,
    )
    if layer.clip is not None:
        x = x.clamp(*layer.clip)
    grid = layer.input_step, layer.input_zero
    kinds = (("QuantizeLinear", torch.uint8), ("DequantizeLinear", torch.float32))
    for operator, dtype in kinds:
        x = symbolic(operator, (x, *grid), dtype=dtype, shape=x.shape, version=OPSET)
    return (x, *inputs[1:]), named


def _plain(module: nn.Module) -> nn.Module:
    """A copy without the operators of quantization, which only ONNX knows."""
    plain = copy.deepcopy(module)
    layer: Any
    for layer in plain.modules():
        if hasattr(layer, "integers"):
            layer._forward_pre_hooks.clear()
            along = [1] * layer.integers.dim()
            along[int(isinstance(layer, TRANSPOSED))] = -1
            layer.weight = nn.Parameter(layer.integers * layer.steps.view(along))
            del layer.integers, layer.steps, layer.input_step, layer.input_zero
    return plain


def _fold_norms(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Fold each batch-norm into the layer before it, if nothing else reads that layer's output."""
    for layer, norm in _followed_by_norms(module, inputs):
        before, after = module.get_submodule(layer), module.get_submodule(norm)
        _fold(before, after)
        parent, _, child = norm.rpartition(".")
        setattr(module.get_submodule(parent), child, nn.Identity())


def _fold(layer: Any, norm: Any) -> None:
    """``norm(layer(x))`` as a layer: ``q s -> (q sign f) (s |f|)`` with ``f = gamma / sigma``."""
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    shift = 0.0 if norm.bias is None else norm.bias
    axis = int(isinstance(layer, TRANSPOSED))
    along = [1] * layer.integers.dim()
    along[axis] = -1
    layer.integers = layer.integers * factor.sign().to(torch.int8).view(along)
    layer.steps = torch.where(factor == 0, 1.0, layer.steps * factor.abs())
    layer.bias = nn.Parameter(bias * factor + shift)


# A largest product of integers below which one unit of it is coarse: 32,385 is that of 8 bits.
_COARSE = 2**13


def _part_biases(module: nn.Module) -> None:
    """Let biases be added behind layers of few bits.

    Within a layer onnxruntime rounds them to units of its products, the step of the weights times
    that of the inputs, to compute with integers.
    """
    layer: Any
    for layer in module.modules():
        if getattr(layer, "largest", _COARSE) >= _COARSE or layer.bias is None:
            continue
        spatial = [1] * (layer.integers.dim() - 2)
        layer.register_buffer("offset", layer.bias.detach().view(-1, *spatial))
        layer.bias = None
        layer.register_forward_hook(_add_bias)


def _add_bias(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    shifted: Tensor = output + layer.offset
    return shifted


def _followed_by_norms(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[str, str]]:
    """Names of integer layers and of the batch-norms that alone read them."""
    layers = dict(module.named_modules())
    graph = torch.export.export(_plain(module), inputs, strict=False)
    of = {**graph.graph_signature.inputs_to_parameters, **graph.graph_signature.inputs_to_buffers}
    norms = [n for n in graph.graph.nodes if n.target is torch.ops.aten.batch_norm.default]
    calls = Counter(of.get(getattr(norm.args[3], "name", ""), "") for norm in norms)
    readers = Counter(source.name for node in graph.graph.nodes for source in node.all_input_nodes)
    pairs = []
    for norm in norms:
        source, mean = norm.args[0], of.get(getattr(norm.args[3], "name", ""), "")
        weight = source.args[1] if source.op == "call_function" and len(source.args) > 1 else None
        name = of.get(getattr(weight, "name", ""), "").removesuffix(".weight")
        before = layers.get(name)
        # Batch-norm normalises the second dimension, and a Linear makes the last.
        second = not isinstance(before, nn.Linear) or source.meta["val"].dim() == 2
        grouped = isinstance(before, TRANSPOSED) and before.groups > 1
        once = readers[getattr(weight, "name", "")] == 1 == len(source.users) and calls[mean] == 1
        if hasattr(before, "integers") and mean and once and second and not grouped:
            pairs.append((name, mean.removesuffix(".running_mean")))
    return pairs
