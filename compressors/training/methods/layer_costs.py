"""Costs of layers: their weights, and the multiply-adds of one step of training."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from fitsmall.compressors.surgery.factorable import places, unit_costs
from fitsmall.compressors.torch_internals import in_backward
from fitsmall.compressors.training.sharding import processes
from fitsmall.compressors.weights import is_product

__all__ = ["LayerCosts"]


class LayerCosts:
    """The cost of each layer of a module, in weights (``"size"``) and multiply-adds (``"flops"``).

    Hooks count the positions at which a layer computes outputs in the first step of training that
    calls it. Before a step has called it, and if none ever does, its multiply-adds are 0.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Any] = {}
        self._num_parameters = 0
        self._meters: dict[str, RemovableHandle] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all positions."""
        # By layer: positions at which it computes outputs, and at which the first layer of a
        # separable pair would; of this process, and of all together.
        self._own: dict[str, tuple[float, float]] = {}
        self._positions: dict[str, tuple[float, float]] = {}

    def attach(self, module: nn.Module) -> None:
        """Take the layers of a module."""
        self.layers = {n: layer for n, layer in module.named_modules() if is_product(layer)}
        parameters = module.parameters()
        self._num_parameters = sum(p.numel() for p in parameters if not is_lazy(p))
        # Layers that another stage has replaced are gone.
        self._own, self._positions = (
            {name: both for name, both in counted.items() if name in self.layers}
            for counted in (self._own, self._positions)
        )

    def hook(self) -> None:
        """Register hooks that count the positions of layers that have not been called yet."""
        for name in self.layers.keys() - self._own.keys() - self._positions.keys():
            meter = _Meter(self._own, name)
            self._meters[name] = self.layers[name].register_forward_hook(meter, with_kwargs=True)

    def unhook(self) -> None:
        """Remove these hooks."""
        while self._meters:
            self._meters.popitem()[1].remove()

    def close(self) -> None:
        """End a step: remove the hooks of layers that it has called."""
        for name in self._meters.keys() & self._own.keys():
            self._meters.pop(name).remove()

    def synchronize(self, device: torch.device) -> None:
        """Add up the positions that all processes have counted, so that all choose alike."""
        if processes()[1] > 1:
            counts = [self._own.get(name, (0.0, 0.0)) for name in self.layers]
            totals = torch.tensor(counts, dtype=torch.float32, device=device)
            dist.all_reduce(totals)
            found = zip(self.layers, totals.tolist(), strict=True)
            self._own.update((name, (after, between)) for name, (after, between) in found if after)
        self._positions = {**self._own, **self._positions}
        self._own.clear()

    def dense(self, name: str, kind: str) -> float:
        """Return the cost of the layer of a weight as it is."""
        path = name.rpartition(".")[0]
        # The weight, or what it is computed from, is a layer's largest parameter.
        size = max(parameter.numel() for parameter in self.layers[path].parameters())
        return float(self._places(path, kind)[0] * size)

    def units(self, name: str, kind: str) -> dict[str, float]:
        """Return the cost of one rank of the layer of a weight, by form."""
        path = name.rpartition(".")[0]
        return unit_costs(self.layers[path], *self._places(path, kind))

    def least(self, name: str, kind: str) -> float:
        """Return the lowest cost that the layer of a weight can have, with a rank of 1."""
        return min(self.dense(name, kind), *self.units(name, kind).values())

    def total(self, kind: str) -> float:
        """Return the cost of all layers, or the number of all parameters."""
        if kind == "size":
            return self._num_parameters
        return sum(self.dense(f"{path}.weight", kind) for path in self._positions)

    def _places(self, path: str, kind: str) -> tuple[float, float]:
        return (1.0, 1.0) if kind == "size" else self._positions.get(path, (0.0, 0.0))

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """Return the positions, of this process and of all together."""
        return {
            kind: {name: list(both) for name, both in positions.items()}
            for kind, positions in (("own", self._own), ("all", self._positions))
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, list[float]]]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        self._own = {name: (a, b) for name, (a, b) in state["own"].items()}
        self._positions = {name: (a, b) for name, (a, b) in state["all"].items()}


class _Meter:
    """A hook that counts the positions at which a layer computes outputs in training."""

    def __init__(self, positions: dict[str, tuple[float, float]], name: str) -> None:
        self.positions, self.name = positions, name

    def __call__(
        self, layer: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        # Neither is true in validation; one is in a frozen part, which has no gradients or is in
        # evaluation mode.
        again = in_backward() and self.name in self.positions
        if not again and (layer.training or torch.is_grad_enabled()):
            after, between = places(layer, next(iter((*inputs, *named.values()))), output)
            before = self.positions.get(self.name, (0.0, 0.0))
            self.positions[self.name] = before[0] + after, before[1] + between
