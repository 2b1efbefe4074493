"""Gradual pruning: fewer and fewer weights while training goes on."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fitsmall.callbacks.method import Method
from fitsmall.compressors.allocation import ALLOCATIONS, BY_SHAPE, Lazy
from fitsmall.compressors.criteria import CRITERIA
from fitsmall.compressors.dtypes import INTEGERS
from fitsmall.compressors.prune import kept, support
from fitsmall.compressors.schedules import Cubic, Schedule
from fitsmall.compressors.select import match
from fitsmall.compressors.training.sharding import gather, processes, shard, stack, unstack, whole

__all__ = ["GradualPruning"]

# Averages over about 100 steps follow the loss landscape as it changes and still smooth batches.
_DECAY = 0.99


class GradualPruning(Method):
    r"""Set ever more weights to zero: sparsity ``s(t) = sparsity * schedule(t)``.

    Zhu and Gupta (2017). Every ``every`` steps the weights with the smallest scores are chosen
    anew, exactly as many as the schedule says, and held at zero. All layers are pruned, the first
    and the last too, as in Han et al. (2015): under the default global threshold small and
    important layers keep more by themselves. Gale et al. (2019) keep the first convolution dense
    and prune the last layer less: ``exclude="conv1"``, ``overrides={"fc": 0.8}``.

    Args:
        sparsity: Final fraction of zeros, over all selected parameters together.
        criterion: What makes a weight matter: ``magnitude``, ``gradient``, ``activation``,
            ``hessian``, ``adam``, ``movement`` or ``random``, see
            :mod:`fitsmall.compressors.criteria`.
        allocation: How the sparsity is spread over tensors: ``global``, ``uniform``, ``erk`` or
            ``lamp``, see :mod:`fitsmall.compressors.allocation`.
        schedule: Strength as a function of progress through the window.
        start: Fraction of training at which pruning begins.
        stop: Fraction of training at which the final sparsity is reached.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between choices; by default 100 choices are spread over the window.
        coupling: ``"hard"``: pruned weights stay zero for good. ``"straight_through"``: the
            optimizer moves a dense latent weight by the gradient at the pruned one, so that
            weights can return (dynamic pruning with feedback, Lin et al., 2020).
        include: Patterns of parameter names that replace the default, the weights of Linear,
            Conv, Embedding and attention layers.
        exclude: Patterns of parameter names to leave out.
        overrides: Sparsity of their own for parameters by pattern; the others share
            ``sparsity`` among them.

    Example:
        >>> from fitsmall.callbacks import Plan
        >>> print(Plan([GradualPruning(0.9, stop=0.5)], nn.Linear(20, 10), horizon=1000))
        Compression plan
          GradualPruning: sparsity 0.9 (global magnitude), hard, steps 0 to 500
            1 tensors, 200 weights: weight
          left out (not the weight of a Linear, Conv, Embedding or attention layer): bias
    """

    place = 0

    def __init__(
        self,
        sparsity: float = 0.95,
        criterion: str = "magnitude",
        allocation: str = "global",
        schedule: Schedule | None = None,
        start: float = 0.0,
        stop: float = 0.7,
        start_step: int | None = None,
        stop_step: int | None = None,
        every: int | None = None,
        coupling: Literal["hard", "straight_through"] = "hard",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        overrides: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(start, stop, start_step, stop_step, every, include, exclude)
        self.overrides = self._overrides(overrides)
        for fraction in (sparsity, *self.overrides.values()):
            if not isinstance(fraction, int | float) or not 0.0 <= fraction <= 1.0:
                percent = ""
                if isinstance(fraction, int | float) and 1 < fraction <= 100:
                    percent = f": for {fraction:g} % write {fraction / 100:g}"
                raise MisconfigurationException(
                    f"GradualPruning: a sparsity is a fraction in [0, 1], got {fraction!r}{percent}"
                )
        for name, value, known in (
            ("criterion", criterion, list(CRITERIA)),
            ("allocation", allocation, list(ALLOCATIONS)),
            ("coupling", coupling, ["hard", "straight_through"]),
        ):
            if value not in known:
                raise MisconfigurationException(
                    f"GradualPruning: unknown {name} {value!r}, choose one of {', '.join(known)}"
                )
        self.sparsity, self.schedule = sparsity, self._schedule(schedule, Cubic())
        self.criterion, self.allocation, self.coupling = criterion, allocation, coupling
        # All bits of a kept weight, none of a pruned one; of this process's part of it.
        self.masks: dict[str, Tensor] = {}
        self.statistics: dict[str, dict[str, Tensor]] = {}
        self._norms: dict[str, _InputNorm] = {}
        # Adam's own averages of squared gradients, which its state saves already.
        self._adam: dict[str, Tensor] = {}

    @property
    def straight_through(self) -> bool:
        return self.coupling == "straight_through"

    @property
    def observes(self) -> bool:
        return bool(CRITERIA[self.criterion].statistics)

    def describe(self) -> str:
        own = f", {len(self.overrides)} overrides" if self.overrides else ""
        return f"sparsity {self.sparsity:g} ({self.allocation} {self.criterion}{own})"

    def strength(self, progress: float) -> float:
        return self.schedule(progress)

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        chosen = self.selection.chosen
        own = match(self.overrides, list(chosen))
        shared = {name: parameter for name, parameter in chosen.items() if name not in own}
        final = {name: kept(chosen[name].numel(), fraction) for name, fraction in own.items()}
        if self.allocation in BY_SHAPE:
            final |= ALLOCATIONS[self.allocation](shared, self.sparsity)
        elif shared and not kept(sum(p.numel() for p in shared.values()), self.sparsity):
            final |= dict.fromkeys(shared, 0)
        # A sparsity of exactly 1 is how a layer is switched off.
        for name, keep in final.items():
            target = own.get(name, self.sparsity)
            if not keep and target < 1:
                raise MisconfigurationException(
                    f"GradualPruning: a sparsity of {target:g} leaves none of the "
                    f"{chosen[name].numel():,} weights of {name}: lower it, exclude the parameter, "
                    f"or give it its own with overrides={{{name!r}: ...}}"
                )
        if "input_norm" in CRITERIA[self.criterion].statistics:
            self._norms = {name: _InputNorm(module, name) for name in self.selection.chosen}

    def hook(self) -> None:
        for norm in self._norms.values():
            norm.hook()

    def unhook(self) -> None:
        for norm in self._norms.values():
            norm.unhook()

    def reset(self) -> None:
        self.masks, self.statistics, self._adam = {}, {}, {}

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        (statistic,) = CRITERIA[self.criterion].statistics
        mine = self.statistics.setdefault(name, {})
        if statistic == "squared_gradient" and "exp_avg_sq" in state:
            self._adam[name] = state["exp_avg_sq"]
            mine.clear()
        elif statistic == "input_norm":
            self._norms[name].commit(mine)
        elif gradient is not None:
            average = mine.setdefault(statistic, torch.zeros_like(gradient))
            if statistic == "movement":
                average.sub_(weight.detach() * gradient)
            else:
                term = gradient.square() if statistic == "squared_gradient" else gradient
                average.lerp_(term, 1 - _DECAY)

    def skip(self, names: Collection[str]) -> None:
        for name in self._norms.keys() & names:
            self._norms[name].squares = None

    def holds(self, name: str) -> bool:
        return name in self.masks

    def ready(self, name: str) -> bool:
        needed = CRITERIA[self.criterion].statistics
        return name in self._adam or self.statistics.get(name, {}).keys() >= {*needed}

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        # Gradients are the same on all processes, the inputs of layers are each one's own.
        _, world = processes()
        if world > 1:
            for name, norm in self._norms.items():  # of layers that some process may not have used
                mine = self.statistics.setdefault(name, {})
                squares = mine.get("input_norm", norm.zeros()).square()
                seen = squares.new_tensor(float("input_norm" in mine))
                for total in (squares, seen):
                    torch.distributed.all_reduce(total)
                if seen:
                    mine["input_norm"] = squares.div_(seen).sqrt_()
        # What has seen no gradient yet waits for the next choice.
        ready = [name for name in weights if self.ready(name)]
        own = match(self.overrides, list(self.selection.chosen))
        shared = [name for name in ready if name not in own]
        keep = ALLOCATIONS[self.allocation](
            Lazy(shared, lambda name: self._score(name, weights[name])), self.sparsity * strength
        )
        for name in ready:
            parameter = self.selection.chosen[name]
            if name in own:
                keep[name] = kept(parameter.numel(), own[name] * strength)
            mask = support(self._score(name, weights[name]), keep[name])
            self.masks[name] = _bits(shard(mask, parameter))

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        # On the bits, since a product would leave -0 of negative weights.
        mask = self.masks.get(name)
        if mask is not None:
            weight.view(INTEGERS[weight.dtype.itemsize]).bitwise_and_(mask)

    def choices(self) -> dict[str, Any]:
        chosen = self.selection.chosen
        masks = {name: gather(mask, chosen[name]) != 0 for name, mask in self.masks.items()}
        statistics = {
            name: {
                # Each process has seen other inputs since they were last put together.
                key: stack(tensor) if key == "input_norm" else gather(tensor, chosen[name])
                for key, tensor in mine.items()
            }
            for name, mine in self.statistics.items()
        }
        return {"masks": masks, "statistics": statistics}

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        self._adam = {}
        self.masks = {
            name: _bits(shard(mask.to(parameters[name].device), parameters[name]))
            for name, mask in choices["masks"].items()
        }
        self.statistics = {
            name: {
                key: _own(tensor.to(parameters[name].device))
                if key == "input_norm"
                else shard(tensor.to(parameters[name].device), parameters[name])
                for key, tensor in mine.items()
            }
            for name, mine in choices["statistics"].items()
        }

    def _score(self, name: str, weight: Tensor) -> Tensor:
        statistics = {
            key: tensor if key == "input_norm" else gather(tensor, self.selection.chosen[name])
            for key, tensor in self.statistics.get(name, {}).items()
        }
        if name in self._adam:
            statistics["squared_gradient"] = whole(self._adam[name])
        score = CRITERIA[self.criterion].score(weight, statistics)
        if name in self.masks and not self.straight_through:
            # What is pruned hard does not return, whatever one update made of it.
            mask = gather(self.masks[name], self.selection.chosen[name])
            score = score.masked_fill(mask == 0, -torch.inf)
        return score


def _own(norms: Tensor) -> Tensor:
    """This process's norms; all others' too if there are more or fewer processes now."""
    own = unstack(norms)
    return own if own is not None else norms.square().mean(0).sqrt()


def _bits(mask: Tensor) -> Tensor:
    """-1, which is all bits of an integer of any width, for true, and 0 for false."""
    return mask.to(torch.int8).neg_()


class _InputNorm:
    """Collects the squared norm of each input feature of a layer during training."""

    def __init__(self, module: nn.Module, name: str) -> None:
        layer = module.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise MisconfigurationException(
                f"GradualPruning: the activation criterion needs the inputs of a Linear or Conv "
                f"layer, and {name} belongs to a {type(layer).__name__}: exclude it, or choose "
                "another criterion"
            )
        self.layer = layer
        self.squares: Tensor | None = None
        self.handle: RemovableHandle | None = None

    def hook(self) -> None:
        self.handle = self.layer.register_forward_pre_hook(self)

    def unhook(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if layer.training and torch.is_grad_enabled():
            features = -1 if isinstance(layer, nn.Linear) else 1 - self.layer.weight.dim()
            rows = inputs[0].detach().float().movedim(features, -1).flatten(0, -2)
            squares = rows.square().sum(0)
            self.squares = squares if self.squares is None else self.squares + squares

    def zeros(self) -> Tensor:
        """A norm of nothing."""
        weight = self.layer.weight
        rows = len(weight) if getattr(self.layer, "groups", 1) > 1 else 1
        sides = (1,) * (weight.dim() - 2)
        return torch.zeros(rows, weight.shape[1], *sides, device=weight.device)

    def commit(self, statistics: dict[str, Tensor]) -> None:
        """Move what was staged since the last step, shaped like the weight's rows, to the norm."""
        staged, self.squares = self.squares, None
        if staged is None:
            return
        groups = getattr(self.layer, "groups", 1)
        weight = self.layer.weight
        per_group = staged.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
        squares = per_group.view(*per_group.shape, *(1,) * (weight.dim() - 2))
        squares = squares if groups > 1 else squares[:1]
        if "input_norm" in statistics:
            squares = statistics["input_norm"].square().lerp(squares, 1 - _DECAY)
        statistics["input_norm"] = squares.sqrt()
