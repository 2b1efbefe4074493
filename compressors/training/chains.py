"""Chains: the stages that act on each parameter, in order, and how they project it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fitsmall.compressors.choices.allocation import Lazy
from fitsmall.compressors.training.clock import Clock
from fitsmall.compressors.training.latents import find_latent, save_latent
from fitsmall.compressors.training.sharding import local, whole
from fitsmall.compressors.training.stage import Stage

__all__ = ["Chains"]


class Chains:
    """One chain of stages for each parameter of a module.

    Args:
        stages: Stages in the order of composition.
        module: Module whose parameters they act on.
        clock: Clock of the training.

    Attributes:
        names: Names of the parameters that stages act on.
        waiting: Parameters that join once they are trainable and initialised.
        optimizers: Optimizers that hold the parameters.

    Raises:
        ValueError: Two stages cannot act on one parameter in this order.
    """

    def __init__(self, stages: Sequence[Stage], module: nn.Module, clock: Clock) -> None:
        self.stages, self.module, self.clock = tuple(stages), module, clock
        self.optimizers: list[Optimizer] = []
        self.names: dict[nn.Parameter, str] = {}
        self.waiting: set[nn.Parameter] = set()
        self._members: dict[Optimizer, tuple[list[int], dict[str, nn.Parameter]]] = {}
        self.select()

    def select(self) -> None:
        """Let every stage select its parameters, and check that they fit together."""
        for stage in self.stages:
            name = type(stage).__name__
            try:
                stage.attach(self.module)
            except ValueError as error:
                if str(error).startswith(name):
                    raise
                raise ValueError(f"{name}: {error}") from error
        self.names = {
            parameter: name
            for stage in self.stages
            for name, parameter in stage.selection.chosen.items()
        }
        self.waiting = {
            parameter for stage in self.stages for parameter in stage.selection.waiting.values()
        }
        self._members = {}
        before: set[str] = set()
        for stage in self.stages:
            stage.projected_before = frozenset(before)
            before |= stage.selection.chosen.keys()
        for name in self.names.values():
            for first, second in itertools.pairwise(self.of(name)):
                _check_order(first, second, name)

    def of(self, name: str) -> list[Stage]:
        """Return the stages that act on a parameter, in order."""
        return [stage for stage in self.stages if name in stage.selection.chosen]

    def orphans(self) -> list[str]:
        """Return the names of parameters that have a chain but no optimizer."""
        held = {name for optimizer in self.optimizers for name in self.parameters(optimizer)}
        return [name for name in self.names.values() if name not in held]

    def parameters(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Return the parameters of an optimizer that have a chain, by name."""
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

    def latents(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        """Yield names and latents of those parameters of an optimizer that have a latent."""
        for name, parameter in self.parameters(optimizer).items():
            latent = find_latent(optimizer, parameter)
            # A seeded latent counts once a stage that uses it has begun.
            if latent is not None and any(
                stage.coupling == "straight_through" and stage.chosen_at is not None
                for stage in self.of(name)
            ):
                yield name, latent

    def all_latents(self) -> dict[str, Tensor]:
        """Return the latents of all parameters that have one, by name."""
        return {
            name: latent
            for optimizer in self.optimizers
            for name, latent in self.latents(optimizer)
        }

    # Projection.

    def project_(self, optimizer: Optimizer, choose: bool) -> None:
        """Project the parameters of one optimizer, which hold the latent values.

        Args:
            optimizer: The optimizer.
            choose: Whether it has just stepped, so that stages may choose again.
        """
        now = self.clock.upcoming if choose else self.clock.now
        parameters = self.parameters(optimizer)
        saved: set[str] = set()
        chosen = False
        for stage in self.stages:
            names = [name for name in stage.selection.chosen if name in parameters]
            due = choose and (self._is_due(stage, now) or self._is_late(stage, now, parameters))
            if not names or (stage.chosen_at is None and not due):
                continue
            if stage.coupling == "straight_through":
                for name in [name for name in names if name not in saved]:
                    if save_latent(optimizer, parameters[name]):
                        saved.add(name)
                names = [name for name in names if name in saved]
            # A new choice of an earlier stage in the chain changes what this one projects.
            strength = self.strength(stage, now)
            if due or (choose and chosen):
                chosen = True
                stage.choose(self._seen_by(stage, parameters), strength)
                stage.chosen_at = now
            for name in names:
                stage.project_(name, local(parameters[name]), strength)

    def finish_(self, optimizer: Optimizer) -> Iterator[str]:
        """Project the parameters of an optimizer that have no latents, after the last step.

        Yields:
            Warnings about parameters that a stage left out or that training left useless.
        """
        latents = {name for name, _ in self.latents(optimizer)}
        for name, parameter in self.parameters(optimizer).items():
            for stage in self.of(name):
                if stage.chosen_at is None:
                    continue
                if not stage.has_choice(name):
                    yield (
                        f"{type(stage).__name__} left out {name}: no gradients and no inputs "
                        "ever reached it"
                    )
                elif name not in latents:
                    strength = self.strength(stage, self.clock.now)
                    # A pull that stops short of the projection is no projection.
                    if stage.coupling != "proximal" or strength == 1:
                        stage.project_(name, local(parameter), strength)
            yield from _degenerate(name, parameter)

    @torch.no_grad()
    def project_average_(self, name: str, average: Tensor) -> None:
        """Project an average of a parameter's latents as the parameter itself is projected."""
        for stage in self.of(name):
            self._project_average_(stage, name, average)

    def seed(self, optimizer: Optimizer) -> None:
        """Give sharded parameters their latents early: a sharded checkpoint is loaded only into
        entries of the optimizer's state that exist."""
        for name, parameter in self.parameters(optimizer).items():
            if not isinstance(parameter, DTensor) or find_latent(optimizer, parameter) is not None:
                continue
            if any(stage.coupling == "straight_through" for stage in self.of(name)):
                save_latent(optimizer, parameter)

    def strength(self, stage: Stage, now: int) -> float:
        """Return the strength of a stage at a step."""
        return stage.strength(stage.window.progress(now))

    def _project_average_(self, stage: Stage, name: str, average: Tensor) -> None:
        if stage.chosen_at is not None and stage.has_choice(name):
            stage.project_average_(name, average, self.strength(stage, self.clock.now))

    def _is_due(self, stage: Stage, now: int) -> bool:
        first, last = stage.window
        if now <= first:
            return False
        if stage.chosen_at is None:
            return True
        since = now - stage.chosen_at
        return stage.chosen_at < last and (since >= stage.steps_between or now >= last)

    def _is_late(self, stage: Stage, now: int, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Return whether a parameter joined the optimizer, or got its first gradient, after the
        last choice of the stage."""
        return now > stage.window.first and any(
            name in parameters
            and parameters[name].grad is not None
            and stage.is_ready(name)
            and not stage.has_choice(name)
            for name in stage.selection.chosen
        )

    def _seen_by(self, stage: Stage, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return all weights of a stage, whole, after the stages before it in their chains."""
        latents, orphans = self.all_latents(), set(self.orphans())
        seen = {
            name: parameters[name] if name in parameters else latents.get(name, parameter)
            for name, parameter in stage.selection.chosen.items()
            if name not in orphans
        }
        for name, tensor in seen.items():
            if not whole(tensor.detach().isfinite().all()):
                raise FloatingPointError(
                    f"{name} holds NaN or infinity at step {self.clock.steps + 1:,}, and "
                    f"{type(stage).__name__} cannot choose from them: training "
                    "diverged; lower the learning rate, or clip gradients"
                )

        def weight(name: str) -> Tensor:
            if name in parameters:
                return whole(parameters[name].detach())
            # A parameter of another optimizer is projected by its whole chain: take its latent.
            latent = seen[name].detach().clone()
            for before in itertools.takewhile(lambda other: other is not stage, self.of(name)):
                self._project_average_(before, name, local(latent))
            return whole(latent)

        return Lazy(seen, weight)


def _check_order(first: Stage, second: Stage, parameter: str) -> None:
    """Refuse two stages that follow each other on a parameter and do not fit together."""
    one, two = type(first).__name__, type(second).__name__
    if second.order == first.order:
        raise ValueError(
            f"{one} and {two} both act on {parameter}: leave it out of one of them with "
            f"exclude={parameter!r}"
        )
    if second.order < first.order:
        raise ValueError(
            f"{one} before {two} on {parameter} makes no sense, since the second undoes the first: "
            f"list {two} first"
        )
    if first.coupling == "straight_through" and second.coupling != "straight_through":
        raise ValueError(
            f"{two} on {parameter} projects the latent weight itself and cannot follow {one}, "
            f"which is straight-through: list {two} first"
        )


def _degenerate(name: str, parameter: Tensor) -> Iterator[str]:
    """Yield warnings about a parameter that training left useless."""
    if not local(parameter).isfinite().all():
        yield (
            f"{name} holds NaN or infinity: training diverged; lower the learning rate, or clip "
            "gradients"
        )
    if parameter.dim() > 1 and not whole(parameter).count_nonzero():  # biases may all be zero
        yield (
            f"no weight of {name} is left, so its layer's output is constant: give it a sparsity "
            "of its own with overrides, or prune by allocation='lamp'"
        )
