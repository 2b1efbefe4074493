"""What the callbacks of all methods share: which parameters, when, and Lightning's hooks."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fitsmall.callbacks.plan import Plan
from fitsmall.compressors.schedules import Schedule
from fitsmall.compressors.select import Selection, select

__all__ = ["Method", "methods_of", "plan_of"]


class Method(pl.Callback):
    """A projection that training meets in a window of steps; callbacks only declare it.

    All methods of a Trainer are gathered into one :class:`~fitsmall.callbacks.Plan`, which the
    first of them in the Trainer's list drives. A subclass says how to :meth:`choose` anew (masks,
    clusters) and how to :meth:`project_` with the choice fixed.

    Args:
        start: Fraction of training after which the method begins.
        stop: Fraction of training at which it has reached its full strength.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between choices; by default 100 choices are spread over the window.
        include: Patterns of parameter names that replace the default, the weights of Linear,
            Conv, Embedding and attention layers.
        exclude: Patterns of parameter names to leave out.
    """

    place: ClassVar[int]
    """Position in a chain: a method may only follow ones of a smaller place."""

    times: ClassVar[int] = 100
    """Choices that are spread over the window, unless ``every`` says otherwise."""

    def __init__(
        self,
        start: float,
        stop: float,
        start_step: int | None,
        stop_step: int | None,
        every: int | None,
        include: str | Sequence[str] | None,
        exclude: str | Sequence[str],
    ) -> None:
        super().__init__()
        for name, value in (("start", start), ("stop", stop)):
            if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise MisconfigurationException(
                    f"{type(self).__name__}: {name}={value} is no fraction of training; "
                    f"for optimizer steps write {name}_step={value}"
                )
        for name, step in (("start_step", start_step), ("stop_step", stop_step), ("every", every)):
            if step is not None and (not _whole(step) or step < (name == "every")):
                raise MisconfigurationException(
                    f"{type(self).__name__}: {name}={step} is no number of optimizer steps"
                )
        self.start, self.stop = start, stop
        self.start_step, self.stop_step = start_step, stop_step
        self.every = every
        self.include, self.exclude = include, exclude
        self.selection = Selection({}, {})
        self.plan: Plan | None = None
        self.chosen_at: int | None = None
        # The window once training has begun: a longer training later on does not move it.
        self.span: tuple[int, int] | None = None
        self.saved: dict[str, Any] | None = None
        self.fitting = True
        self._reading: RemovableHandle | None = None

    def _schedule(self, schedule: Schedule | None, default: Schedule) -> Schedule:
        if schedule is not None and not callable(schedule):
            raise MisconfigurationException(
                f"{type(self).__name__}: a schedule maps progress to strength, as "
                f"fitsmall.compressors.Cubic() does, and got {schedule!r}"
            )
        return schedule or default

    def _overrides(self, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
        if overrides is not None and not isinstance(overrides, Mapping):
            raise MisconfigurationException(
                f"{type(self).__name__}: overrides maps patterns of names to values, as in "
                f"{{'fc': 0.5}}, and got {overrides!r}"
            )
        return dict(overrides or {})

    @property
    def straight_through(self) -> bool:
        """Whether the optimizer moves a latent weight and the gradient is taken at the projection;
        otherwise the projected weight itself is moved."""
        return True

    @property
    def manner(self) -> str:
        """How training meets the projection, in a word."""
        return "straight-through" if self.straight_through else "hard"

    @property
    def observes(self) -> bool:
        """Whether the method collects statistics in every step."""
        return False

    @abstractmethod
    def describe(self) -> str:
        """The method in a few words, for the plan's table."""

    def remarks(self) -> list[str]:
        """What else the plan's table says of the method, a line each."""
        return []

    def metrics(self) -> dict[str, float]:
        """What the method has to add to the curves of compression."""
        return {}

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's whole state dict as the compressed file shall hold it."""
        return tensors

    @abstractmethod
    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        """Choose anew what :meth:`project_` holds fixed, for all weights together; under sharding
        looking one up gathers all of it, on every process."""

    @abstractmethod
    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        """Project this process's part of one weight in place; at a strength below 1 it may stop
        short of it, and a weight for which nothing was chosen yet stays as it is."""

    def project_average_(self, name: str, average: Tensor, strength: float) -> None:
        """Project an average of the weight in place, without learning anything from it."""
        self.project_(name, average, strength)

    @abstractmethod
    def holds(self, name: str) -> bool:
        """Whether something was chosen for a weight."""

    def ready(self, name: str) -> bool:
        """Whether there is what a choice for a weight is made by."""
        return True

    @abstractmethod
    def reset(self) -> None:
        """Forget all choices and statistics."""

    @abstractmethod
    def choices(self) -> dict[str, Any]:
        """Choices and statistics as tensors, for the checkpoint."""

    @abstractmethod
    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        """Take over what :meth:`choices` returned."""

    def strength(self, progress: float) -> float:
        """Strength at a progress in [0, 1] through the window."""
        return 1.0

    def attach(self, module: nn.Module) -> None:
        """Select the module's parameters and check that the method can act on them."""
        self.selection = select(module, self.include, self.exclude)

    def before_reading(self, module: nn.Module, state: dict[str, Any]) -> None:
        """Change a module so that a state dict can be read into it, or complete the state dict."""

    def hook(self) -> None:
        """Place what has to watch the module while it trains."""

    def unhook(self) -> None:
        """Remove what :meth:`hook` placed."""

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        """Update statistics before an optimizer step, from this process's part of a weight as the
        forward pass saw it, and of its gradient; ``state`` is the optimizer's own."""

    def update(self, names: Collection[str], rate: float, scale: float) -> None:
        """Train what the method learns itself, when a step of these parameters is about to be
        taken; ``rate`` is the optimizer's learning rate as a fraction of the largest that its
        schedule has, ``scale`` that of a gradient scaler."""

    def skip(self, names: Collection[str]) -> None:
        """Drop what was staged for a step of these parameters that is not taken."""

    def window(self, horizon: float) -> tuple[int, int]:
        """First and last step of the window, for training of ``horizon`` optimizer steps."""
        bounds = []
        for name in ("start", "stop"):
            step, fraction = getattr(self, f"{name}_step"), getattr(self, name)
            if step is None and fraction and horizon == float("inf"):
                raise MisconfigurationException(
                    f"{type(self).__name__}: {name}={fraction} is a fraction of a training that "
                    f"has no known end: set max_steps or max_epochs, or give {name}_step"
                )
            bounds.append(step if step is not None else int(fraction * horizon) if fraction else 0)
        first, last = bounds
        if last < first:
            raise MisconfigurationException(
                f"{type(self).__name__}: its window ends at step {last}, before it starts at "
                f"step {first}"
            )
        return first, last

    # What follows is Lightning's side. Every method takes part, and the first one drives.

    @cached_property
    def state_key(self) -> str:  # Lightning asks for it at every hook
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def _drives(self) -> bool:
        return self.plan is not None and self.plan.methods[0] is self

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.fitting = stage == "fit"
        self._stop_reading()
        if type(self).before_reading is not Method.before_reading:
            # Checkpoints are read before callbacks hear of it, and before on_fit_start.
            register: Any = pl_module.register_load_state_dict_pre_hook
            self._reading = register(lambda module, state, *_: self.before_reading(module, state))
        if not self.fitting:
            return
        _refuse_rivals(trainer)
        # A second fit of one Trainer goes on where the first one ended.
        if not trainer.global_step:
            self.reset()
            self.plan = self.chosen_at = self.span = self.saved = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_reading()
        # By now the module has all of its parameters, and the optimizers exist.
        methods = methods_of(trainer)
        if methods[0] is not self:
            return
        plan = Plan(methods, pl_module)
        if self.plan is not None:
            plan.step, plan.held = self.plan.step, self.plan.held
        for method in methods:
            method.plan = plan
            if method.saved is not None:
                method.load_state_dict(method.saved)
        plan.hook(trainer.optimizers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._drives and self.plan is not None:
            optimizers = max(1, len(trainer.optimizers))
            horizon = trainer.estimated_stepping_batches
            if trainer.max_steps > 0:  # which counts the steps of every optimizer
                horizon = min(horizon, trainer.max_steps / optimizers)
            if self.plan.step == 0:  # a checkpoint that was written without compression
                self.plan.step = trainer.global_step // optimizers
            warnings = self.plan.begin(horizon if horizon > 0 else float("inf"))
            pl.utilities.rank_zero_info(str(self.plan))
            if orphans := self.plan.orphans():
                pl.utilities.rank_zero_warn(
                    f"no optimizer holds {', '.join(orphans)}: they are not compressed unless "
                    "they join one; name them in exclude=[...] if that is meant"
                )
            for warning in warnings:
                pl.utilities.rank_zero_warn(warning)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._drives and self.plan is not None:
            self.plan.open()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._drives and self.plan is not None:
            self.plan.restore_(optimizer, getattr(trainer.precision_plugin, "scaler", None))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._drives and self.plan is not None:
            self.plan.advance()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._drives or self.plan is None or trainer.current_epoch:
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        steps = trainer.global_step / max(1, len(trainer.optimizers))
        if pl_module.automatic_optimization or batches == self.plan.step == steps:
            return
        pl.utilities.rank_zero_warn(
            f"{self.plan.step:,} of the first epoch's {batches:,} batches stepped, and each "
            f"optimizer stepped {steps:,.0f} times: fractions of training count on one step a "
            "batch, so give start_step and stop_step, in batches that step"
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._drives and self.plan is not None:
            self.plan.settle()
            self.plan.unhook()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._drives and self.plan is not None:
            for warning in self.plan.finish():
                pl.utilities.rank_zero_warn(warning)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop_reading()
        if stage == "fit" and self._drives and self.plan is not None:
            self.plan.unhook()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.remove()
            self._reading = None

    def state_dict(self) -> dict[str, Any]:
        if self.plan is None:
            return {}
        return {
            "step": self.plan.step,
            "held": self.plan.held,
            "chosen_at": self.chosen_at,
            "span": self.span,
            "choices": self.choices(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict or not self.fitting:  # a checkpoint that is only evaluated
            return
        if self.plan is None:  # it comes before the module is complete
            self.saved = state_dict
            return
        self.saved = None
        self.plan.step, self.plan.held = state_dict["step"], state_dict["held"]
        self.chosen_at, self.span = state_dict["chosen_at"], state_dict["span"]
        self.load_choices(state_dict["choices"], self.plan.module)


def methods_of(trainer: pl.Trainer) -> list[Method]:
    """A Trainer's compression methods, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Method)]  # type: ignore[attr-defined]


def plan_of(trainer: pl.Trainer) -> Plan | None:
    """What a Trainer's compression methods follow, from the start of ``fit`` on."""
    return next((method.plan for method in methods_of(trainer)), None)


def _whole(number: Any) -> bool:
    return isinstance(number, int | float) and number == int(number)


def _refuse_rivals(trainer: pl.Trainer) -> None:
    """What would undo compression without a word."""
    averages = (StochasticWeightAveraging, WeightAveraging)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, averages) and not getattr(callback, "projects", False):
            raise MisconfigurationException(
                f"{type(callback).__name__} averages weights, and an average of sparse or shared "
                "weights is neither: use fitsmall.callbacks.EMA, which projects the average"
            )
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                f"{type(callback).__name__} keeps masks of its own, which other methods know "
                "nothing of: use fitsmall.callbacks.GradualPruning"
            )
    sharded = {"FSDPStrategy", "DeepSpeedStrategy"}
    if sharded.intersection(base.__name__ for base in type(trainer.strategy).__mro__):
        raise MisconfigurationException(
            f"{type(trainer.strategy).__name__} flattens parameters into one, in which weights "
            "cannot be told apart: use ModelParallelStrategy, which is FSDP2, or strategy='ddp'"
        )
