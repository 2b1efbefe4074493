"""Quantization: weights and activations as small integers times a step.

Weights are symmetric, ``w = s q`` with a step ``s`` for each output channel, tensor or group of
weights; activations are unsigned with an offset, ``x = s (q - z)``, one step for a whole tensor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fitsmall.compressors.codes import Code, Dense, Integer
from fitsmall.compressors.lattice import LARGEST, blocked, spread, unblocked
from fitsmall.compressors.projections import Projection

__all__ = [
    "QUANTIZER",
    "TRANSPOSED",
    "ActivationQuantizer",
    "Quantize",
    "attach_quantizer",
    "bounds",
    "clipped",
    "detach_quantizer",
    "half",
    "layout",
    "quantize_",
    "rounded",
    "steps_of",
]

QUANTIZER = "input_quantizer"

# Layers whose output channels are the second dimension of the weight.
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def bounds(bits: int) -> tuple[int, int]:
    """Least and largest integer of a weight. -128 is left out, so that a channel may be negated
    where batch-norm is folded into it.

    Example:
        >>> bounds(2), bounds(4), bounds(8)
        ((-2, 1), (-8, 7), (-127, 127))
    """
    return max(-(2 ** (bits - 1)), -LARGEST), 2 ** (bits - 1) - 1


def layout(shape: Sequence[int], granularity: str | int, axis: int = 0) -> tuple[int, ...]:
    """Number of steps along each dimension of a weight.

    Args:
        shape: Shape of the weight.
        granularity: ``"channel"``, ``"tensor"``, or the size of groups of inputs of a channel.
        axis: Dimension of the output channels; 1 in transposed convolutions.

    Raises:
        ValueError: Groups do not divide the inputs.

    Example:
        >>> layout((64, 32, 3, 3), "channel"), layout((64, 32), "tensor"), layout((64, 32), 16)
        ((64, 1, 1, 1), (1, 1), (64, 2))
    """
    steps = [1] * len(shape)
    if granularity != "tensor" and shape:
        steps[axis] = shape[axis]
    if isinstance(granularity, int):
        inputs = 1 - axis
        if len(shape) < 2 or shape[inputs] % granularity:
            raise ValueError(
                f"groups of {granularity} do not divide a weight of shape {tuple(shape)}: choose "
                "another size, or granularity='channel'"
            )
        steps[inputs] = shape[inputs] // granularity
    return tuple(steps)


def rounded(steps: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Steps with so few binary digits, eight at most, that their products with integers are exact
    in a dtype, and the file finds the integers again.

    Example:
        >>> steps = torch.tensor([0.1, 3.3])
        >>> rounded(steps, bits=8, dtype=torch.float32), rounded(steps, 4, torch.bfloat16)
        (tensor([0.1001, 3.2969]), tensor([0.1016, 3.2500]))
    """
    precision = round(1 - math.log2(torch.finfo(dtype).eps))
    digits = min(8, precision - (bits - 1))
    if digits == 8:  # as many as a bfloat16 has
        few = steps.bfloat16().float()
    else:
        mantissas, exponents = steps.float().frexp()
        few = torch.ldexp((mantissas * 2**digits).round() / 2**digits, exponents)
    return few.clamp_min(2.0 ** (math.log2(torch.finfo(dtype).tiny) + 8))


