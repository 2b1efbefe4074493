"""The driver: the one callback that calls the plan, at Lightning's hooks."""

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fitsmall.callbacks.lightning_internals import gradient_scaler, wrap_again
from fitsmall.callbacks.rivals import refuse_rivals
from fitsmall.compressors.surgery.kinds import own_tensors, replay
from fitsmall.compressors.surgery.protocol import layout_of
from fitsmall.compressors.training.messages import LOGGER, inform, warn
from fitsmall.compressors.training.plan import Plan
from fitsmall.compressors.training.stage import Stage

__all__ = ["Driver", "StageCallback", "StageGroup", "plan_of", "stages_of"]


class Driver(pl.Callback):
    """A callback that gathers all stages of a Trainer into one plan, and calls it in training.

    The first stage that is set up puts the driver into the Trainer's list, before all stages.

    Attributes:
        plan: The plan, from the start of ``fit`` on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plan: Plan | None = None
        self._saved: dict[str, Any] | None = None
        self._fitting = True
        self._ready = False  # from on_fit_start on
        self._other = False  # whether the Trainer fitted another module before
        self._reading: RemovableHandle | None = None

    STATE_KEY = "fitsmall"
    """Key of the plan's state in a checkpoint's callbacks."""

    @property
    def state_key(self) -> str:
        return self.STATE_KEY

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._fitting, self._ready = stage == "fit", False
        stages = stages_of(trainer)
        self._stop_reading()
        # Lightning loads the module before it calls any hook that could change layers.
        register: Any = pl_module.register_load_state_dict_pre_hook
        self._reading = register(
            lambda module, state, prefix, *_: _fit_to_checkpoint(
                stages if module is pl_module else [], module, state, prefix
            )
        )
        if self._fitting:
            refuse_rivals(trainer, stages)
        _attach_early(stages, pl_module)
        # A second fit of one Trainer continues where the first ended. A new Trainer starts again,
        # and so does another module.
        self._other = self.plan is not None and self.plan.module is not pl_module
        if self._fitting and (self._other or not trainer.global_step):
            self.plan = self._saved = None
            for each in stages:
                each.chosen_at = None
                each.reset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_reading()
        # By now the module has all of its parameters, and the optimizers exist.
        before = self.plan.state_dict() if self.plan is not None else None
        plan = Plan(
            stages_of(trainer), pl_module, after_surgery=lambda: wrap_again(trainer, pl_module)
        )
        self.plan = plan
        if state := self._saved or before:
            plan.load_state_dict(state)
        self._saved, self._ready = None, True
        if not any(optimizer.param_groups for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"{type(plan.stages[0]).__name__} acts after the steps of an optimizer, and "
                f"{type(pl_module).__name__} has none: return one from configure_optimizers"
            )
        plan.hook(trainer.optimizers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.plan is None:
            return
        optimizers = max(1, len(trainer.optimizers))
        horizon = trainer.estimated_stepping_batches
        if trainer.max_steps > 0:  # counts the steps of all optimizers
            horizon = min(horizon, trainer.max_steps / optimizers)
        if self.plan.clock.steps == 0:
            taken = trainer.global_step // optimizers
            if self._other:  # by the other module; the windows lie in the rest of training
                horizon -= taken
            else:  # resumed from a checkpoint without compression
                self.plan.clock.steps = taken
        self.plan.clock.resume()  # a guard that had paused it may be gone
        _show_messages()
        self.plan.begin(horizon if horizon > 0 else float("inf"))
        inform(str(self.plan))

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self.plan is not None:
            self.plan.open()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.plan is not None:
            self.plan.restore_(optimizer, gradient_scaler(trainer))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.plan is not None:
            self.plan.advance()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.plan is None or trainer.current_epoch or pl_module.automatic_optimization:
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        counted = self.plan.clock.steps
        steps = trainer.global_step / max(1, len(trainer.optimizers))
        if batches == counted == steps:
            return
        warn(
            f"{counted:,} of the first epoch's {batches:,} batches stepped, and each optimizer "
            f"stepped {steps:,.0f} times: fractions of training assume one step in every batch; "
            "give start_step and stop_step instead, in batches that step"
        )

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        self._stop_reading()
        if self.plan is not None:
            self.plan.interrupt()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self.plan is not None:
            self.plan.finish()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop_reading()
        if stage == "fit" and self.plan is not None:
            self.plan.unhook()

    def state_dict(self) -> dict[str, Any]:
        return self.plan.state_dict() if self.plan is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict or not self._fitting:  # no training follows
            return
        if self.plan is not None and self._ready:
            self.plan.load_state_dict(state_dict)
        else:  # on_fit_start loads it, once the module is complete
            self._saved = state_dict

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.remove()
            self._reading = None


class StageCallback(pl.Callback, Stage):
    """A stage in a Trainer's list of callbacks, called by the Trainer's :class:`Driver`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        drive(trainer, pl_module, stage)


class StageGroup(pl.Callback):
    """A callback that stands for several stages, in its place in a Trainer's list.

    Attributes:
        stages: The stages, in their order of composition.
    """

    stages: list[Stage]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        drive(trainer, pl_module, stage)


def drive(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
    """Put a driver before all callbacks of a Trainer and set it up, unless there is one.

    Callbacks then see the plan after each step, and so do the checkpoints that they write.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, Driver) for callback in callbacks):
        return
    driver = Driver()
    # A new list, since Lightning is iterating over the old one.
    trainer.callbacks = [driver, *callbacks]  # type: ignore[attr-defined]
    driver.setup(trainer, pl_module, stage)


def stages_of(trainer: pl.Trainer) -> list[Stage]:
    """Return a Trainer's compression stages, in order."""
    found: list[Stage] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StageGroup):
            found += callback.stages
        elif isinstance(callback, Stage):
            found.append(callback)
    return found


def plan_of(trainer: pl.Trainer) -> Plan | None:
    """Return the plan of a Trainer's stages; None before ``fit``, and without stages."""
    drivers = (callback for callback in trainer.callbacks if isinstance(callback, Driver))  # type: ignore[attr-defined]
    return next((driver.plan for driver in drivers), None)


def _attach_early(stages: list[Stage], module: nn.Module) -> None:
    """Let stages change layers before the optimizers are made."""
    for stage in stages:
        try:
            stage.attach(module)
        except ValueError:  # layers may come later; if not, the plan raises the same error
            continue


def _fit_to_checkpoint(
    stages: list[Stage], module: nn.Module, state: dict[str, Any], prefix: str
) -> None:
    """Give a module the changed layers of a checkpoint, and the checkpoint settings that it lacks.

    The checkpoint may be of a later step, after more surgery, or of a training without stages.

    Args:
        stages: Stages that act on the module; empty for a copy of it, such as an average.
        module: Module that is about to load the checkpoint.
        state: State dict of the checkpoint, which is completed in place.
        prefix: Prefix of the module's names in the state dict.
    """
    _attach_early(stages, module)
    own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    replay(module, layout_of(own))
    tensors = module.state_dict()
    for name in own_tensors(tensors):
        state.setdefault(f"{prefix}{name}", tensors[name])


def _show_messages() -> None:
    """Log the plan's messages at the level INFO, as Lightning does its own."""
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not LOGGER.hasHandlers():
        LOGGER.addHandler(logging.StreamHandler())
