"""A stage: one method of compression in training, with the parameters and steps that it acts on."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.choices.schedules import Schedule, as_schedule
from fitsmall.compressors.select import Selection, select
from fitsmall.compressors.surgery.protocol import Surgery
from fitsmall.compressors.training.clock import NEVER, Clock, Window

__all__ = ["Stage", "checked_stages"]


class Stage(ABC):
    """A method of compression in training: what it acts on, when it acts, and how it projects.

    All stages of a training are gathered into one :class:`~fitsmall.compressors.training.Plan`,
    which calls them. A subclass implements :meth:`choose`, which finds masks, clusters or scales
    every so many steps, and :meth:`project_`, which applies them after every step.

    Args:
        start: Fraction of training after which the stage begins.
        stop: Fraction of training at which the stage reaches its full strength.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between choices; by default :attr:`num_updates` are spread over the window.
        include: Patterns of parameter names that replace the default, all weights: see
            :func:`~fitsmall.compressors.select`.
        exclude: Patterns of parameter names to leave out.

    Attributes:
        selection: The parameters that the stage acts on, and the reason for each one left out.
        parameters: All parameters of the module, by name.
        clock: The clock of its plan.
        chosen_at: Step of the last choice, by the clock; None before the first.
        projected_before: Names of the parameters that an earlier stage of the plan acts on.
    """

    order: ClassVar[int]
    """Position in a chain: a stage can only follow stages of a smaller order."""

    num_updates: ClassVar[int] = 100
    """Number of choices over the window, unless ``every`` gives the steps between them."""

    followed: ClassVar[frozenset[str]] = frozenset({"every"})
    """Settings that the next choice follows if a training is resumed with other ones."""

    fixed: ClassVar[frozenset[str]] = frozenset()
    """Settings that shape the module before the stage begins: a resumed training cannot have other
    ones."""

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
                raise ValueError(
                    f"{type(self).__name__}: {name}={value} is no fraction of training; "
                    f"for optimizer steps write {name}_step={value}"
                )
        for name, step in (("start_step", start_step), ("stop_step", stop_step), ("every", every)):
            if step is not None and (not _is_whole(step) or step < (name == "every")):
                raise ValueError(
                    f"{type(self).__name__}: {name}={step} is no number of optimizer steps"
                )
        self.start, self.stop = start, stop
        self.start_step, self.stop_step = start_step, stop_step
        self.every = every
        self.include, self.exclude = include, exclude
        self.selection = Selection({}, {})
        self.parameters: dict[str, nn.Parameter] = {}
        self.clock = Clock()
        self.chosen_at: int | None = None
        self.projected_before: frozenset[str] = frozenset()

    @staticmethod
    def _schedule(schedule: Schedule | None, default: Schedule) -> Schedule:
        return default if schedule is None else as_schedule(schedule)

    def _overrides(self, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
        if overrides is not None and not isinstance(overrides, Mapping):
            raise ValueError(
                f"{type(self).__name__}: overrides maps patterns of names to values, as in "
                f"{{'fc': 0.5}}, and got {overrides!r}"
            )
        return dict(overrides or {})

    # Description.

    @property
    def key(self) -> str:
        """Name of the stage in a state dict, distinct within a plan."""
        return f"{type(self).__name__}(include={self.include!r}, exclude={self.exclude!r})"

    @property
    def coupling(self) -> str:
        """How the optimizer and the projection work together.

        - ``"hard"``: the optimizer moves the projected weight itself.
        - ``"straight_through"``: the optimizer moves a latent weight by the gradient at its
          projection.
        - ``"proximal"``: after each update a proximal step pulls the weight to its projection.
        """
        return "straight_through"

    @abstractmethod
    def describe(self) -> str:
        """Return a short description of the stage, for the plan's table."""

    def remarks(self) -> list[str]:
        """Return additional lines about the stage, for the plan's table."""
        return []

    def metrics(self) -> dict[str, float]:
        """Return additional metrics to log, by name."""
        return {}

    # Selection.

    @property
    def takes_any_weight(self) -> bool:
        """Whether the stage acts on every weight that ``include`` names, whatever its layer."""
        return True

    def attach(self, module: nn.Module) -> None:
        """Select the module's parameters, and check that the stage can act on them.

        Raises:
            ValueError: A pattern matches nothing, or the stage cannot act on a parameter.
        """
        self.selection = select(module, self.include, self.exclude)
        self.parameters = dict(module.named_parameters())

    def check(self, others: Sequence["Stage"]) -> None:
        """Check that the stage can run together with the others of its plan; windows are known.

        Raises:
            ValueError: It cannot.
        """

    def hook(self) -> None:
        """Register hooks on the layers that the stage watches."""

    def unhook(self) -> None:
        """Remove the hooks that :meth:`hook` registered."""

    # Window and schedule.

    @property
    def window(self) -> Window:
        """The window in optimizer steps, once training has begun."""
        return self.clock.windows.get(self.key, NEVER)

    @property
    def steps_between(self) -> int:
        """Steps from one choice to the next."""
        first, last = self.window
        return self.every or max(1, (last - first) // self.num_updates)

    def window_within(self, horizon: float) -> Window:
        """Return the window for a training of ``horizon`` optimizer steps.

        Raises:
            ValueError: The window ends before it starts, or is a fraction of an unknown horizon.
        """
        bounds = []
        for name in ("start", "stop"):
            step, fraction = getattr(self, f"{name}_step"), getattr(self, name)
            if step is None and fraction and horizon == float("inf"):
                raise ValueError(
                    f"{type(self).__name__}: {name}={fraction} is a fraction of a training that "
                    f"has no known end: set max_steps or max_epochs, or give {name}_step"
                )
            bounds.append(step if step is not None else int(fraction * horizon) if fraction else 0)
        window = Window(*bounds)
        if window.last < window.first:
            raise ValueError(
                f"{type(self).__name__}: its window ends at step {window.last}, before it starts "
                f"at step {window.first}"
            )
        return window

    def begin(self, horizon: float) -> None:
        """Prepare for a training of ``horizon`` optimizer steps, after the window was fixed."""

    def strength(self, progress: float) -> float:
        """Return the strength at a progress in [0, 1] through the window."""
        return 1.0

    # One step: start, gradients, update, choice, projection.

    def prepare_step(self) -> None:
        """Prepare for the forward passes of a step."""

    def settle(self) -> bool:
        """Decide what depends on the first forward passes, before an update.

        Returns:
            Whether the selection of parameters changed.
        """
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether :meth:`observe` is called before every update."""
        return False

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        """Collect statistics before an update.

        Args:
            name: Name of the parameter.
            weight: This process's part of it, as the forward pass saw it.
            gradient: This process's part of its gradient, unscaled.
            state: The optimizer's state of the parameter.
        """

    def train_own(self, names: Collection[str], learning_rate: float, loss_scale: float) -> None:
        """Update tensors that the stage trains itself, such as scales, just before an update.

        Args:
            names: Names of the parameters that the optimizer is about to update.
            learning_rate: The optimizer's, as a fraction of the largest that its schedule has.
            loss_scale: Factor by which a gradient scaler multiplied the loss, and so the gradients
                of the stage's own tensors.
        """

    def before_update(
        self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], gradient_scale: float
    ) -> None:
        """Change gradients or latents just before an update.

        Args:
            optimizer: Optimizer that is about to step.
            parameters: The plan's parameters that it holds, by name, with their latent values.
            gradient_scale: Factor by which the gradients are still scaled; 1 if they are unscaled.
        """

    def discard(self, names: Collection[str]) -> None:
        """Drop the statistics of a step of these parameters, which is skipped."""

    @abstractmethod
    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        """Choose what :meth:`project_` keeps fixed until the next choice, for all weights together.

        Args:
            weights: Whole weights by name. A look-up of a sharded one is a collective operation.
            strength: Strength of the schedule, in [0, 1].
        """

    @abstractmethod
    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        """Project this process's part of one weight in place.

        At a strength below 1 the weight may move only a part of the way. A weight without a choice
        stays as it is.

        Args:
            name: Name of the parameter.
            weight: This process's part of it, after the stages before this one.
            strength: Strength of the schedule, in [0, 1].
        """

    def project_average_(self, name: str, average: Tensor, strength: float) -> None:
        """Project an average of the weight in place, and leave the stage's own state as it is."""
        self.project_(name, average, strength)

    @abstractmethod
    def has_choice(self, name: str) -> bool:
        """Return whether something was chosen for a weight."""

    def is_ready(self, name: str) -> bool:
        """Return whether the statistics that a choice for a weight needs are available."""
        return True

    # Surgery, and the end.

    @property
    def replaces_layers(self) -> bool:
        """Whether :meth:`surgery` changes layers in the middle of training."""
        return False

    @property
    def replaces_parameters(self) -> bool:
        """Whether it puts new parameters in place of others, which have no average."""
        return False

    def project_buffers_(self, buffers: Mapping[str, Tensor]) -> None:
        """Project buffers of the module, or of an average of it, after every step.

        Args:
            buffers: All of them, by name.
        """

    def surgery(self) -> Surgery | None:
        """Return the change of layers that is due, or None."""
        return None

    @property
    def surgery_waits(self) -> bool:
        """Whether surgery is impossible in training, and only the file shows it."""
        return False

    def operated(self, complete: Mapping[str, bool]) -> None:
        """Record that the plan applied the surgery which was due.

        Args:
            complete: For each replaced weight by name, whether its whole optimizer state was
                carried over to its successors.
        """

    def narrowed(self, names: Collection[str]) -> None:
        """Drop statistics of parameters that another stage's surgery has given other shapes."""

    def finish(self) -> list[str]:
        """Stop when training ends, and return warnings."""
        self.rest()
        return []

    def rest(self) -> None:
        """Stop collecting statistics, also after an exception."""

    # State.

    @abstractmethod
    def reset(self) -> None:
        """Forget all choices and statistics."""

    @abstractmethod
    def choices(self) -> dict[str, Any]:
        """Return choices and statistics as tensors and plain numbers, for a checkpoint."""

    @abstractmethod
    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        """Take over the state that :meth:`choices` returned."""


def checked_stages(stages: Sequence[Stage], module: nn.Module) -> tuple[Stage, ...]:
    """Return the stages as a tuple, if they are stages and the module is one.

    Raises:
        TypeError: They are not.
    """
    if not isinstance(stages, Iterable) or not isinstance(module, nn.Module):
        raise TypeError(
            "Plan(stages, module) takes a list of stages and a module, and got a "
            f"{type(stages).__name__} and a {type(module).__name__}"
        )
    found = tuple(stages)
    for stage in found:
        if not isinstance(stage, Stage):
            name = stage.__name__ if isinstance(stage, type) else type(stage).__name__
            remedy = f"write {name}(...)" if isinstance(stage, type) else "leave it out of the plan"
            raise TypeError(f"Plan: {name} is no stage of compression: {remedy}")
    return found


def _is_whole(number: Any) -> bool:
    if isinstance(number, float):
        return number.is_integer()
    return isinstance(number, int) and not isinstance(number, bool)
