"""Input norms: the norm of each input feature of a layer, averaged over training steps."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fitsmall.compressors.torch_internals import in_backward
from fitsmall.compressors.weights import is_conv1d

__all__ = ["DECAY", "InputNorm"]

# Averages over about 100 steps: short enough to follow training, long enough to smooth batches.
DECAY = 0.99


class InputNorm:
    """A hook that collects the norm of each input feature of a layer in training.

    Squares are staged until :meth:`commit`, so that those of a skipped step can be dropped.

    Args:
        layer: A layer that :func:`~fitsmall.compressors.weights.is_product`.
        weight: Its weight, or the parameter that it computes its weight from.
    """

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        self.layer, self.weight = layer, weight
        self.squares: Tensor | None = None
        self.seen = False  # whether the layer was called before the backward pass
        self.handle: RemovableHandle | None = None

    def hook(self) -> None:
        self.handle = self.layer.register_forward_pre_hook(self, with_kwargs=True)

    def unhook(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        again = in_backward() and self.seen
        if layer.training and torch.is_grad_enabled() and not again:
            self.seen = not in_backward()
            features = -1 if self.weight.dim() == 2 else 1 - self.weight.dim()
            x: Tensor = next(iter((*inputs, *named.values())))
            rows = x.detach().float().movedim(features, -1).flatten(0, -2)
            squares = rows.square().sum(0)
            self.squares = squares if self.squares is None else self.squares + squares

    def zeros(self) -> Tensor:
        """Return norms of zero, in the shape that :meth:`commit` gives them."""
        weight = self.weight
        if is_conv1d(self.layer):
            return torch.zeros(len(weight), 1, device=weight.device)
        rows = len(weight) if getattr(self.layer, "groups", 1) > 1 else 1
        sides = (1,) * (weight.dim() - 2)
        return torch.zeros(rows, weight.shape[1], *sides, device=weight.device)

    def drop(self) -> None:
        """Drop the staged squares."""
        self.squares, self.seen = None, False

    def commit(self, statistics: dict[str, Tensor]) -> None:
        """Average the staged squares into ``statistics["input_norm"]``, which broadcasts to the
        weight."""
        staged = self.squares
        self.drop()
        if staged is None:
            return
        if is_conv1d(self.layer):
            squares = staged.unsqueeze(1)
        elif (groups := getattr(self.layer, "groups", 1)) > 1:
            squares = staged.view(groups, -1).repeat_interleave(len(self.weight) // groups, 0)
        else:
            squares = staged.unsqueeze(0)
        squares = squares.view(*squares.shape, *(1,) * (self.weight.dim() - 2))
        if "input_norm" in statistics:
            squares = statistics["input_norm"].square().lerp(squares, 1 - DECAY)
        statistics["input_norm"] = squares.sqrt()
