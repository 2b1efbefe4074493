"""The integer network: layers with integer weights and inputs, in ONNX's operators.

Weights become int8 constants, followed by a DequantizeLinear. Inputs of layers pass a
QuantizeLinear and a DequantizeLinear. Engines fuse these operators with the layer into an integer
one.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fitsmall.compressors.lattice import blocked, lattice, unblocked
from fitsmall.compressors.surgery.quantizers import QUANTIZER, detach_quantizer
from fitsmall.compressors.torch_internals import clear_forward_pre_hooks
from fitsmall.compressors.weights import TRANSPOSED, matrices_of

__all__ = ["LAYERS", "OPSET", "add_biases_after_", "float_copy", "to_integers_"]

# The oldest opset of ONNX with a scale for each channel in DequantizeLinear.
OPSET = 13

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def to_integers_(module: nn.Module) -> list[str]:
    """Replace quantized weights by integers in layers with quantized inputs; return their names."""
    names = []
    for name, layer in module.named_modules():
        quantizer = getattr(layer, QUANTIZER, None)
        if not isinstance(layer, LAYERS) or quantizer is None or not quantizer.active:
            continue
        blocks = matrices_of(layer, "weight").scale_shape(layer.weight.shape, "channel")
        found = lattice(blocked(layer.weight, blocks))
        if found is None:
            continue
        scales, integers = found
        shape = layer.weight.shape
        del layer.weight
        layer.register_buffer("scales", torch.where(scales > 0, scales, 1.0))
        layer.register_buffer("integers", unblocked(integers, blocks, shape).contiguous())
        scale, zero = quantizer.log_scale.exp(), quantizer.zero_point
        layer.register_buffer("input_scale", scale.clone())
        layer.register_buffer("input_zero", zero.round().to(torch.uint8))
        # ONNX has 8 bits: clipping leaves the levels of fewer bits, with the same scale.
        clip = float(-zero * scale), float((quantizer.high - zero) * scale)
        layer.clip = clip if quantizer.high < 255 else None  # type: ignore[assignment]
        layer.largest = quantizer.high * int(integers.abs().max())
        detach_quantizer(layer)
        layer.register_forward_pre_hook(_dequantize, with_kwargs=True)
        names.append(name)
    return names


def _dequantize(
    layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Set a layer's weight, and return its input, as ONNX's operators compute them."""
    symbolic: Any = torch.onnx.ops.symbolic
    axis = int(isinstance(layer, TRANSPOSED))
    weight, x = layer.integers, inputs[0] if inputs else named.pop("input")
    layer.weight = symbolic(
        "DequantizeLinear",
        (weight, layer.scales),
        attrs={"axis": axis},
        dtype=torch.float32,
        shape=weight.shape,
        version=OPSET,
    )
    if layer.clip is not None:
        x = x.clamp(*layer.clip)
    grid = layer.input_scale, layer.input_zero
    kinds = (("QuantizeLinear", torch.uint8), ("DequantizeLinear", torch.float32))
    for operator, dtype in kinds:
        x = symbolic(operator, (x, *grid), dtype=dtype, shape=x.shape, version=OPSET)
    return (x, *inputs[1:]), named


def float_copy(module: nn.Module) -> nn.Module:
    """Return a copy with float weights and without ONNX's operators, which only ONNX can run."""
    plain = copy.deepcopy(module)
    layer: Any
    for layer in plain.modules():
        if hasattr(layer, "integers"):
            clear_forward_pre_hooks(layer)
            along = [1] * layer.integers.dim()
            along[int(isinstance(layer, TRANSPOSED))] = -1
            layer.weight = nn.Parameter(layer.integers * layer.scales.view(along))
            del layer.integers, layer.scales, layer.input_scale, layer.input_zero
    return plain


# Biases are rounded too coarsely if all products of integers are below this; those of 8 bits reach
# 32,385.
_COARSE = 2**13


def add_biases_after_(module: nn.Module) -> None:
    """Add biases after layers of few bits, instead of within them.

    Within an integer layer onnxruntime rounds biases to multiples of the scale of the weights times
    that of the inputs, which is coarse for few bits.
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
