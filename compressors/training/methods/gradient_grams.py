"""Gram matrices of a weight's gradients, averaged over training steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fitsmall.compressors.choices.loss_metric import LossMetric

__all__ = ["GradientGrams"]

# A side of up to this many outputs or inputs always has a whole matrix, of 4 MB at most.
_SMALL = 1024


class GradientGrams:
    r"""Averages of ``G G^T`` and ``G^T G`` over gradients ``G`` of a weight.

    A side of more than 1,024 outputs or inputs, such as a vocabulary, has only the diagonal of its
    matrix, unless both matrices together are no larger than the weight and its gradient.

    Gradients are divided by the largest entry of all so far: neither huge nor tiny ones overflow
    when they are squared. One that is zero or not finite says nothing, and is left out.

    Args:
        outputs: Average of ``G G^T`` or its diagonal, over the square of ``peak``.
        inputs: Average of ``G^T G`` or its diagonal, over the square of ``peak``.
        peak: Largest absolute value of all gradients.

    Example:
        >>> grams = GradientGrams.of(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> grams.peak, grams.outputs
        (2.0, tensor([[0.2500, 0.0000],
                [0.0000, 1.0000]]))
        >>> grams.update(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), rate=0.5)
        >>> grams.peak, grams.outputs
        (4.0, tensor([[0.1562, 0.0000],
                [0.0000, 0.6250]]))
    """

    def __init__(self, outputs: Tensor, inputs: Tensor, peak: float) -> None:
        self.outputs, self.inputs, self.peak = outputs, inputs, peak

    @classmethod
    def of(cls, gradient: Tensor) -> "GradientGrams | None":
        """Return the Gram matrices of one gradient; None if it says nothing."""
        peak = _peak(gradient)
        return cls(*_grams(gradient, peak), peak) if peak else None

    def update(self, gradient: Tensor, rate: float) -> None:
        """Move the averages towards a gradient, by a fraction of the distance."""
        peak = _peak(gradient)
        if peak > self.peak:
            for average in (self.outputs, self.inputs):
                average.mul_((self.peak / peak) ** 2)
            self.peak = peak
        if peak:
            grams = _grams(gradient, self.peak)
            for average, gram in zip((self.outputs, self.inputs), grams, strict=True):
                average.lerp_(gram, rate)

    @property
    def metric(self) -> LossMetric:
        """The distance that they define."""
        return LossMetric(self.outputs, self.inputs, self.peak)


def _peak(gradient: Tensor) -> float:
    """Return the largest absolute value of a gradient; 0 if no metric can be made of it."""
    peak = float(gradient.abs().max())
    return peak if 1e-25 < peak < 1e25 else 0.0


def _grams(gradient: Tensor, peak: float) -> tuple[Tensor, Tensor]:
    scaled = gradient.float() / peak
    outputs, inputs = scaled.flatten(1), scaled.transpose(0, 1).flatten(1)
    whole = _whole_sides(gradient.shape)
    return _gram(outputs, whole[0]), _gram(inputs, whole[1])


def _gram(rows: Tensor, whole: bool) -> Tensor:
    return rows @ rows.T if whole else rows.square().sum(1)


def _whole_sides(shape: Sequence[int]) -> tuple[bool, bool]:
    """Return whether outputs and inputs have a whole matrix.

    Example:
        >>> _whole_sides((300, 784)), _whole_sides((32000, 256)), _whole_sides((4096, 4096))
        ((True, True), (False, True), (True, True))
    """
    outputs, inputs = shape[:2]
    fits = outputs**2 + inputs**2 <= 2 * torch.Size(shape).numel()
    return fits or outputs <= _SMALL, fits or inputs <= _SMALL
