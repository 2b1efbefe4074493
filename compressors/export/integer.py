"""The integer network: layers with integer weights and inputs, in ONNX's operators.

Weights become int8 constants, followed by a DequantizeLinear. Inputs of layers pass a
QuantizeLinear and a DequantizeLinear. Engines fuse these operators with the layer into an integer
one.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fitsmall.compressors.codes.lattice import blocked, lattice, unblocked
from fitsmall.compressors.surgery.quantizers import QUANTIZER, detach_quantizer, takes_quantizer
from fitsmall.compressors.torch_internals import remove_forward_pre_hook
from fitsmall.compressors.weights import is_conv1d, matrices_of

__all__ = ["OPSET", "add_biases_after_", "float_copy", "integers_of", "to_integers_"]

# The oldest opset of ONNX with a scale for each channel in DequantizeLinear.
OPSET = 13

# Names of the parameter with a layer's levels, plain and under parametrizations.
_WEIGHTS = ("weight", "parametrizations.weight.original1", "parametrizations.weight.original")


def to_integers_(module: nn.Module, bits: int = 8) -> list[str]:
    """Replace quantized weights by integers in layers with quantized inputs; return their names.

    Args:
        module: Module, which is changed in place.
        bits: Most bits of a weight: channels of more are rounded to this many.
    """
    names = []
    layer: Any
    for name, layer in module.named_modules():
        quantizer = getattr(layer, QUANTIZER, None)
        if not takes_quantizer(layer) or quantizer is None or not quantizer.active:
            continue
        found = integers_of(layer, 2 ** (bits - 1) - 1)
        if found is None:
            continue
        axis, scales, integers = found
        layer.register_buffer("scales", torch.where(scales > 0, scales, 1.0))
        layer.register_buffer("integers", integers)
        layer.output_axis = axis
        scale, zero = quantizer.log_scale.exp(), quantizer.zero_point
        layer.register_buffer("input_scale", scale.clone())
        layer.register_buffer("input_zero", zero.round().to(torch.uint8))
        # ONNX has 8 bits: clipping leaves the levels of fewer bits, with the same scale.
        clip = float(-zero * scale), float((quantizer.high - zero) * scale)
        layer.clip = clip if quantizer.high < 255 else None
        layer.largest = quantizer.high * int(integers.abs().max())
        detach_quantizer(layer)
        layer.register_forward_pre_hook(_round_input, with_kwargs=True)
        # Whoever reads the weight gets that of the integers. Copies share the class of a layer with
        # parametrizations, which therefore stays as it is.
        kind = parametrize.type_before_parametrizations(layer)
        if parametrize.is_parametrized(layer):
            del layer.parametrizations
        else:
            del layer.weight
        layer.__class__ = type(kind.__name__, (kind,), {"weight": property(_dequantized)})
        names.append(name)
    return names


def integers_of(layer: Any, highest: int) -> tuple[int, Tensor, Tensor] | None:
    """Return output dimension, scales and integers of a layer's weight, or None if it has none.

    A channel with integers above ``highest`` is rounded, with a larger scale. With weight norm and
    other parametrizations that scale each output channel, integers are those of the tensor that is
    scaled.
    """
    own = [name for name in _WEIGHTS if name in dict(layer.named_parameters())]
    if not own or parametrize.is_parametrized(layer, "bias"):
        return None
    latent, weight = layer.get_parameter(own[0]), layer.weight
    form = matrices_of(layer, own[0])
    blocks = form.scale_shape(weight.shape, "channel")
    found = lattice(blocked(latent, blocks))
    if found is None:
        return None
    scales, integers = found
    if latent is not weight:
        rows, levels = blocked(weight, blocks), integers * scales[:, None]
        factors = ((rows * levels).sum(1) / levels.square().sum(1)).nan_to_num(0.0)
        if not torch.allclose(levels * factors[:, None], rows, atol=0.0):
            return None
        scales = scales * factors.abs()
        integers = integers * factors.sign().to(torch.int8)[:, None]
    excess = (integers.abs().amax(1) / highest).clamp_min(1.0)
    scales, integers = scales * excess, (integers / excess[:, None]).round().to(torch.int8)
    return form.outputs, scales, unblocked(integers, blocks, weight.shape).contiguous()


def _dequantized(layer: Any) -> Tensor:
    """Return the weight of an integer layer, as ONNX's operator computes it."""
    weight: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (layer.integers, layer.scales),
        attrs={"axis": layer.output_axis},
        dtype=torch.float32,
        shape=layer.integers.shape,
        version=OPSET,
    )
    return weight


def _round_input(
    layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the input of a layer, rounded by ONNX's operators."""
    x = inputs[0] if inputs else named.pop(next(iter(named)))
    if layer.clip is not None:
        x = x.clamp(*layer.clip)
    grid = layer.input_scale, layer.input_zero
    kinds = (("QuantizeLinear", torch.uint8), ("DequantizeLinear", torch.float32))
    for operator, dtype in kinds:
        x = torch.onnx.ops.symbolic(operator, (x, *grid), dtype=dtype, shape=x.shape, version=OPSET)
    return (x, *inputs[1:]), named


def float_copy(module: nn.Module) -> nn.Module:
    """Return a copy with float weights and without ONNX's operators, which only ONNX can run."""
    plain = copy.deepcopy(module)
    layer: Any
    for layer in plain.modules():
        if hasattr(layer, "integers"):
            remove_forward_pre_hook(layer, _round_input)
            (layer.__class__,) = type(layer).__bases__
            along = [1] * layer.integers.dim()
            along[layer.output_axis] = -1
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
        # Conv1D always adds its bias.
        layer.bias = nn.Parameter(torch.zeros_like(layer.bias)) if is_conv1d(layer) else None
        layer.register_forward_hook(_add_bias)


def _add_bias(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    shifted: Tensor = output + layer.offset
    return shifted
