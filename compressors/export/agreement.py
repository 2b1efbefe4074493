"""Agreement of two networks: differences of outputs, and of the predictions that they decide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fitsmall.compressors.export.tracing import Arguments, outputs_of
from fitsmall.compressors.surgery.quantizers import ActivationQuantizer

__all__ = ["Agreement", "agreement_of", "sensitivity"]

# Errors of an engine before an input is rounded, as a fraction of the input's range: onnxruntime
# rounds biases to products of two scales, of which an output has thousands.
_NOISE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """The agreement of an engine's outputs with those of the module in float32.

    A prediction is the index of an example's largest output. Its margin is the distance to the
    second largest. A difference of outputs above the margin may change a prediction for no other
    reason than rounding, and such examples do not count.

    Args:
        difference: Largest difference of an output, relative to the largest output.
        equal: Fraction of equal predictions, among examples whose margin exceeds the difference.
        decided: Number of these examples.
        examples: Number of all examples.

    Example:
        >>> print(Agreement(difference=0.0131, equal=1.0, decided=51, examples=64))
        outputs differ by 0.013 of the largest, and of 64 examples 51 have a margin above that: ...
    """

    difference: float
    equal: float
    decided: int
    examples: int

    def __str__(self) -> str:
        predictions = f": {100 * self.equal:.2f} % of their predictions are equal"
        return (
            f"outputs differ by {self.difference:.2g} of the largest, and of {self.examples:,} "
            f"examples {self.decided:,} have a margin above that"
            f"{predictions if self.decided else ''}"
        )


def agreement_of(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Agreement:
    """Return the agreement of two lists of outputs, in the output that agrees least.

    Args:
        expected: Outputs of the module, each with examples in the first dimension.
        found: Outputs of an engine.

    Example:
        >>> agreement_of([torch.tensor([[0.0, 4.0], [1.0, 1.25]])],
        ...              [torch.tensor([[0.0, 4.0], [1.5, 1.25]])])
        Agreement(difference=0.125, equal=1.0, decided=1, examples=2)
    """
    each = [_of_output(mine, theirs) for mine, theirs in zip(expected, found, strict=True)]
    worst = max((a.difference for a in each), key=lambda d: math.inf if math.isnan(d) else d)
    least = min(each, key=lambda a: (a.equal, -a.examples, a.decided))
    return Agreement(worst, least.equal, least.decided, least.examples)


def sensitivity(module: nn.Module, arguments: Arguments, expected: Sequence[Tensor]) -> float:
    """Return the difference of a module's outputs from those with noise before its quantizers.

    Noise is uniform, up to 1e-4 of the range of a quantizer. A value that it moves to the next
    level may move values of later layers, and so on: in a deep network that was hardly trained,
    outputs may differ by a third of the largest, and no engine agrees better.

    Args:
        module: Module with quantizers of inputs.
        arguments: Arguments of its forward.
        expected: Outputs without noise.
    """
    generator = torch.Generator().manual_seed(0)

    def add_noise(quantizer: ActivationQuantizer, inputs: tuple[Tensor]) -> tuple[Tensor]:
        reach = _NOISE * quantizer.high * quantizer.log_scale.exp()
        return (inputs[0] + reach * (2 * torch.rand(inputs[0].shape, generator=generator) - 1),)

    quantizers = [layer for layer in module.modules() if isinstance(layer, ActivationQuantizer)]
    handles = [quantizer.register_forward_pre_hook(add_noise) for quantizer in quantizers]
    try:
        return agreement_of(expected, outputs_of(module, arguments)).difference
    finally:
        for handle in handles:
            handle.remove()


def _of_output(mine: Tensor, theirs: Tensor) -> Agreement:
    examples = len(mine) if mine.dim() else 0
    if mine.shape != theirs.shape:
        return Agreement(math.inf, 0.0, 0, examples)
    if not mine.numel():
        return Agreement(0.0, 1.0, 0, examples)
    mine, theirs = mine.double(), theirs.double()
    # Infinity is the logit of what is masked.
    apart = float(torch.where(mine == theirs, 0.0, (mine - theirs).abs()).max())
    scale = float(mine[mine.isfinite()].abs().max()) if mine.isfinite().any() else 0.0
    decided, equal = 0, 1.0
    if mine.dim() > 1 and mine[0].numel() > 1:
        rows = mine.flatten(1)
        first, second = rows.topk(2).values.T
        clear = first - second > apart
        same = rows.argmax(1) == theirs.flatten(1).argmax(1)
        decided = int(clear.sum())
        equal = float(same[clear].double().mean()) if decided else 1.0
    return Agreement(apart / (scale or 1.0), equal, decided, examples)
