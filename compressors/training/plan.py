"""The plan: all stages of a training, a chain of them per parameter, executed around each step.

With ``u`` the latent weight that the optimizer moves, and stages 1 to m in list order, a step is:

1. forward and backward at ``w = P_m(...P_1(u))``;
2. ``w <- u`` just before the update, when gradients are unscaled;
3. ``u <- update(u, gradient at w)``;
4. hard stages project the latent itself, ``u <- P(u)``, then straight-through ones ``w <- P(u)``.

Parameters stay plain leaves of the module: only their values change. Latents are in the optimizer's
state, so that a checkpoint of the optimizer saves them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fitsmall.compressors.surgery.protocol import Surgery
from fitsmall.compressors.training.chains import Chains
from fitsmall.compressors.training.clock import Clock
from fitsmall.compressors.training.coverage import coverage_warning
from fitsmall.compressors.training.messages import inform, warn
from fitsmall.compressors.training.optimizers import (
    all_finite,
    gradient_of,
    gradient_scale,
    hooks_not_called,
    learning_rate_fraction,
    refuse,
    unwrapped,
)
from fitsmall.compressors.training.settings import settings_of, take_settings
from fitsmall.compressors.training.sharding import local, whole
from fitsmall.compressors.training.stage import Stage, checked_stages
from fitsmall.compressors.training.table import plan_table

__all__ = ["Plan"]


class Plan:
    """A sequence of stages, checked for conflicts, printed as a table, and executed in any loop.

    ``print(Plan([GradualPruning(), WeightSharing()], module))`` shows the plan without training;
    with ``horizon`` the windows are shown in steps. In a loop of your own::

        plan = Plan([GradualPruning(0.9), WeightSharing(16)], module)
        plan.hook([optimizer])
        plan.begin(horizon=len(batches))
        for batch in batches:
            plan.open()
            optimizer.zero_grad()
            loss(module, batch).backward()
            plan.restore_(optimizer)
            optimizer.step()
            plan.advance()
        plan.finish()

    Args:
        stages: Stages in the order of composition.
        module: Module whose parameters they act on.
        horizon: Optimizer steps of the training, where known.
        after_surgery: Function to call after layers of the module were replaced in training; a loop
            that wraps the module can wrap it again there.

    Attributes:
        operations: The surgeries that were applied to the module, in order; a copy of it follows by
            applying them as well.

    Raises:
        TypeError: An argument is no stage, or no module.
        ValueError: Two stages cannot act on one parameter in this order.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        module: nn.Module,
        horizon: float | None = None,
        after_surgery: Callable[[], None] = lambda: None,
    ) -> None:
        self.stages, self.module = checked_stages(stages, module), module
        self.after_surgery = after_surgery
        self.operations: list[Surgery] = []
        self.clock = Clock()
        self._restored: list[Optimizer] = []
        self._open = self._stepping = self._scaled = self._hooked = self._begun = False
        self._loaded = False
        self._hooks: list[RemovableHandle] = []
        for stage in self.stages:
            stage.clock = self.clock
        self.chains = Chains(self.stages, module, self.clock)
        if horizon is not None:
            self._fix_windows(horizon)

    def __str__(self) -> str:
        return plan_table(self.stages, self.clock.windows)

    @property
    def complete(self) -> bool:
        """Whether every stage has reached its full strength."""
        return all(self.clock.now >= stage.window.last for stage in self.stages)

    @property
    def has_begun(self) -> bool:
        """Whether any stage has made a choice."""
        return any(stage.chosen_at is not None for stage in self.stages)

    @property
    def names(self) -> dict[nn.Parameter, str]:
        """Names of the parameters that stages act on."""
        return self.chains.names

    def chain(self, name: str) -> list[Stage]:
        """Return the stages that act on a parameter, in order."""
        return self.chains.of(name)

    # Selection.

    def reselect(self) -> None:
        """Let every stage select its parameters again, after the module changed in training."""
        # Lightning's toggle_optimizer freezes the parameters of all other optimizers for a moment:
        # these stay selected.
        toggled = [parameter for parameter in self.names if not parameter.requires_grad]
        for parameter in toggled:
            parameter.requires_grad_(True)
        for stage in self.stages if self._hooked else ():
            stage.unhook()
        self.chains.select()
        for parameter in toggled:
            parameter.requires_grad_(False)
        for stage in self.stages if self._hooked else ():
            stage.hook()

    # Begin and end.

    def hook(self, optimizers: Iterable[Optimizer]) -> None:
        """Project after every update of these optimizers, until :meth:`unhook`.

        Raises:
            ValueError: An optimizer's steps cannot be followed by a projection.
        """
        self.unhook()
        self.chains.optimizers = [unwrapped(optimizer) for optimizer in optimizers]
        for optimizer in self.chains.optimizers:
            refuse(optimizer)
            try:
                self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            except (AttributeError, TypeError) as error:  # its constructor left them out
                raise hooks_not_called(optimizer) from error
        for stage in self.stages:
            stage.hook()
        self._hooked = True

    def unhook(self) -> None:
        """Remove all hooks from the optimizers and the module."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        for stage in self.stages:
            stage.unhook()
        self._hooked = False

    def begin(self, horizon: float) -> None:
        """Fix every stage's window, for a training of ``horizon`` optimizer steps.

        A stage that has begun keeps its window: otherwise pruned weights would return. A warning
        names each window that ends after training, and parameters that no optimizer holds.

        Raises:
            ValueError: A window ends before it starts, or two stages cannot run together.
        """
        used = [stage for stage in self.stages if stage.chosen_at is not None and not self._loaded]
        for stage in used:  # by another plan
            stage.chosen_at = None
            stage.reset()
        if used:
            self.reselect()
        self._fix_windows(horizon)
        for stage in self.stages:
            stage.begin(horizon)
            if stage.window.first > horizon:
                warn(
                    f"{type(stage).__name__}: its window begins at step {stage.window.first:,}, "
                    f"and training ends at step {horizon:,.0f}: it does nothing; train longer, or "
                    "let it begin earlier"
                )
            elif stage.window.last > horizon:
                warn(
                    f"{type(stage).__name__}: its window ends at step {stage.window.last:,}, after "
                    f"training does at step {horizon:,.0f}: it will not reach its full strength; "
                    f"train longer, or set stop_step={horizon:.0f} at most"
                )
            if warning := coverage_warning(stage):
                warn(warning)
        if orphans := self.chains.orphans():
            warn(
                f"no optimizer holds {', '.join(orphans)}: they are not compressed until "
                "they join one; if that is intended, name them in exclude=[...]"
            )
        self._begun = True

    @torch.no_grad()
    def finish(self) -> None:
        """Leave every parameter projected when training ends.

        A warning names each stage that did not reach its full strength, and each parameter that was
        left out or that training left useless. All hooks are removed.
        """
        self.project_restored()
        clock = self.clock
        for stage in self.stages:
            if clock.now < stage.window.last:
                last = stage.window.last + clock.paused_steps
                warn(
                    f"{type(stage).__name__}: training ended at step {clock.steps:,}, before the "
                    f"window {stage.window.first:,} to {last:,} did; it has not reached its full "
                    "strength"
                )
        for optimizer in self.chains.optimizers:
            for warning in self.chains.finish_(optimizer):
                warn(warning)
        for stage in self.stages:
            for warning in stage.finish():
                warn(warning)
        self.unhook()

    def interrupt(self) -> None:
        """Leave every parameter projected after an exception, and remove all hooks."""
        self.project_restored()
        for stage in self.stages:
            stage.rest()
        self.unhook()

    # One step.

    def open(self) -> None:
        """Start a batch."""
        self._open = True
        for stage in self.stages:
            stage.prepare_step()

    @torch.no_grad()
    def restore_(self, optimizer: Optimizer, scaler: GradScaler | None = None) -> None:
        """Put latents back into the parameters of an optimizer that is about to step.

        Before that, stages observe the projected weights and their gradients. If ``scaler`` is
        about to skip the step, nothing is restored and no statistics are kept.

        Args:
            optimizer: Optimizer that is about to step.
            scaler: Gradient scaler of the training. Call ``scaler.unscale_(optimizer)`` before,
                unless the optimizer is fused and unscales gradients itself.

        Raises:
            ValueError: A call of the plan was left out, or the optimizer computes the loss more
                than once in a step.
        """
        optimizer = unwrapped(optimizer)
        if not self._begun or optimizer not in self.chains.optimizers:
            raise ValueError(
                f"{type(optimizer).__name__} is about to step before the plan is ready: call "
                "plan.hook([optimizer]) and plan.begin(horizon) before training"
            )
        if not self._open:
            raise ValueError("call plan.open() at the start of every batch")
        self._stepping, self._scaled = True, scaler is not None
        self._join()
        settled = [stage.settle() for stage in self.stages]
        if any(settled):
            self.reselect()
        if self._scaled and not all_finite(optimizer):
            for stage in self.stages:
                stage.discard(self.chains.parameters(optimizer))
            return
        if optimizer in self._restored:
            raise ValueError(
                f"{type(optimizer).__name__} computes the loss more than once in a step, at "
                "weights of its own that are not compressed: use an optimizer that computes it once"
            )
        loss_scale = scaler.get_scale() if scaler is not None else 1.0
        scale = gradient_scale(optimizer, scaler)
        parameters = self.chains.parameters(optimizer)
        for stage in self.stages:
            if stage.needs_gradients:
                for name, parameter in parameters.items():
                    if name in stage.selection.chosen:
                        gradient = gradient_of(parameter, scale)
                        state = optimizer.state.get(parameter, {})
                        stage.observe(name, local(parameter), gradient, state)
            stage.train_own(parameters, learning_rate_fraction(optimizer), loss_scale)
        for name, latent in self.chains.latents(optimizer):
            local(parameters[name]).copy_(local(latent))
        for stage in self.stages:
            stage.before_update(optimizer, parameters, scale)
        self._restored.append(optimizer)

    @torch.no_grad()
    def advance(self) -> None:
        """End a batch: count it if an optimizer stepped, and apply surgery that is due.

        Raises:
            ValueError: An optimizer stepped without calling its hooks.
        """
        if self._restored and not self._scaled:  # a scaler may leave out a step
            raise hooks_not_called(self._restored[0])
        self.project_restored()
        if self._stepping:
            self.clock.tick()
            self.project_buffers_(dict(self.module.named_buffers()))
        self._open = self._stepping = False
        for stage in self.stages:
            if (surgery := stage.surgery()) and not stage.surgery_waits:
                complete = surgery.apply(self.module, self.chains.optimizers)
                self.operations.append(surgery)
                stage.operated(complete)
                for other in self.stages:
                    other.narrowed(complete)
                self.reselect()
                self.after_surgery()

    @torch.no_grad()
    def project_restored(self) -> None:
        """Project parameters whose latents were restored but not updated; no stage chooses."""
        while self._restored:
            self.chains.project_(self._restored.pop(), choose=False)

    def project_average_(self, name: str, average: Tensor) -> None:
        """Project an average of a parameter's latents as the parameter itself is projected."""
        self.chains.project_average_(name, average)

    @torch.no_grad()
    def project_buffers_(self, buffers: Mapping[str, Tensor]) -> None:
        """Project buffers of the module, or of an average of it.

        Args:
            buffers: All of them, by name.
        """
        for stage in self.stages:
            stage.project_buffers_(buffers)

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict for a file: with the surgery that was impossible in training.

        Args:
            tensors: Whole state dict of the module.
        """
        for stage in self.stages:
            if surgery := stage.surgery():
                tensors = surgery.stored(self.module, tensors)
        return tensors

    # Latents.

    def latents(self) -> dict[str, Tensor]:
        """Return the latents of all parameters that have one, by name."""
        return self.chains.all_latents()

    def distance(self) -> float:
        """Return the relative distance from the feasible set, ``||u - w|| / ||u||``.

        It is 0 as long as no parameter has a latent: hard stages project the weight itself.
        """
        parameters = {name: parameter.detach() for parameter, name in self.names.items()}
        latents = self.latents()
        gap = sum(float(whole((u - parameters[n]).square().sum())) for n, u in latents.items())
        norm = sum(float(whole(u.square().sum())) for u in latents.values())
        return float((gap / norm) ** 0.5) if norm else 0.0

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return the clock, choices and statistics, as tensors and plain numbers.

        Latents are not among them: the optimizers' state has them.
        """
        stages = {
            stage.key: {
                "settings": settings_of(stage),
                "chosen_at": stage.chosen_at,
                "choices": stage.choices(),
            }
            for stage in self.stages
        }
        return {"clock": self.clock.state_dict(), "stages": stages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned; other stages start fresh.

        A stage that has not begun takes settings that differ from the saved ones. One that has
        begun takes those that its next choice follows, such as a sparsity. The log tells which.

        Raises:
            ValueError: A stage cannot take a setting any more.
        """
        self._loaded = True
        self.clock.load_state_dict(state["clock"])
        unknown = state["stages"].keys() - {stage.key for stage in self.stages}
        for key in sorted(unknown):
            warn(f"{key} of the checkpoint is not in this training: what it chose is dropped")
        for stage in self.stages:
            if saved := state["stages"].get(stage.key):
                take_settings(stage, saved)
                stage.chosen_at = saved["chosen_at"]
                stage.load_choices(saved["choices"], self.module)
        self.reselect()

    def _fix_windows(self, horizon: float) -> None:
        windows = self.clock.windows
        for stage in self.stages:
            if stage.chosen_at is None or stage.key not in windows:
                windows[stage.key] = stage.window_within(horizon)
        for stage in self.stages:
            stage.check(self.stages)

    def _join(self) -> None:
        """Select again if parameters that were frozen or uninitialised can be trained now."""
        if not any(
            parameter.requires_grad and not is_lazy(parameter) for parameter in self.chains.waiting
        ):
            return
        known = set(self.names.values())
        self.reselect()
        joined = ", ".join(name for name in self.names.values() if name not in known)
        inform(f"joined the compression plan at step {self.clock.steps:,}: {joined}")

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in self._restored:
            self._restored.remove(optimizer)
            self.chains.project_(optimizer, choose=True)
            self.chains.seed(optimizer)
        elif self._open and not self._scaled:
            raise ValueError(
                f"{type(optimizer).__name__} stepped at weights that are compressed: call "
                "plan.restore_(optimizer) before it; in Lightning, get it from self.optimizers(), "
                "and not with use_pl_optimizer=False"
            )
        elif not self._begun:
            self.chains.seed(optimizer)  # a step before training: a checkpoint is loaded next
