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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fitsmall.compressors.allocation import Lazy
from fitsmall.compressors.training.sharding import local, whole

if TYPE_CHECKING:
    from fitsmall.callbacks.method import Method

__all__ = ["Plan", "gradient_scale"]

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
        self.held = 0
        self.holding = False
        self.windows: dict[Method, tuple[int, int]] = {}
        self.names: dict[nn.Parameter, str] = {}
        self._optimizers: list[Optimizer] = []
        self._restored: list[Optimizer] = []
        self._members: dict[Optimizer, tuple[list[int], dict[str, nn.Parameter]]] = {}
        self._open = self._stepping = self._scaled = False
        self._hooks: list[RemovableHandle] = []
        self.select()
        if horizon is not None:
            self.begin(horizon)

    @property
    def clock(self) -> int:
        """Steps that count for the windows: all but those during which the schedule was held."""
        return self.step - self.held

    @property
    def complete(self) -> bool:
        """Whether every method has reached its full strength."""
        return all(self.clock >= last for _, last in self.windows.values())

    def __str__(self) -> str:
        lines = ["Compression plan"]
        for method in self.methods:
            window = self.windows.get(method)
            when = f"steps {window[0]:,} to {window[1]:,}" if window else _words(method)
            chosen = method.selection.chosen
            weights = sum(parameter.numel() for parameter in chosen.values())
            lines.append(f"  {type(method).__name__}: {method.describe()}, {method.manner}, {when}")
            lines.append(f"    {len(chosen)} tensors, {weights:,} weights: {', '.join(chosen)}")
            lines.extend(f"    {remark}" for remark in method.remarks())
        touched = set(self.names.values())
        skipped = {
            name: reason
            for method in reversed(self.methods)  # of several reasons the first method's
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

    def begin(self, horizon: float) -> list[str]:
        """Fix every method's window, for a training of ``horizon`` optimizer steps; returns a
        warning for each one that training will not see the end of.

        A method that has begun keeps the window it has: what is pruned would return otherwise.
        """
        for method in self.methods:
            if method.chosen_at is None or method.span is None:
                method.span = method.window(horizon)
            self.windows[method] = method.span
        return [
            f"{type(method).__name__}: its window ends at step {last:,}, after training does at "
            f"step {horizon:,.0f}: it will not reach its full strength; train longer, or set "
            f"stop_step={horizon:.0f} at most"
            for method, (_, last) in self.windows.items()
            if last > horizon
        ]

    def hook(self, optimizers: Iterable[Optimizer]) -> None:
        """Project after every update of these optimizers, until :meth:`unhook`.

        Raises:
            MisconfigurationException: An optimizer of a kind that projection cannot follow.
        """
        self._optimizers = list(optimizers)
        for optimizer in self._optimizers:
            _refuse(optimizer)
            try:
                self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            except (AttributeError, TypeError) as error:  # its set-up left them out
                raise _deaf(optimizer) from error
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
    def restore_(self, optimizer: Optimizer, scaler: GradScaler | None = None) -> None:
        """Give the optimizer back the latents of its parameters, once statistics have seen both the
        projected weights and their gradients. A step that ``scaler`` will skip leaves no trace."""
        self._stepping, self._scaled = True, scaler is not None
        self._welcome()
        if self._scaled and not _finite(optimizer):
            for method in self.methods:
                method.skip(self._parameters(optimizer))
            return
        if optimizer in self._restored:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} computes the loss more than once in a step, at "
                "weights of its own that are not compressed: use an optimizer that computes it once"
            )
        of_loss = scaler.get_scale() if scaler is not None else 1.0
        scale = gradient_scale(optimizer, scaler)
        parameters = self._parameters(optimizer)
        for method in self.methods:
            if method.observes:
                for name, parameter in parameters.items():
                    if name in method.selection.chosen:
                        gradient = _gradient(parameter, scale)
                        state = optimizer.state.get(parameter, {})
                        method.observe(name, local(parameter), gradient, state)
            method.update(parameters, _rate(optimizer), of_loss)
        for name, latent in self._latents(optimizer):
            local(parameters[name]).copy_(local(latent))
        self._restored.append(optimizer)

    def open(self) -> None:
        """Start a batch."""
        self._open = True

    def advance(self) -> None:
        """End a batch, and count it if it stepped.

        Raises:
            MisconfigurationException: An optimizer stepped without calling its hooks.
        """
        if self._restored and not self._scaled:  # a scaler may leave out a step
            raise _deaf(self._restored[0])
        self.settle()
        self.step += self._stepping
        self.held += self._stepping and self.holding
        self._open = self._stepping = False

    @torch.no_grad()
    def settle(self) -> None:
        """Project what was restored and not updated, with all choices as they are."""
        while self._restored:
            self._project_(self._restored.pop(), choose=False)

    @torch.no_grad()
    def finish(self) -> list[str]:
        """Leave every parameter projected; returns a warning for all that fell short."""
        self.settle()
        warnings = [
            f"{type(method).__name__}: training ended at step {self.step:,}, before the window "
            f"{first:,} to {last + self.held:,} did; it has not reached its full strength"
            for method, (first, last) in self.windows.items()
            if self.clock < last
        ]
        for optimizer in self._optimizers:
            latents = {name for name, _ in self._latents(optimizer)}
            for name, parameter in self._parameters(optimizer).items():
                for method in self.chain(name):
                    if method.chosen_at is None:
                        continue
                    if not method.holds(name):
                        warnings.append(
                            f"{type(method).__name__} left out {name}: neither gradients nor "
                            "inputs that it could choose by ever reached it"
                        )
                    elif name not in latents:  # no step ever touched it
                        strength = self._strength(method, self.clock)
                        method.project_(name, local(parameter), strength)
                if not local(parameter).isfinite().all():
                    warnings.append(
                        f"{name} holds NaN or infinity: training diverged; lower the learning "
                        "rate, or clip gradients"
                    )
                if not whole(parameter).count_nonzero():
                    warnings.append(
                        f"no weight of {name} is left, and what follows it sees constants: give it "
                        "a sparsity of its own with overrides, or prune by allocation='lamp'"
                    )
        return warnings

    @torch.no_grad()
    def project_average_(self, name: str, average: Tensor) -> None:
        """Project an average of a parameter's latents as the parameter itself is projected."""
        for method in self.chain(name):
            self._project_average_(method, name, average)

    def reselect(self) -> None:
        """Let every method select anew in the middle of training, from a module that changed."""
        # What takes part goes on, also while another optimizer's turn has switched it off.
        switched = [parameter for parameter in self.names if not parameter.requires_grad]
        for parameter in switched:
            parameter.requires_grad_(True)
        for method in self.methods:
            method.unhook()
        self.select()
        for parameter in switched:
            parameter.requires_grad_(False)
        for method in self.methods:
            method.hook()

    def latents(self) -> dict[str, Tensor]:
        """Latent weights by name, of the parameters that have one."""
        return {
            name: latent
            for optimizer in self._optimizers
            for name, latent in self._latents(optimizer)
        }

    def distance(self) -> float:
        """Distance from the feasible set, relative: ``||u - w|| / ||u||`` over all latents.

        Zero while no method keeps a latent: hard methods act on the weight itself.
        """
        parameters = {name: parameter.detach() for parameter, name in self.names.items()}
        latents = self.latents()
        gap = sum(float(whole((u - parameters[n]).square().sum())) for n, u in latents.items())
        norm = sum(float(whole(u.square().sum())) for u in latents.values())
        return float((gap / norm) ** 0.5) if norm else 0.0

    def select(self) -> None:
        """Let every method select its parameters, and check that they fit together."""
        for method in self.methods:
            method.attach(self.module)
        self.names = {
            parameter: name
            for method in self.methods
            for name, parameter in method.selection.chosen.items()
        }
        self._waiting = {
            parameter for method in self.methods for parameter in method.selection.waiting.values()
        }
        self._members = {}
        self._check()

    def _welcome(self) -> None:
        """Take in the parameters that were frozen or not initialised when the plan was made."""
        if not any(
            parameter.requires_grad and not is_lazy(parameter) for parameter in self._waiting
        ):
            return
        known = set(self.names.values())
        self.reselect()
        joined = ", ".join(name for name in self.names.values() if name not in known)
        rank_zero_info(f"joined the compression plan at step {self.step:,}: {joined}")

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in self._restored:
            self._restored.remove(optimizer)
            self._project_(optimizer, choose=True)
            self._seed(optimizer)
        elif self._open and not self._scaled:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} stepped without Lightning, at weights that are "
                "compressed: get it from self.optimizers(), and not with use_pl_optimizer=False"
            )
        elif not self.windows:
            self._seed(optimizer)  # a step before training: a checkpoint is about to be read

    def _project_(self, optimizer: Optimizer, choose: bool) -> None:
        """Project the parameters of one optimizer, which hold what the first method sees."""
        step = self.clock + (choose and not self.holding)
        parameters = self._parameters(optimizer)
        saved: set[str] = set()
        anew = False
        for method in self.methods:
            mine = [name for name in method.selection.chosen if name in parameters]
            due = choose and (self._due(method, step) or self._late(method, step, parameters))
            if not mine or (method.chosen_at is None and not due):
                continue
            if method.straight_through:
                for name in [name for name in mine if name not in saved]:
                    if self._save(optimizer, parameters[name]):
                        saved.add(name)
                mine = [name for name in mine if name in saved]
            # What an earlier method of the chain chose anew changes what this one sees.
            strength = self._strength(method, step)
            if due or (choose and anew):
                anew = True
                method.choose(self._seen(method, parameters), strength)
                method.chosen_at = step
            for name in mine:
                method.project_(name, local(parameters[name]), strength)

    def _project_average_(self, method: Method, name: str, average: Tensor) -> None:
        if method.chosen_at is not None and method.holds(name):
            method.project_average_(name, average, self._strength(method, self.clock))

    def _strength(self, method: Method, step: int) -> float:
        first, last = self.windows[method]
        return method.strength(min(1.0, (step - first) / max(1, last - first)))

    def _due(self, method: Method, step: int) -> bool:
        first, last = self.windows[method]
        if step <= first:
            return False
        if method.chosen_at is None:
            return True
        every = method.every or max(1, (last - first) // method.times)
        return method.chosen_at < last and (step - method.chosen_at >= every or step >= last)

    def _late(self, method: Method, step: int, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether a parameter joined the optimizer, or got its first gradient, since the method
        chose."""
        return step > self.windows[method][0] and any(
            name in parameters
            and parameters[name].grad is not None
            and method.ready(name)
            and not method.holds(name)
            for name in method.selection.chosen
        )

    def _save(self, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
        """Copy a parameter to its latent. Before its first update there is none to keep: many
        optimizers take a non-empty state for an initialised one."""
        state = optimizer.state.get(parameter, {})
        if not state and parameter.grad is None:
            return False
        if LATENT in state:
            local(state[LATENT]).copy_(local(parameter))
        else:
            optimizer.state[parameter][LATENT] = parameter.detach().clone()
        return True

    def _seed(self, optimizer: Optimizer) -> None:
        """Give sharded parameters their latents early: sharded checkpoints are read into what is
        there already, and into nothing else."""
        for name, parameter in self._parameters(optimizer).items():
            if not isinstance(parameter, DTensor) or LATENT in optimizer.state.get(parameter, {}):
                continue
            if any(method.straight_through for method in self.chain(name)):
                self._save(optimizer, parameter)

    def _seen(self, method: Method, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All weights of a method, whole, as the methods before it in their chains leave them."""
        latents, orphans = self.latents(), set(self.orphans())
        seen = {
            name: parameters[name] if name in parameters else latents.get(name, parameter)
            for name, parameter in method.selection.chosen.items()
            if name not in orphans
        }
        for name, tensor in seen.items():
            if not whole(tensor.detach().isfinite().all()):
                raise FloatingPointError(
                    f"{name} holds NaN or infinity at step {self.step + 1:,}, and "
                    f"{type(method).__name__} cannot tell which of its weights matter: training "
                    "diverged; lower the learning rate, or clip gradients"
                )

        def weight(name: str) -> Tensor:
            if name in parameters:
                return whole(parameters[name].detach())
            # Another optimizer's turn is over, or comes: its parameter is taken from the latent.
            latent = seen[name].detach().clone()
            for before in itertools.takewhile(lambda other: other is not method, self.chain(name)):
                self._project_average_(before, name, local(latent))
            return whole(latent)

        return Lazy(seen, weight)

    def _latents(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters(optimizer).items():
            latent = optimizer.state.get(parameter, {}).get(LATENT)
            # Seeded ones count once a method that keeps them has begun.
            if latent is not None and any(
                method.straight_through and method.chosen_at is not None
                for method in self.chain(name)
            ):
                yield name, latent

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
                        f"{first} before {second} on {name} makes no sense, since the second "
                        f"undoes the first: list {second} first"
                    )
                if before.straight_through and not after.straight_through:
                    raise MisconfigurationException(
                        f"{second} on {name} projects the latent weight itself and cannot follow "
                        f"{first}, which is straight-through: list it first"
                    )


def gradient_scale(optimizer: Optimizer, scaler: GradScaler | None) -> float:
    """What gradients are multiplied by when Lightning is about to step."""
    # Fused optimizers get scaled gradients, and unscale them by themselves.
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and fused else 1.0


def _words(method: Method) -> str:
    bounds = []
    for name in ("start", "stop"):
        step, fraction = getattr(method, f"{name}_step"), getattr(method, name)
        bounds.append(f"step {step:,}" if step is not None else f"{fraction:g} of training")
    return f"from {bounds[0]} to {bounds[1]}"


def _refuse(optimizer: Optimizer) -> None:
    """Optimizers whose steps cannot be followed by a projection."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            f"{name} searches along a line, computing the loss at weights that are not compressed: "
            "use SGD, Adam or another optimizer that computes it once in a step"
        )
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise MisconfigurationException(
            f"{name} swaps the weights for averages of its own, which are not compressed: use the "
            "optimizer that it is based on, with fitsmall.callbacks.EMA for the average"
        )


def _deaf(optimizer: Optimizer) -> MisconfigurationException:
    return MisconfigurationException(
        f"{type(optimizer).__name__} does not call the hooks of its step, so that no projection "
        "can follow it: use an optimizer that derives from torch's Optimizer and calls its __init__"
    )


def _finite(optimizer: Optimizer) -> bool:
    """Whether the step will be taken: a gradient scaler skips it if any gradient is not finite."""
    gradients = [
        parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    finite = [whole(gradient.isfinite().all()) for gradient in gradients]
    return bool(torch.stack(finite).all()) if finite else True


def _rate(optimizer: Optimizer) -> float:
    """The learning rate as a fraction of the largest that its schedule has."""
    group = optimizer.param_groups[0]
    first = max(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr"))
    return float(group["lr"]) / first if first else 1.0


def _gradient(parameter: nn.Parameter, scale: float) -> Tensor | None:
    """The gradient as it would be without a gradient scaler."""
    if parameter.grad is None:
        return None
    gradient = local(parameter.grad)
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient if scale == 1.0 else gradient / scale
