"""Statistics of weights for a criterion, collected during training."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fitsmall.compressors.choices.criteria import uniform_noise
from fitsmall.compressors.select import Selection
from fitsmall.compressors.training.input_norms import DECAY, InputNorm
from fitsmall.compressors.training.sharding import (
    gather,
    processes,
    shard,
    shared_seed,
    stack,
    unstack,
    whole,
)
from fitsmall.compressors.weights import is_product, owner

__all__ = ["Statistics"]

# Update of an average, given the weight that the forward pass saw, and its gradient.
_UPDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "gradient": lambda average, weight, gradient: average.lerp_(gradient, 1 - DECAY),
    "squared_gradient": lambda average, weight, gradient: average.lerp_(
        gradient.square(), 1 - DECAY
    ),
    "movement": lambda average, weight, gradient: average.sub_(weight * gradient),
}


class Statistics:
    """The statistics of every weight of a stage.

    Args:
        needed: Names from :data:`~fitsmall.compressors.choices.criteria.STATISTICS`.

    Attributes:
        seed: Seed of the uniform numbers; None before training begins.
    """

    def __init__(self, needed: Collection[str]) -> None:
        self.needed = tuple(needed)
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._norms: dict[str, InputNorm] = {}
        self.reset()

    @property
    def of_gradients(self) -> bool:
        """Whether :meth:`observe` collects anything."""
        return bool({*self.needed} - {"uniform"})

    def reset(self) -> None:
        """Forget all statistics."""
        # By weight and statistic, of this process's part of the weight and of its own inputs.
        self._own: dict[str, dict[str, Tensor]] = {}
        # Adam's own averages of squared gradients; its state dict saves them.
        self._adam: dict[str, Tensor] = {}
        # Gradients are the same on all processes, which therefore agree on these names.
        self._with_gradient: set[str] = set()
        self.seed: int | None = None

    def drop(self, names: Collection[str]) -> None:
        """Forget the statistics of weights whose shapes have changed."""
        for name in names:
            self._own.pop(name, None)
            self._adam.pop(name, None)

    def attach(
        self,
        module: nn.Module,
        selection: Selection,
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        """Collect for the selected weights of a module.

        Args:
            module: The module.
            selection: The weights; :meth:`refusal` refuses none of them.
            parameters: All parameters of the module by name.
        """
        self._parameters = parameters
        # Layers that were replaced are gone.
        self._own = {name: own for name, own in self._own.items() if name in parameters}
        self._adam = {name: own for name, own in self._adam.items() if name in parameters}
        if "input_norm" in self.needed:
            self._norms = {
                name: InputNorm(module.get_submodule(selection.forms[name].layer), weight)
                for name, weight in selection.chosen.items()
            }

    def refusal(self, module: nn.Module, name: str) -> str | None:
        """Return the reason why a weight has no such statistics, or None if it has them."""
        layer = owner(module, name)[1]
        if "input_norm" not in self.needed or is_product(layer):
            return None
        return f"inputs of {type(layer).__name__} have no norms"

    def hook(self) -> None:
        """Register hooks that collect the norms of inputs, where a criterion needs them."""
        for norm in self._norms.values():
            norm.hook()

    def unhook(self) -> None:
        """Remove these hooks."""
        for norm in self._norms.values():
            norm.unhook()

    def begin(self) -> None:
        """Take the seed of the run for uniform numbers, unless a checkpoint had one."""
        if self.seed is None and "uniform" in self.needed:
            self.seed = shared_seed()

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        """Update the statistics of a weight, see
        :meth:`~fitsmall.compressors.training.Stage.observe`."""
        collected = self._own.setdefault(name, {})
        if gradient is not None:
            self._with_gradient.add(name)
        for kind in self.needed:
            if kind == "squared_gradient" and "exp_avg_sq" in state:
                self._adam[name] = state["exp_avg_sq"]
                collected.pop(kind, None)
            elif kind == "input_norm":
                self._norms[name].commit(collected)
            elif gradient is not None and kind in _UPDATES:
                # In half precision squares underflow, and averages stop to move.
                wide = _wide(gradient)
                if kind not in collected:
                    collected[kind] = torch.zeros_like(wide)
                _UPDATES[kind](collected[kind], weight.detach(), wide)

    def discard(self, names: Collection[str]) -> None:
        """Drop the inputs of a step of these weights, which is skipped."""
        for name in self._norms.keys() & names:
            self._norms[name].drop()

    def is_ready(self, name: str) -> bool:
        """Return whether a choice can be made for a weight, the same on every process.

        With several processes, a weight that has a gradient has had inputs on some of them, which
        :meth:`synchronize` shares.
        """
        if "input_norm" in self.needed and processes()[1] > 1:
            return name in self._with_gradient
        return self.has_all(name)

    def has_all(self, name: str) -> bool:
        """Return whether this process has all statistics of a weight, after synchronization."""
        known = {*self._own.get(name, {}), "uniform"}
        if name in self._adam:
            known.add("squared_gradient")
        return known.issuperset(self.needed)

    def synchronize(self) -> None:
        """Average the norms of inputs over all processes; gradients are the same on all."""
        if processes()[1] == 1:
            return
        for name, norm in self._norms.items():  # also of layers that this process has not used
            collected = self._own.setdefault(name, {})
            squares = collected.get("input_norm", norm.zeros()).square()
            seen = squares.new_tensor(float("input_norm" in collected))
            for total in (squares, seen):
                torch.distributed.all_reduce(total)
            if seen:
                collected["input_norm"] = squares.div_(seen).sqrt_()

    def of(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Return the statistics of a whole weight; a collective operation if it is sharded."""
        found = {
            kind: tensor if kind == "input_norm" else gather(tensor, self._parameters[name])
            for kind, tensor in self._own.get(name, {}).items()
        }
        if name in self._adam:
            found["squared_gradient"] = whole(self._adam[name])
        if "uniform" in self.needed and self.seed is not None:
            found["uniform"] = uniform_noise(name, weight.shape, self.seed).to(weight.device)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, whole statistics, and the norms of inputs of each process."""
        own = {
            name: {
                # Since the last average over processes, each has seen other inputs.
                kind: stack(tensor)
                if kind == "input_norm"
                else gather(tensor, self._parameters[name])
                for kind, tensor in collected.items()
            }
            for name, collected in self._own.items()
        }
        return {"seed": self.seed, "statistics": own}

    def load_state_dict(
        self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Take over the state that :meth:`state_dict` returned.

        Args:
            state: The state.
            parameters: Parameters of the module by name.
        """
        self._adam, self.seed = {}, state["seed"]
        self._with_gradient = set(state["statistics"])
        self._own = {
            name: {
                kind: _of_this_process(tensor.to(parameters[name].device))
                if kind == "input_norm"
                else shard(_wide(tensor).to(parameters[name].device), parameters[name])
                for kind, tensor in collected.items()
            }
            for name, collected in state["statistics"].items()
        }


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in single precision or more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _of_this_process(norms: Tensor) -> Tensor:
    """Return this process's norms, or the mean of all if the number of processes changed."""
    own = unstack(norms)
    return own if own is not None else norms.square().mean(0).sqrt()