def steps_of(weight: Tensor, bits: int, blocks: Sequence[int]) -> Tensor:
    r"""Step of each block with the least error, ``min over s of ||w - s clip(round(w / s))||^2``.

    The error is taken at 64 steps, from the one that clips nothing down to a seventh of it, and at
    those by which the largest weight is an integer, so that what stands on a grid already stays
    there; the best is improved three times by least squares, ``s = <w, q> / <q, q>``.

    Args:
        weight: Tensor of weights, which hold neither NaN nor infinity.
        bits: 2 to 8.
        blocks: Number of steps along each dimension.

    Example:
        >>> steps_of(torch.tensor([[1.0, -1.1, 0.1, 2.1], [0.5, 1.0, -1.5, 0.0]]), 3, (2, 1))
        tensor([[1.0469],
                [0.5000]])
    """
    low, high = bounds(bits)
    rows = blocked(weight.detach(), blocks).float()
    peak = rows.abs().amax(1, keepdim=True)
    widest = torch.where(peak > 0, peak / high, 1.0)

    best = rounded(widest, bits, weight.dtype)
    least = torch.full_like(best, torch.inf)

    def improve(steps: Tensor) -> None:
        steps = rounded(steps, bits, weight.dtype)
        error = (rows - _grid(rows, steps, low, high)).square().sum(1, keepdim=True)
        torch.where(error < least, steps, best, out=best)
        torch.minimum(error, least, out=least)

    for power in range(64):
        improve(widest * 0.97**power)
    for largest in range(max(1, high // 2), -low + 1):
        improve(peak / largest)
    for _ in range(3):
        q = (rows / best).round_().clamp_(low, high)
        squares = q.square().sum(1, keepdim=True)
        improve(torch.where(squares > 0, (rows * q).sum(1, keepdim=True) / squares, best))
    return best.view(tuple(blocks)).to(weight.dtype)


def clipped(gradient: Tensor, levels: Tensor, low: int, high: int) -> Tensor:
    """The straight-through gradient of ``clip(round(levels), low, high)``: the same inside, 0
    outside.

    Example:
        >>> clipped(torch.ones(4), torch.tensor([-2.6, -2.4, 1.4, 1.6]), low=-2, high=1)
        tensor([0., 1., 1., 0.])
    """
    inside: Tensor = torch.ops.aten.hardtanh_backward(gradient, levels, low - 0.5, high + 0.5)
    return inside


def _grid(values: Tensor, steps: Tensor, low: int, high: int) -> Tensor:
    return (values / steps).round_().clamp_(low, high).mul_(steps)


def quantize_(weight: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Round a weight in place to the nearest integer times its step.

    Example:
        >>> quantize_(torch.tensor([[0.3, -0.2, 9.0]]), torch.tensor([[0.25]]), bits=4)
        tensor([[ 0.2500, -0.2500,  1.7500]])
    """
    low, high = bounds(bits)
    wide = spread(steps, weight.shape)
    if weight.dtype in (torch.float32, torch.float64):
        # Zero is added since -0 would be another value than 0.
        return weight.div_(wide).round_().clamp_(low, high).mul_(wide).add_(0.0)
    return weight.copy_(quantize_(weight.float(), steps.float(), bits))


@dataclass(frozen=True)
class Quantize(Projection):
    r"""Nearest tensor on a grid of ``2^b`` levels for each channel, ``w = s q``.

    The step has the least squared error, to within 2 % up to five bits and 10 % at eight, and eight
    binary digits (fewer in half precision).
    Zero is a level, so what was pruned stays zero. Sixteen bits are a half-precision float.

    Args:
        bits: 2 to 8, or 16.
        granularity: ``"channel"``, ``"tensor"``, or the size of groups of inputs of a channel.
        axis: Dimension of the output channels; 1 in transposed convolutions.

    Raises:
        ValueError: The weight holds NaN or infinity, or groups do not divide it.

    Example:
        >>> Quantize(bits=2).project(torch.tensor([[1.0, 0.9, -2.1, 0.0], [0.1, 0.1, -0.2, 0.0]]))
        tensor([[ 1.0156,  1.0156, -2.0312,  0.0000],
                [ 0.1001,  0.1001, -0.2002,  0.0000]])
    """

    bits: int = 8
    granularity: str | int = "channel"
    axis: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (*range(2, 9), 16):
            raise ValueError(f"weights are of 2 to 8 bits, or of 16, and got bits={self.bits!r}")
        named = self.granularity in ("channel", "tensor")
        if not named and not (isinstance(self.granularity, int) and self.granularity >= 8):
            raise ValueError(
                "granularity is 'channel', 'tensor', or the size of a group, 8 or more, and got "
                f"{self.granularity!r}"
            )

    def encode(self, weight: Tensor) -> Code:
        weight = weight.detach()
        if not weight.isfinite().all():
            raise ValueError("cannot quantize NaN or infinity: did training diverge?")
        if self.bits == 16:
            return Dense(half(weight))
        if weight.dim() == 0 or not weight.numel():
            return Dense(weight)
        blocks = layout(weight.shape, self.granularity, self.axis)
        steps = steps_of(weight, self.bits, blocks)
        low, high = bounds(self.bits)
        rows = blocked(weight, blocks) / blocked(steps, blocks)
        integers = rows.round_().clamp_(low, high).to(torch.int8)
        return Integer(Dense(steps), unblocked(integers, blocks, weight.shape))

    def after(self, code: Code) -> Code:
        # Zero is a level of every grid.
        return self.encode(code.decode())


def half(weight: Tensor) -> Tensor:
    """The weight in the precision of a float16, or of a bfloat16 where that overflows.

    Example:
        >>> half(torch.tensor([0.1, 3.0]))
        tensor([0.1000, 3.0000])
        >>> half(torch.tensor([0.1])).item(), half(torch.tensor([1e6])).item()
        (0.0999755859375, 999424.0)
    """
    narrow = weight.to(torch.float16)
    if not narrow.isfinite().all():
        narrow = weight.to(torch.bfloat16)
    return narrow.to(weight.dtype)


class ActivationQuantizer(nn.Module):
    r"""Rounds what goes into a layer to ``s (q - z)``, ``q`` an integer in ``[0, 2^b - 1]``.

    A submodule of the layer, ``layer.input_quantizer``, which a forward pre-hook calls: the layer's
    class, its forward and its other names stay as they are. Its state is saved with the module.

    It looks at tensors while it is :attr:`observing`, and rounds them while it is :attr:`active`.
    What it saw is *staged* until :meth:`commit`, so that a step which is not taken, or a forward
    pass that is run again, leaves no trace. The arithmetic is in float32 under autocast too.

    The gradient is the straight-through one: of the input, the output's inside of the range and 0
    outside; of the logarithm of the step, ``sum g (y - x)`` inside and ``sum g y`` outside, which
    is LSQ's gradient (Esser et al., 2020) times the step.

    Args:
        bits: 2 to 8.
        learned: Whether the step takes gradients, in :attr:`log_step`. It starts at LSQ's
            ``2 mean |x| / sqrt(2^b - 1)``; otherwise, and for inputs that no gradient reaches, such
            as the data, it spreads the grid over all that was seen.

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
    log_step: Tensor
    zero_point: Tensor
    seen: Tensor
    staged: Tensor

    def __init__(self, bits: int = 8, learned: bool = False) -> None:
        super().__init__()
        self.observing = self._active = False
        self.register_buffer("bits", torch.tensor(0, dtype=torch.uint8))
        self.configure(bits, learned)
        self.register_buffer("rounding", torch.tensor(False))
        self.register_buffer("log_step", torch.zeros(()))
        self.register_buffer("zero_point", torch.zeros(()))
        # Least and largest value, zero among them, and the mean absolute one: -1 before there are
        # any, 0 where no gradient reaches the input.
        self.register_buffer("seen", torch.tensor([0.0, 0.0, -1.0]))
        self.register_buffer("staged", torch.tensor([0.0, 0.0, -1.0]), persistent=False)

    def configure(self, bits: int, learned: bool) -> None:
        """Take other arguments than those it was made with."""
        if not isinstance(bits, int) or bits not in range(2, 9):
            raise ValueError(f"activations are of 2 to 8 bits, and got bits={bits!r}")
        self.learned, self.high = learned, 2**bits - 1
        self.bits.fill_(bits)

    @property
    def active(self) -> bool:
        """Whether inputs are rounded; saved with the module."""
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
        # A step of what no gradient reaches would need one: for the data, a matrix product more.
        log_step = self.log_step if x.requires_grad else self.log_step.detach()
        rounded: Tensor = _Rounded.apply(x, log_step, self.zero_point, self.high)  # type: ignore[no-untyped-call]
        return rounded

    @torch.no_grad()
    def commit(self, decay: float = 0.9) -> None:
        """Move what was seen towards what is staged, and place the grid by it.

        The grid holds zero exactly, since padding and pruned channels are zero.
        """
        if self.staged[2] < 0:
            return
        later = self.seen[2] >= 0
        self.seen.copy_(self.seen.lerp(self.staged, 1 - decay) if later else self.staged)
        self.drop()
        low, high, mean = self.seen
        step = (high - low) / self.high
        self.zero_point.copy_((-low / step).round().nan_to_num(0.0))
        if self.learned and mean > 0:
            step = 2 * mean / self.high**0.5
        self.log_step.copy_(step.clamp_min(torch.finfo(step.dtype).tiny).log())

    def drop(self) -> None:
        """Forget what is staged."""
        self.staged.copy_(torch.tensor([0.0, 0.0, -1.0]))

    def reset(self) -> None:
        """Forget all that was seen, and pass tensors through."""
        self.drop()
        self.seen.copy_(self.staged)
        self.observing = self.active = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._active, self.high = bool(self.rounding), 2 ** int(self.bits) - 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ActivationQuantizer":
        """Move to another device, but keep every type."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.detach().to(fn(buffer.detach()).device)
        return self

    def extra_repr(self) -> str:
        return f"bits={int(self.bits)}, learned={self.learned}"


class _Rounded(torch.autograd.Function):
    """``y = s (clip(round(x/s + z)) - z)`` with ``s = exp(log_step)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_step: Tensor, zero: Tensor, high: int) -> Tensor:
        step = log_step.exp()
        integers = (x.float() / step).round_().add_(zero).clamp_(0, high)
        y = integers.sub_(zero).mul_(step).to(x.dtype)
        ctx.high = high
        # Both are kept anyway, by the layers before and behind.
        ctx.save_for_backward(x, y, step, zero)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, step, zero = ctx.saved_tensors
        g, wide = gradient.float(), x.float()
        passed = clipped(g, (wide / step).add_(zero), 0, ctx.high)
        of_step = None
        if ctx.needs_input_grad[1]:
            of_step = g.reshape(-1).dot(y.float().reshape(-1))
            of_step -= passed.reshape(-1).dot(wide.reshape(-1))
        return passed.to(gradient.dtype), of_step, None, None


def attach_quantizer(layer: nn.Module, bits: int, learned: bool = False) -> ActivationQuantizer:
    """Give a layer a quantizer of its input; one that it has already stays, and learns its bits.

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
    if _quantize_input not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    return quantizer


def detach_quantizer(layer: nn.Module) -> None:
    """Take a layer's quantizer away, if it has one."""
    if hasattr(layer, QUANTIZER):
        for key in [k for k, hook in layer._forward_pre_hooks.items() if hook is _quantize_input]:
            del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]
        delattr(layer, QUANTIZER)


def _quantize_input(
    layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer = getattr(layer, QUANTIZER)
    if inputs:
        return (quantizer(inputs[0]), *inputs[1:]), named
    return inputs, {**named, "input": quantizer(named["input"])}
