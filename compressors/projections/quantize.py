"""Quantization of weights: small integers times a scale, ``w = s q``.

The grid is symmetric, with a scale ``s`` for each output channel, tensor or group of weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from fitsmall.compressors.codes.code import Code, Dense, Integer
from fitsmall.compressors.codes.lattice import LARGEST, blocked, spread, unblocked
from fitsmall.compressors.projections.levels import Levels
from fitsmall.compressors.projections.projection import Projection
from fitsmall.compressors.weights import Matrices

__all__ = [
    "Grid",
    "Quantize",
    "bounds",
    "clipped",
    "few_digits",
    "half",
    "quantize_",
    "scales_of",
]


def bounds(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest integer of a weight.

    -128 is left out: folding a batch-norm may negate a channel.

    Example:
        >>> bounds(2), bounds(4), bounds(8)
        ((-2, 1), (-8, 7), (-127, 127))
    """
    return max(-(2 ** (bits - 1)), -LARGEST), 2 ** (bits - 1) - 1


def few_digits(scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Round scales to few binary digits, so that products with the integers are exact in a dtype.

    There are eight digits at most. From exact products the file can recover the integers.

    Args:
        scales: Positive scales.
        bits: Bits of the integers.
        dtype: Dtype of the products.

    Example:
        >>> scales = torch.tensor([0.1, 3.3])
        >>> few_digits(scales, bits=8, dtype=torch.float32), few_digits(scales, 4, torch.bfloat16)
        (tensor([0.1001, 3.2969]), tensor([0.1016, 3.2500]))
    """
    precision = round(1 - math.log2(torch.finfo(dtype).eps))
    digits = min(8, precision - (bits - 1))
    if digits == 8:  # as many as a bfloat16 has
        few = scales.bfloat16().float()
    else:
        mantissas, exponents = scales.float().frexp()
        few = torch.ldexp((mantissas * 2**digits).round() / 2**digits, exponents)
    return few.clamp_min(2.0 ** (math.log2(torch.finfo(dtype).tiny) + 8))


def scales_of(weight: Tensor, bits: int, blocks: Sequence[int]) -> Tensor:
    r"""Find the scale of each block by ``min over s of ||w - s clip(round(w / s))||^2``.

    The search takes the best of 64 scales, from the one that clips nothing down to a seventh of it,
    and of all scales by which the largest weight is an integer, so that a weight on a grid stays
    there. Three steps of least squares, ``s = <w, q> / <q, q>``, improve the best one.

    Args:
        weight: Tensor of finite weights.
        bits: 2 to 8.
        blocks: Number of scales along each dimension.

    Example:
        >>> scales_of(torch.tensor([[1.0, -1.1, 0.1, 2.1], [0.5, 1.0, -1.5, 0.0]]), 3, (2, 1))
        tensor([[1.0469],
                [0.5000]])
    """
    low, high = bounds(bits)
    rows = blocked(weight.detach(), blocks).float()
    peak = rows.abs().amax(1, keepdim=True)
    widest = torch.where(peak > 0, peak / high, 1.0)

    best = few_digits(widest, bits, weight.dtype)
    least = torch.full_like(best, torch.inf)

    def improve(scales: Tensor) -> None:
        scales = few_digits(scales, bits, weight.dtype)
        error = (rows - _grid(rows, scales, low, high)).square().sum(1, keepdim=True)
        torch.where(error < least, scales, best, out=best)
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
    """Return the straight-through gradient of ``clip(round(levels), low, high)``.

    It is the gradient inside of the range, and 0 outside.

    Args:
        gradient: Gradient of the rounded levels.
        levels: Weights in units of their scales.
        low: Smallest integer.
        high: Largest integer.

    Example:
        >>> clipped(torch.ones(4), torch.tensor([-2.6, -2.4, 1.4, 1.6]), low=-2, high=1)
        tensor([0., 1., 1., 0.])
    """
    inside: Tensor = torch.ops.aten.hardtanh_backward(gradient, levels, low - 0.5, high + 0.5)
    return inside


def _grid(values: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    return (values / scales).round_().clamp_(low, high).mul_(scales)


def quantize_(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Round a weight in place to the nearest integers times scales, and return it.

    Args:
        weight: Tensor of weights.
        scales: Scales of its blocks, with as many dimensions as the weight.
        bits: 2 to 8.

    Example:
        >>> quantize_(torch.tensor([[0.3, -0.2, 9.0]]), torch.tensor([[0.25]]), bits=4)
        tensor([[ 0.2500, -0.2500,  1.7500]])
    """
    low, high = bounds(bits)
    wide = spread(scales, weight.shape)
    if weight.dtype in (torch.float32, torch.float64):
        # Adding 0 turns -0 into 0, which has other bits.
        return weight.div_(wide).round_().clamp_(low, high).mul_(wide).add_(0.0)
    return weight.copy_(quantize_(weight.float(), scales.float(), bits))


@dataclass(frozen=True)
class Quantize(Projection):
    r"""Nearest tensor on a grid of ``2^b`` levels for each channel, ``w = s q``.

    The scale has the least squared error, to within 2 % up to five bits and 10 % at eight. It has
    eight binary digits, or fewer in half precision. Zero is a level, so pruned weights stay zero.
    With 16 bits, weights are half-precision floats.

    Args:
        bits: 2 to 8, or 16.
        granularity: ``"channel"``, ``"tensor"``, or the size of groups of inputs of a channel.
        axis: Dimension of the output channels; 1 in transposed convolutions.
        form: Instead: dimensions of the weight, which may be a stack of matrices.

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
    form: Matrices | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (*range(2, 9), 16):
            raise ValueError(f"weights are of 2 to 8 bits, or of 16, and got bits={self.bits!r}")
        named = self.granularity in ("channel", "tensor")
        if not named and not (isinstance(self.granularity, int) and self.granularity >= 8):
            raise ValueError(
                "granularity is 'channel', 'tensor', or the size of a group, 8 or more, and got "
                f"{self.granularity!r}"
            )

    def along(self, form: Matrices) -> Projection:
        return replace(self, form=form)

    def refusal(self, shape: torch.Size) -> str | None:
        try:
            self._blocks(shape)
        except ValueError as error:
            return None if self.bits == 16 else str(error)
        return None

    def encode(self, weight: Tensor) -> Code:
        weight = weight.detach()
        if not weight.isfinite().all():
            raise ValueError("cannot quantize NaN or infinity: did training diverge?")
        if self.bits == 16:
            return Dense(half(weight))
        if weight.dim() == 0 or not weight.numel():
            return Dense(weight)
        blocks = self._blocks(weight.shape)
        scales = scales_of(weight, self.bits, blocks)
        low, high = bounds(self.bits)
        rows = blocked(weight, blocks) / blocked(scales, blocks)
        integers = rows.round_().clamp_(low, high).to(torch.int8)
        return Integer(Dense(scales), unblocked(integers, blocks, weight.shape))

    def levels(self, weight: Tensor, importance: Tensor) -> Levels:
        if self.bits == 16:
            return Levels()
        scales = scales_of(weight, self.bits, self._blocks(weight.shape))
        scales = spread(scales, weight.shape).expand(weight.shape)
        return Grid(scales, self.bits)

    def _blocks(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the number of scales along each dimension of a weight of this shape."""
        form = self.form or Matrices("", outputs=self.axis, inputs=1 - self.axis)
        return form.scale_shape(shape, self.granularity)

    def after(self, code: Code) -> Code:
        # Zero is a level of every grid.
        return self.encode(code.decode())


@dataclass(frozen=True)
class Grid(Levels):
    """Integers of so many bits times scales.

    Args:
        scales: Scale of each weight, of the weight's shape.
        bits: 2 to 8.
    """

    scales: Tensor
    bits: int

    def rearranged(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, scales=change(self.scales))

    def best(self, values: Tensor, column: int, curvature: Tensor) -> Tensor:
        return _grid(values, self.scales[..., column], *bounds(self.bits))


def half(weight: Tensor) -> Tensor:
    """Round a weight to float16, or to bfloat16 where float16 overflows; its dtype stays.

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
