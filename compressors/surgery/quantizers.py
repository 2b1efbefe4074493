"""Quantizers of inputs: submodules that round the input of a layer to small integers.

Inputs are unsigned integers with an offset, ``x = s (q - z)``, with one scale for a whole tensor.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.naming import dotted
from fitsmall.compressors.projections.quantize import clipped
from fitsmall.compressors.surgery.protocol import Changed, Layout, Surgery, TensorSpec, layout_of
from fitsmall.compressors.surgery.saving import warn_of_save_pretrained
from fitsmall.compressors.torch_internals import has_forward_pre_hook, remove_forward_pre_hook
from fitsmall.compressors.weights import TRANSPOSED, is_conv1d

__all__ = [
    "QUANTIZED_INPUTS",
    "QUANTIZER",
    "ActivationQuantizer",
    "InputQuantizers",
    "attach_quantizer",
    "detach_quantizer",
    "takes_quantizer",
]

QUANTIZER = "input_quantizer"

# Layers with one input, of activations.
QUANTIZED_INPUTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

# Buffer that marks a quantized input in a state dict.
_MARK = f"{QUANTIZER}.bits"

# Names of the weight of a layer, also of those with weight norm and other parametrizations.
_WEIGHTS = (
    "weight",
    "parametrizations.weight.original",
    "parametrizations.weight.original1",
    "weight_v",
    "weight_orig",
)

# Bits that an input may have.
_BITS = range(2, 9)


class ActivationQuantizer(nn.Module):
    r"""A module that rounds its input to ``s (q - z)``, with integers ``q`` in ``[0, 2^b - 1]``.

    It is a submodule of a layer, ``layer.input_quantizer``, and a forward pre-hook calls it: the
    layer's class, forward and other names stay as they are. Its state is saved with the module.

    It records ranges while it is :attr:`observing`, and rounds while it is :attr:`active`. Recorded
    ranges are *staged* until :meth:`commit`, so that those of a skipped step, or of a forward pass
    that is computed twice, do not count. The arithmetic is in float32, under autocast too.

    Gradients are straight-through. With ``g`` the gradient of the output ``y``, that of the input
    ``x`` is ``g`` inside of the range and 0 outside; that of the logarithm of the scale is the sum
    of ``g (y - x)`` inside and ``g y`` outside, which is LSQ's gradient (Esser et al., 2020) times
    the scale.

    Args:
        bits: 2 to 8.
        learned: Whether the scale takes gradients, in :attr:`log_scale`. It starts at LSQ's
            ``2 mean |x| / sqrt(2^b - 1)``. Otherwise, and for inputs without a gradient, such as
            the data, the grid covers the recorded range.

    Attributes:
        observing: Whether ranges are recorded, in training mode and with gradients enabled.
        bits: Bits ``b``.
        rounding: :attr:`active`, as a tensor of the state dict.
        log_scale: Logarithm of the scale ``s``.
        zero_point: Integer ``z``, the level of zero.
        seen: Moving averages of minimum, maximum and mean absolute value.
        staged: The same of the current step.

    Example:
        >>> quantizer = ActivationQuantizer(bits=2)
        >>> quantizer.observing = True
        >>> _ = quantizer(torch.tensor([0.0, 1.5]))
        >>> quantizer.commit()
        >>> quantizer.active = True
        >>> quantizer(torch.tensor([0.1, 0.4, 1.1, 9.0]))
        tensor([0.0000, 0.5000, 1.0000, 1.5000])
    """

    bits: Tensor
    rounding: Tensor
    log_scale: Tensor
    zero_point: Tensor
    seen: Tensor
    staged: Tensor

    def __init__(self, bits: int = 8, learned: bool = False) -> None:
        super().__init__()
        self.observing = self._active = False
        self.register_buffer("bits", torch.tensor(0, dtype=torch.uint8))
        self.configure(bits, learned)
        self.register_buffer("rounding", torch.tensor(False))
        self.register_buffer("log_scale", torch.zeros(()))
        self.register_buffer("zero_point", torch.zeros(()))
        # The range includes zero. The mean absolute value is -1 before anything was recorded, and 0
        # for inputs without a gradient.
        self.register_buffer("seen", torch.tensor([0.0, 0.0, -1.0]))
        self.register_buffer("staged", torch.tensor([0.0, 0.0, -1.0]), persistent=False)
        self.register_state_dict_post_hook(warn_of_save_pretrained)  # type: ignore[no-untyped-call]

    def configure(self, bits: int, learned: bool) -> None:
        """Set the number of bits, and whether the scale is learned.

        Raises:
            ValueError: Bits are not from 2 to 8.
        """
        if not isinstance(bits, int) or bits not in _BITS:
            raise ValueError(f"activations are of 2 to 8 bits, and got bits={bits!r}")
        self.learned, self.high = learned, 2**bits - 1
        self.bits.fill_(bits)

    @property
    def active(self) -> bool:
        """Whether the input is rounded; saved with the module."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self._active = active
        self.rounding.fill_(active)

    def forward(self, x: Tensor) -> Tensor:
        if self.observing and self.training and torch.is_grad_enabled() and x.numel():
            wide = x.detach().float()
            low, high = wide.aminmax()
            low, high = low.minimum(self.staged[0]), high.maximum(self.staged[1])
            mean = low.new_zeros(())
            if x.requires_grad:
                mean = torch.linalg.vector_norm(wide, 1) / wide.numel()
            self.staged.copy_(torch.stack([low, high, mean]))
        if not self._active:
            return x
        # The gradient of the scale needs that of the input, which for the data would cost another
        # matrix product.
        log_scale = self.log_scale if x.requires_grad else self.log_scale.detach()
        rounded: Tensor = _Rounded.apply(x, log_scale, self.zero_point, self.high)  # type: ignore[no-untyped-call]
        return rounded

    @torch.no_grad()
    def commit(self, decay: float = 0.9) -> None:
        """Update the moving averages with the staged range, and set scale and zero point by them.

        Zero is a level of the grid, since padding and pruned channels are zero.

        Args:
            decay: Weight of the average so far.
        """
        if self.staged[2] < 0:
            return
        later = self.seen[2] >= 0
        self.seen.copy_(self.seen.lerp(self.staged, 1 - decay) if later else self.staged)
        self.drop()
        low, high, mean = self.seen
        scale = (high - low) / self.high
        self.zero_point.copy_((-low / scale).round().nan_to_num(0.0))
        if self.learned and mean > 0:
            scale = 2 * mean / self.high**0.5
        self.log_scale.copy_(scale.clamp_min(torch.finfo(scale.dtype).tiny).log())

    @torch.no_grad()
    def calibrate(self, low: float, high: float, values: Tensor) -> None:
        """Choose a range by the squared error of rounding, and round from now on.

        Args:
            low: Smallest value, 0 or below.
            high: Largest value, 0 or above.
            values: Sample of the values.

        Example:
            >>> quantizer = ActivationQuantizer(bits=2)
            >>> quantizer.calibrate(0.0, 1.5, torch.tensor([0.0, 0.5, 1.0, 1.5]))
            >>> quantizer(torch.tensor([0.1, 0.4, 9.0]))
            tensor([0.0000, 0.5000, 1.5000])
        """

        def cover(fraction: float) -> float:
            self.reset()
            self.staged.copy_(torch.tensor([fraction * low, fraction * high, 0.0]))
            self.commit()
            self.active = True
            return float((self(values.float()) - values.float()).square().sum())

        cover(min((1 - step / 40 for step in range(32)), key=cover))

    def drop(self) -> None:
        """Drop the staged range."""
        self.staged.copy_(torch.tensor([0.0, 0.0, -1.0]))

    def reset(self) -> None:
        """Forget all ranges, and pass inputs through unchanged."""
        self.drop()
        self.seen.copy_(self.staged)
        self.observing = self.active = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._active, self.high = bool(self.rounding), 2 ** int(self.bits) - 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ActivationQuantizer":
        """Move buffers to another device, but keep their dtypes."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.detach().to(fn(buffer.detach()).device)
        return self

    def extra_repr(self) -> str:
        return f"bits={int(self.bits)}, learned={self.learned}"


class _Rounded(torch.autograd.Function):
    """``y = s (clip(round(x/s + z)) - z)`` with ``s = exp(log_scale)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, zero: Tensor, high: int) -> Tensor:
        scale = log_scale.exp()
        integers = (x.float() / scale).round_().add_(zero).clamp_(0, high)
        y = integers.sub_(zero).mul_(scale).to(x.dtype)
        ctx.high = high
        # This costs no memory: the layers before and after keep both tensors anyway.
        ctx.save_for_backward(x, y, scale, zero)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, zero = ctx.saved_tensors
        g, wide = gradient.float(), x.float()
        passed = clipped(g, (wide / scale).add_(zero), 0, ctx.high)
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = g.reshape(-1).dot(y.float().reshape(-1))
            of_scale -= passed.reshape(-1).dot(wide.reshape(-1))
        return passed.to(gradient.dtype), of_scale, None, None


