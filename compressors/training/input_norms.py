"""Input norms: the norm of each input feature of a layer, averaged over training steps."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["DECAY", "InputNorm"]

# Averages over about 100 steps: short enough to follow training, long enough to smooth batches.
DECAY = 0.99


class InputNorm:
    """A hook that collects the norm of each input feature of a layer in training.

    Squares are staged until :meth:`commit`, so that those of a skipped step can be dropped.

    Args:
        module: Module of the layer.
        name: Name of the layer's weight.

    Raises:
        ValueError: The weight belongs to no Linear or Conv layer.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        layer = module.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise ValueError(  # noqa: TRY004  a mistake of settings
                f"GradualPruning: the activation criterion needs the inputs of a Linear or Conv "
                f"layer, and {name} belongs to a {type(layer).__name__}: exclude it, or choose "
                "another criterion"
            )
        self.layer = layer
        self.squares: Tensor | None = None
        self.handle: RemovableHandle | None = None

    def hook(self) -> None:
        self.handle = self.layer.register_forward_pre_hook(self, with_kwargs=True)

    def unhook(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if layer.training and torch.is_grad_enabled():
            features = -1 if isinstance(layer, nn.Linear) else 1 - self.layer.weight.dim()
            x = inputs[0] if inputs else named["input"]
            rows = x.detach().float().movedim(features, -1).flatten(0, -2)
            squares = rows.square().sum(0)
            self.squares = squares if self.squares is None else self.squares + squares

    def zeros(self) -> Tensor:
        """Return norms of zero, in the shape that :meth:`commit` gives them."""
        weight = self.layer.weight
        rows = len(weight) if getattr(self.layer, "groups", 1) > 1 else 1
        sides = (1,) * (weight.dim() - 2)
        return torch.zeros(rows, weight.shape[1], *sides, device=weight.device)

    def commit(self, statistics: dict[str, Tensor]) -> None:
        """Average the staged squares into ``statistics["input_norm"]``, which broadcasts to the
        weight."""
        staged, self.squares = self.squares, None
        if staged is None:
            return
        groups = getattr(self.layer, "groups", 1)
        weight = self.layer.weight
        per_group = staged.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
        squares = per_group.view(*per_group.shape, *(1,) * (weight.dim() - 2))
        squares = squares if groups > 1 else squares[:1]
        if "input_norm" in statistics:
            squares = statistics["input_norm"].square().lerp(squares, 1 - DECAY)
        statistics["input_norm"] = squares.sqrt()
