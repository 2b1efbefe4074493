"""The plan: all methods of a run as one chain per parameter, executed around each optimizer step.

With ``u`` the latent weight that the optimizer moves, and methods 1 to m in list order, a step is

1. forward and backward at ``w = P_m(...P_1(u))``;
2. ``w <- u`` just before the update (gradients are unscaled by then);
3. ``u <- update(u, gradient at w)``;
4. hard methods project the latent itself, ``u <- P(u)``, then straight-through ones ``w <- P(u)``.

Parameters stay plain leaves of the module: only their values change. Latents ride in the
optimizer's state, so that Lightning's checkpoints hold them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from pressfit.callbacks.method import Method

__all__ = ["Plan"]

LATENT = "latent"


class Plan:
    """Gathers methods, checks that they fit together, prints them, and executes them.

    ``print(Plan([GradualPruning(), WeightSharing()], module))`` shows what would happen without
    training; with ``horizon`` the windows are shown in steps.

    Args:
        methods: Callbacks in the Trainer's order, which is the order of composition.
        module: Module whose parameters they act on.
        horizon: Optimizer steps of the training, where known.

    Raises:
        MisconfigurationException: Two methods cannot act on one parameter in this order.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        module: nn.Module,
        horizon: float | None = None,
    ) -> None:
        self.methods, self.module = tuple(methods), module
        self.step = 0
        self.windows: dict[Method, tuple[int, int]] = {}
        for method in self.methods:
            method.attach(module)
        self.names = {
            parameter: name
            for method in self.methods
            for name, parameter in method.selection.chosen.items()
        }
        self._check()
        self._optimizers: list[Optimizer] = []
        self._restored: list[Optimizer] = []
        self._members: dict[Optimizer, tuple[list[int], dict[str, nn.Parameter]]] = {}
        self._stepping = False
        self._hooks: list[RemovableHandle] = []
        if horizon is not None:
            self.begin(horizon)

    def __str__(self) -> str:
        lines = ["Compression plan"]
        for method in self.methods:
            window = self.windows.get(method)
            when = f"steps {window[0]:,} to {window[1]:,}" if window else _words(method)
            coupling = "straight-through" if method.straight_through else "hard"
            chosen = method.selection.chosen
            weights = sum(parameter.numel() for parameter in chosen.values())
            lines.append(f"  {type(method).__name__}: {method.describe()}, {coupling}, {when}")
            lines.append(f"    {len(chosen)} tensors, {weights:,} weights: {', '.join(chosen)}")
        touched = set(self.names.values())
        skipped = {
            name: reason
            for method in self.methods
            for name, reason in method.selection.skipped.items()
            if name not in touched
        }
        for reason in dict.fromkeys(skipped.values()):
            names = [name for name, why in skipped.items() if why == reason]
            lines.append(f"  left out ({reason}): {', '.join(names)}")
        return "\n".join(lines)

    def chain(self, name: str) -> list[Method]:
        """The methods that act on a parameter, in order."""
        return [method for method in self.methods if name in method.selection.chosen]

    def begin(self, horizon: float) -> None:
        """Fix every method's window, for a training of ``horizon`` optimizer steps.

        A method that has begun keeps the window it has: what is pruned would return otherwise.
        """
        for method in self.methods:
            if method.chosen_at is None or method.span is None:
                method.span = method.window(horizon)
            self.windows[method] = method.span

    def hook(self, optimizers: Iterable[Optimizer]) -> None:
        """Project after every update of these optimizers, until :meth:`unhook`."""
        self._optimizers = list(optimizers)
        self._hooks = [
            optimizer.register_step_post_hook(self._after_step) for optimizer in self._optimizers
        ]
        for method in self.methods:
            method.hook()

    def orphans(self) -> list[str]:
        """Parameters of the plan that no optimizer holds."""
        held = {name for optimizer in self._optimizers for name in self._parameters(optimizer)}
        return [name for name in self.names.values() if name not in held]

    def unhook(self) -> None:
        """Leave optimizers and module as they were found."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        for method in self.methods:
            method.unhook()

    @torch.no_grad()
    def restore_(self, optimizer: Optimizer) -> None:
        """Give the optimizer back the latents of its parameters, once statistics have seen both the
        projected weights and their gradients."""
        parameters = self._parameters(optimizer)
        for method in self.methods:
            if method.observes:
                for name, parameter in parameters.items():
                    if name in method.selection.chosen:
                        method.observe(name, parameter, optimizer.state.get(parameter, {}))
        for parameter in parameters.values():
            latent = optimizer.state.get(parameter, {}).get(LATENT)
            if latent is not None:
                parameter.copy_(latent)
        self._restored.append(optimizer)
        self._stepping = True

    def advance(self) -> None:
        """End a batch: count it if it stepped. A gradient scaler may have skipped the update."""
        self.settle()
        self.step += self._stepping
        self._stepping = False

    @torch.no_grad()
    def settle(self) -> None:
        """Project what was restored and not updated, with all choices as they are."""
        while self._restored:
            self._project_(self._restored.pop(), choose=False)

    @torch.no_grad()
    def finish(self) -> list[str]:
        """Leave every parameter projected; returns a warning for each method cut short."""
        self.settle()
        for optimizer in self._optimizers:
            for name, parameter in self._parameters(optimizer).items():
                # What no step ever touched; the others are projected, and their latents stay.
                if LATENT not in optimizer.state.get(parameter, {}):
                    for method in self.chain(name):
                        if method.chosen_at is not None:
                            method.project_(name, parameter, self._strength(method, self.step))
        return [
            f"{type(method).__name__}: training ended at step {self.step:,}, before the window "
            f"{first:,} to {last:,} did; it has not reached its full strength"
            for method, (first, last) in self.windows.items()
            if self.step < last
        ]

    def latents(self) -> dict[str, Tensor]:
        """Latent weights by name, of the parameters that have one."""
        return {
            name: optimizer.state[parameter][LATENT]
            for optimizer in self._optimizers
            for name, parameter in self._parameters(optimizer).items()
            if LATENT in optimizer.state.get(parameter, {})
        }

    def distance(self) -> float:
        """Distance from the feasible set, relative: ``||u - w|| / ||u||`` over all latents.

        Zero while no method keeps a latent: hard methods act on the weight itself.
        """
        parameters = {name: parameter.detach() for parameter, name in self.names.items()}
        latents = self.latents()
        gap = sum(float((u - parameters[name]).square().sum()) for name, u in latents.items())
        norm = sum(float(u.square().sum()) for u in latents.values())
        return float((gap / norm) ** 0.5) if norm else 0.0

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Without a restore this is a step outside of Lightning's loop, which is none of ours.
        if optimizer in self._restored:
            self._restored.remove(optimizer)
            self._project_(optimizer, choose=True)

    def _project_(self, optimizer: Optimizer, choose: bool) -> None:
        """Project the parameters of one optimizer, which hold what the first method sees."""
        step = self.step + 1 if choose else self.step
        parameters = self._parameters(optimizer)
        saved: set[str] = set()
        anew = False
        for method in self.methods:
            mine = [name for name in method.selection.chosen if name in parameters]
            if not mine or (method.chosen_at is None and not (choose and self._due(method, step))):
                continue
            if method.straight_through:
                for name in [name for name in mine if name not in saved]:
                    if self._save(optimizer, parameters[name]):
                        saved.add(name)
                mine = [name for name in mine if name in saved]
            # What an earlier method of the chain chose anew changes what this one sees.
            strength = self._strength(method, step)
            if choose and (anew or self._due(method, step)):
                anew = True
                method.choose(self._seen(method, parameters), strength)
                method.chosen_at = step
            for name in mine:
                method.project_(name, parameters[name], strength)

    def _strength(self, method: Method, step: int) -> float:
        first, last = self.windows[method]
        return method.strength(min(1.0, (step - first) / max(1, last - first)))

    def _due(self, method: Method, step: int) -> bool:
        first, last = self.windows[method]
        if step <= first:
            return False
        if method.chosen_at is None:
            return True
        every = method.every or max(1, (last - first) // 100)
        return method.chosen_at < last and (step - method.chosen_at >= every or step >= last)

    def _save(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        """Copy a parameter to its latent. Before its first update there is none to keep: many
        optimizers take a non-empty state for an initialised one."""
        state = optimizer.state.get(parameter, {})
        if not state and parameter.grad is None:
            return False
        if LATENT in state:
            state[LATENT].copy_(parameter)
        else:
            optimizer.state[parameter][LATENT] = parameter.detach().clone()
        return True

    def _seen(self, method: Method, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights of a method; another optimizer's parameters as their latents."""
        latents, orphans = self.latents(), set(self.orphans())
        return {
            name: parameters[name] if name in parameters else latents.get(name, parameter)
            for name, parameter in method.selection.chosen.items()
            if name not in orphans
        }

    def _parameters(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """The plan's parameters among those of an optimizer."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        known, parameters = self._members.get(optimizer, ([], {}))
        if known != sizes:  # parameters may join an optimizer during training
            parameters = {
                self.names[parameter]: parameter
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter in self.names
            }
            self._members[optimizer] = sizes, parameters
        return parameters

    def _check(self) -> None:
        for name in self.names.values():
            chain = self.chain(name)
            for before, after in itertools.pairwise(chain):
                first, second = type(before).__name__, type(after).__name__
                if after.place == before.place:
                    raise MisconfigurationException(
                        f"{first} and {second} both act on {name}: leave it out of one of them "
                        f"with exclude={name!r}"
                    )
                if after.place < before.place:
                    raise MisconfigurationException(
                        f"{first} before {second} on {name} makes no sense, since the second undoes "
                        f"the first: list {second} first"
                    )
                if before.straight_through and not after.straight_through:
                    raise MisconfigurationException(
                        f"{second} on {name} projects the latent weight itself and cannot follow "
                        f"{first}, which is straight-through: list it first"
                    )


def _words(method: Method) -> str:
    bounds = []
    for name in ("start", "stop"):
        step, fraction = getattr(method, f"{name}_step"), getattr(method, name)
        bounds.append(f"step {step:,}" if step is not None else f"{fraction:g} of training")
    return f"from {bounds[0]} to {bounds[1]}"