def takes_quantizer(layer: nn.Module) -> bool:
    """Return whether a layer has one input of activations, so that it can compute with integers."""
    return isinstance(layer, QUANTIZED_INPUTS) or is_conv1d(layer)


def attach_quantizer(layer: nn.Module, bits: int, learned: bool = False) -> ActivationQuantizer:
    """Give a layer a quantizer of its input, or configure the one that it has, and return it.

    Args:
        layer: Layer with one input.
        bits: 2 to 8.
        learned: Whether the scale takes gradients.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> attach_quantizer(layer, bits=8) is layer.input_quantizer
        True
    """
    quantizer = getattr(layer, QUANTIZER, None)
    if quantizer is None:
        quantizer = ActivationQuantizer(bits, learned)
        parameter = next(layer.parameters(recurse=False))
        layer.add_module(QUANTIZER, quantizer.to(parameter.device).train(layer.training))
    quantizer.configure(bits, learned)
    if not has_forward_pre_hook(layer, _quantize_input):
        layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    return quantizer


def detach_quantizer(layer: nn.Module) -> None:
    """Remove a layer's quantizer, if it has one."""
    if hasattr(layer, QUANTIZER):
        remove_forward_pre_hook(layer, _quantize_input)
        delattr(layer, QUANTIZER)


def _quantize_input(
    layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer = getattr(layer, QUANTIZER)
    if inputs:
        return (quantizer(inputs[0]), *inputs[1:]), named
    keyword = next(iter(named))
    return inputs, {**named, keyword: quantizer(named[keyword])}


@dataclass(frozen=True)
class InputQuantizers(Surgery):
    """The attachment of quantizers to the inputs of layers.

    Args:
        bits: Bits of the input of each layer, by its name.
        learned: Whether scales take gradients.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> InputQuantizers({"0": 4}).apply(net)
        {}
        >>> net[0].input_quantizer
        ActivationQuantizer(bits=4, learned=False)
    """

    bits: Mapping[str, int]
    learned: bool = False

    kind: ClassVar[str] = "input quantizers"

    @classmethod
    def found(cls, layout: Layout) -> Self | None:
        layers = [name[: -len(_MARK)] for name in layout if f".{name}".endswith(f".{_MARK}")]
        bits = {layer.removesuffix("."): max(_BITS) for layer in layers}
        return cls(bits) if bits else None

    @classmethod
    def own_tensors(cls, names: Iterable[str]) -> list[str]:
        return [name for name in names if f".{QUANTIZER}." in f".{name}"]

    def expect(self, module: nn.Module, layout: Layout) -> dict[str, TensorSpec]:
        expected = dict(layout)
        own = layout_of(ActivationQuantizer().state_dict())
        for layer in self.bits:
            if _weight_of(layer, layout) is None:
                raise ValueError(
                    f"{type(module).__name__} has no layer {layer!r} whose input can be quantized"
                )
            expected |= {dotted(layer, QUANTIZER, name): spec for name, spec in own.items()}
        return expected

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        for layer in self.bits:
            bits = int(tensors[dotted(layer, _MARK)])
            if bits not in _BITS:
                raise ValueError(f"the input of {layer} has {bits} bits, and not 2 to 8")

    def apply(self, module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> dict[str, bool]:
        for name, bits in self.bits.items():
            attach_quantizer(module.get_submodule(name), bits, self.learned)
        return {}

    def of(self, module: nn.Module) -> dict[str, ActivationQuantizer]:
        """Return the quantizers of a module, by the names of their layers."""
        found = ((name, getattr(module.get_submodule(name), QUANTIZER)) for name in self.bits)
        return dict(found)

    def replay(self, module: nn.Module) -> None:
        for name, bits in self.bits.items():
            layer = module.get_submodule(name)
            if not hasattr(layer, QUANTIZER):
                attach_quantizer(layer, bits, self.learned)

    def undo(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rounded = [layer for layer in self.bits if tensors[dotted(layer, QUANTIZER, "rounding")]]
        if rounded:
            names = ", ".join([*rounded[:3], *["..."] * (len(rounded) > 3)])
            warnings.warn(
                "to_plain: the plain class does not round inputs, and its outputs will differ: "
                f"here those of {len(rounded)} layers are rounded ({names})",
                stacklevel=3,
            )
        own = set(self.own_tensors(tensors))
        return {name: tensor for name, tensor in tensors.items() if name not in own}

    def table(self, layout: Layout) -> list[Changed]:
        rows = []
        for layer in self.bits:
            if weight := _weight_of(layer, layout):  # else a buffer of that name
                size = weight.shape.numel() * weight.dtype.itemsize
                rows.append(Changed(layer, "inputs are rounded", size, size))
        return rows


def _weight_of(layer: str, layout: Layout) -> TensorSpec | None:
    """Return the weight of a layer, or the tensor that it computes its weight from, if any."""
    names = (dotted(layer, name) for name in _WEIGHTS)
    return next((layout[name] for name in names if name in layout), None)
