"""Channel pruning: channels, heads and hidden units leave the network in the middle of training."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fitsmall.compressors.choices.schedules import LinearRamp, Schedule
from fitsmall.compressors.export.latency import LATENCY_ENGINES
from fitsmall.compressors.naming import lookup
from fitsmall.compressors.select import Selection, select
from fitsmall.compressors.surgery.narrowing import Narrowing
from fitsmall.compressors.surgery.protocol import Surgery
from fitsmall.compressors.torch_internals import require
from fitsmall.compressors.training.channels.latency_target import LatencyTarget
from fitsmall.compressors.training.channels.network_calls import NetworkCalls
from fitsmall.compressors.training.channels.network_units import NetworkUnits, Place
from fitsmall.compressors.training.channels.unit_scores import SAMPLES, UnitScores
from fitsmall.compressors.training.channels.width_budget import WidthBudget
from fitsmall.compressors.training.channels.width_history import WidthHistory
from fitsmall.compressors.training.coverage import num_weights
from fitsmall.compressors.training.messages import inform
from fitsmall.compressors.training.stage import Stage

__all__ = ["ChannelPruning"]

# Fraction of the time from one cut to the next in which a chosen unit fades, and its first pull.
_FADE, _WEAKEST = 0.2, 1e-3


class ChannelPruning(Stage):
    r"""Remove channels, heads and hidden units during training, so that the network is narrower.

    A *unit* is all that goes together: a channel's kernel, its bias, its norm, and the weights of
    all layers that read it; see :mod:`fitsmall.compressors.units`. From ``start`` on units are
    chosen every so often, more of them each time: those that matter least for the cost that they
    save, see :mod:`fitsmall.compressors.choices.width_choice`. After every step the weights ``w_u``
    of a chosen unit are pulled to zero,

        w_u <- (1 - rho) w_u,    rho = 0.001^(1 - t),

    where ``t`` grows from 0 to 1 during a fifth of the window. It is the proximal step of
    ``mu / 2 ||w_u||^2`` with ``rho = eta mu / (1 + eta mu)``. A unit that matters again by the next
    choice is let go. After four fifths of the window the budget is met, and the choice stands. At
    ``stop`` the chosen units are zero, and leave the network: tensors, gradients and the
    optimizer's state lose their slices, and training continues with a narrower network, which is
    faster on any engine.

    The units are found in the first step, by tracing the module that is called there. List the
    stage before other methods; those that begin at its ``stop`` or later act on what is left.

    Args:
        keep_flops: Budget: fraction of the multiply-adds of all products with weights.
        keep_size: Budget: fraction of the module's parameters.
        keep_latency: Budget: fraction of the time that a forward pass takes, measured on this
            machine with torch's number of threads, on two examples of the first batch.
        engine: Engine in which ``keep_latency`` is measured: ``"torch"``, ``"compiled"``,
            ``"onnxruntime"`` or ``"openvino"``.
        integers: Whether latency is that of the network with weights and inputs of 8 bits, which
            :class:`~fitsmall.compressors.training.QuantizationAwareTraining` makes of it later; as
            a fraction of that with floats. Nothing leaves if integers alone are fast enough.
        criterion: How much a unit matters. ``"taylor"``: ``E[(sum of w g)^2]`` over its weights,
            the squared slope of the loss along the unit's scale (Molchanov et al., 2019);
            ``"hessian"``: ``E[sum of (w g)^2]``; ``"magnitude"``: ``sum of w^2``, as a fraction of
            the mean of its group.
        schedule: How much of the cost that has to leave is chosen, as a function of the progress
            in the first four fifths of the window.
        round_to: Widths become multiples of this number of channels. Engines prefer multiples of 8
            or 16: by default it is 16, and in narrow layers an eighth of their width.
        cuts: Number of times that units leave, at equal distances from ``start`` to ``stop``; the
            window of each is a part of the whole one. Training itself becomes faster with the
            first cut.
        start: Fraction of training at which the pull begins.
        stop: Fraction of training at which the last units leave.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between choices; by default the window has 20.
        include: Patterns of parameter names that replace the default, all weights. A unit can leave
            only if all weights that it stands in are selected.
        exclude: Patterns of parameter names to leave out.
        overrides: Fractions of units to keep, whatever the budget says, by pattern of the names of
            the layers that write them: ``{"encoder.*.fc1": 0.75}``.
        groups: Groups of units that tracing cannot find, as dimensions by the names of tensors:
            ``{"hidden": {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}}``. Of a network that
            cannot be traced they are the only ones.

    Example:
        >>> from torch import nn
        >>> from fitsmall.compressors.training import Plan
        >>> net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
        >>> print(Plan([ChannelPruning(keep_flops=0.5)], net, horizon=1000))
        Compression plan of 7,510 parameters
          ChannelPruning: widths within 0.5 of the flops (taylor), proximal, steps 100 to 500
            acts on 98.5 %:
              0.weight  6,400  85.2 %
              2.weight  1,000  13.3 %
          left out (a bias or a norm): 0.bias, 2.bias; 1.5 %, 440 bytes
    """

    order = -2
    num_updates = 20
    followed = frozenset(
        {"keep_flops", "keep_size", "keep_latency", "engine", "integers", "criterion", "schedule",
         "round_to", "every", "overrides"}
    )  # fmt: skip

    def __init__(
        self,
        keep_flops: float | None = None,
        keep_size: float | None = None,
        keep_latency: float | None = None,
        engine: Literal["torch", "compiled", "onnxruntime", "openvino"] = "torch",
        integers: bool = False,
        criterion: Literal["taylor", "hessian", "magnitude"] = "taylor",
        schedule: Schedule | None = None,
        round_to: int | None = None,
        cuts: int = 1,
        start: float = 0.1,
        stop: float = 0.5,
        start_step: int | None = None,
        stop_step: int | None = None,
        every: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        overrides: Mapping[str, float] | None = None,
        groups: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        super().__init__(start, stop, start_step, stop_step, every, include, exclude)
        budgets = {"keep_flops": keep_flops, "keep_size": keep_size, "keep_latency": keep_latency}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "ChannelPruning: give one of keep_flops, keep_size and keep_latency, and got "
                f"{', '.join(given) or 'none'}; keep_flops=0.5 leaves half of the multiply-adds"
            )
        self.overrides, self.groups = self._overrides(overrides), self._groups(groups)
        for name, value in (*given.items(), *self.overrides.items()):
            if not isinstance(value, int | float) or not 0 < value < 1 + (name in self.overrides):
                raise ValueError(
                    f"ChannelPruning: {name} is a fraction of what is kept, in (0, 1), and got "
                    f"{value!r}"
                )
        for setting, number in (("round_to", 1 if round_to is None else round_to), ("cuts", cuts)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"ChannelPruning: {setting} is at least 1, got {number!r}")
        ((name, self.keep),) = given.items()
        self.keep_flops, self.keep_size, self.keep_latency = keep_flops, keep_size, keep_latency
        self.budget = name.removeprefix("keep_")
        kind = "flops" if keep_latency is not None else self.budget
        self.history = WidthHistory()
        self.widths = WidthBudget(kind, self.keep, round_to, self.overrides, self.history)
        self.engine, self.criterion = engine, criterion
        self.scores = UnitScores(criterion)
        lookup("ChannelPruning engine", engine, LATENCY_ENGINES)
        if integers and (keep_latency is None or LATENCY_ENGINES[engine] is None):
            files = " or ".join(repr(name) for name, file in LATENCY_ENGINES.items() if file)
            raise ValueError(
                f"ChannelPruning: integers=True needs keep_latency=... in engine={files}, which "
                "have kernels for them"
            )
        self.integers = integers
        self.latency = None
        if keep_latency is not None:
            self.latency = LatencyTarget(self.keep, engine, integers)
        self.round_to, self.cuts = round_to, cuts
        self.schedule = self._schedule(schedule, LinearRamp())
        self.calls = NetworkCalls()
        self._module = nn.Module()
        self.reset()

    def reset(self) -> None:
        self.units: NetworkUnits | None = None  # until the networks have been traced
        self.finished = 0  # cuts
        self.left: dict[str, float] = {}  # fraction of each cost before training
        self.widths.totals, self.history.counts = {}, {}
        self.scores.reset()
        self.going: dict[str, Tensor] = {}  # True for each unit that leaves, by group
        self.since: dict[str, Tensor] = {}  # progress at which it was chosen
        self.stands = False  # the choice, until the cut
        self._pulled: dict[tuple[str, torch.device], list[tuple[int, Tensor, Tensor]]] = {}
        self._due = False
        self.calls.found.clear()
        if self.latency:
            self.latency.reset()

    @staticmethod
    def _groups(groups: Mapping[str, Mapping[str, int]] | None) -> dict[str, dict[str, int]]:
        found = {} if groups is None else groups
        if not isinstance(found, Mapping) or not all(
            isinstance(dims, Mapping) for dims in found.values()
        ):
            raise ValueError(
                "ChannelPruning: groups maps names to dimensions of tensors, as in "
                f"{{'hidden': {{'fc1.weight': 0, 'fc2.weight': 1}}}}, and got {groups!r}"
            )
        return {name: dict(dims) for name, dims in found.items()}

    @property
    def coupling(self) -> str:
        return "proximal"

    def describe(self) -> str:
        where = f" in {self.engine}" if self.latency else ""
        return f"widths within {self.keep:g} of the {self.budget}{where} ({self.criterion})"

    def remarks(self) -> list[str]:
        found = ["widths:", *self.history.table().splitlines()] if self.finished else []
        return found + (self.units.remarks() if self.units else [])

    def metrics(self) -> dict[str, float]:
        return self.history.metrics(self.going) | self.left

    def strength(self, progress: float) -> float:
        """Return the progress towards the next cut."""
        return min(1.0, max(0.0, progress * self.cuts - self.finished))

    @property
    def is_final(self) -> bool:
        """True once the last units have left."""
        return self.finished == self.cuts

    # Units.

    def attach(self, module: nn.Module) -> None:
        self._module, self.parameters = module, dict(module.named_parameters())
        weights = select(module, self.include, self.exclude)
        if self.latency:
            self.latency.weights = weights.chosen.keys()
        if self.units is None and not self.is_final:
            self.selection = weights
            return
        held = set() if self.units is None else self.units.places.keys()
        why = "its width is final" if self.is_final else "none of its units can leave"
        reasons = {**dict.fromkeys(weights.chosen, why), **weights.skipped}
        self.selection = Selection(
            {name: p for name, p in self.parameters.items() if name in held},
            {name: reason for name, reason in reasons.items() if name not in held},
        )

    def hook(self) -> None:
        if not self.is_final and self.units is None:
            self.calls.hook(self._module)

    def unhook(self) -> None:
        self.calls.unhook()

    def settle(self) -> bool:
        if self.is_final or self.units is not None:
            return False
        self.calls.unhook()
        if not self.calls.found:
            raise ValueError(
                "ChannelPruning: no module was called in the first step, and there is no network "
                "to trace: call modules, and not their forward or functions of their weights"
            )
        self.units = NetworkUnits(
            self._module, self.calls.found, self.selection.chosen, self.groups
        )
        if self.widths.totals:
            self.units.positions = self.widths.positions
        else:
            self._begin(self.units)
        return True

    def _begin(self, units: NetworkUnits) -> None:
        """Check the budget before the first update, and tell which units were found."""
        self.widths.begin(units, self.parameters)
        narrowest = self.widths.narrowest(units, self.parameters)
        if self.latency:
            self.latency.check(units, narrowest)
        else:
            kind = self.widths.kind
            self.widths.check(units, self.widths.left(units, self.parameters, kind, narrowest))
        held = num_weights(p for name, p in self.parameters.items() if name in units.places)
        share = held / num_weights(self.parameters.values())
        lines = "\n  ".join(units.remarks())
        inform(f"ChannelPruning: units stand in {share:.1%} of the parameters\n  {lines}")

    # Scores.

    @property
    def needs_gradients(self) -> bool:
        return not self.is_final

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        between = max(1, self.steps_between // SAMPLES)
        if gradient is None or self.units is None or self.clock.steps % between:
            return
        self.scores.observe(self.units, name, weight.detach(), gradient)

    def prepare_step(self) -> None:
        self.scores.end_step()

    def discard(self, names: Collection[str]) -> None:
        self.scores.discard_step()

    # The choice, and the pull.

    def has_choice(self, name: str) -> bool:
        return any(group in self.going for group, _ in self._places_of(name))

    def is_ready(self, name: str) -> bool:
        return any(group in self.scores.averages for group, _ in self._places_of(name))

    def _places_of(self, name: str) -> Sequence[tuple[str, Place]]:
        """Return the groups that stand in a tensor, and where."""
        return self.units.places.get(name, []) if self.units else []

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        self.scores.end_step()
        units = self.units
        scores = self.scores.of_groups()
        if units is None or not scores:
            return  # groups without gradients stay whole
        self._due = strength == 1
        if not self.stands:
            self._choose(units, scores, min(1.0, strength / (1 - _FADE)))
            for name, mask in self.going.items():
                since = self.since.get(name, torch.full(mask.shape, torch.inf))
                self.since[name] = since.clamp(max=strength).where(mask, torch.inf)
            self._pulled = {}
        for name in scores.keys() - self.going.keys():  # its first gradients came too late
            self.going[name] = torch.zeros(len(scores[name]), dtype=torch.bool)

    def _choose(self, units: NetworkUnits, scores: Mapping[str, Tensor], progress: float) -> None:
        """Choose the units that go at a progress towards the choice that stands."""
        part, self.stands = self.schedule(progress), progress == 1
        now, end = ((self.finished + done) / self.cuts for done in (part, 1))

        def within(fraction: float, done: float = end) -> dict[str, Tensor]:
            return self.widths.choose(units, self.parameters, scores, fraction, done)

        if self.latency:
            if self.stands or not self.going:
                self.going = self.latency.meet(units, 1 - (1 - self.keep) * end, within)
            if not self.stands:
                left = self.widths.left(units, self.parameters, "flops")
                self.going = within(left + part * (self.latency.fraction - left), now)
            return
        target = 1 - (1 - self.keep) * now
        self.going = within(target, now)
        if self.stands:
            left = self.widths.left(units, self.parameters, self.widths.kind, self.going)
            waiting = [name for name in units.groups if name not in scores]
            self.widths.report(left, target, waiting)

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        for dim, index, since in self._slices_of(name, weight.device):
            age = (strength - since) / _FADE if strength < 1 else torch.ones_like(since)
            left = 1 - _WEAKEST ** (1 - age.clamp(max=1))
            shape = [-1 if k == dim else 1 for k in range(weight.dim())]
            pulled = weight.index_select(dim, index).mul_(left.view(shape))
            weight.index_copy_(dim, index, pulled)

    def _slices_of(self, name: str, device: torch.device) -> list[tuple[int, Tensor, Tensor]]:
        """Return the slices of a tensor that are pulled: dimensions, indices, and since when."""
        key = name, device  # an average may lie elsewhere
        if key not in self._pulled:
            self._pulled[key] = [
                (dim, index.flatten().to(device), since.flatten().to(device))
                for group, (tensor, dim) in self._places_of(name)
                if self.units and (mask := self.going.get(group)) is not None and mask.any()
                for index in [self.units.groups[group].places[tensor, dim][mask]]
                for since in [self.since[group][mask, None].expand_as(index)]
            ]
        return self._pulled[key]

    # The cut.

    @property
    def replaces_layers(self) -> bool:
        return True

    def check(self, others: Sequence[Stage]) -> None:
        require("ChannelPruning and restore")
        if sharded := [n for n, p in self.parameters.items() if isinstance(p, DTensor)]:
            raise ValueError(
                f"ChannelPruning: {sharded[0]} is sharded, and each process has only a part of it: "
                "remove channels in a training on one device or with strategy='ddp', and train the "
                "narrower network with shards after it"
            )
        first, end = self.window
        if self.cuts > 1 and self.cuts * self.steps_between > end - first:
            raise ValueError(
                f"ChannelPruning: cuts={self.cuts} do not fit into {end - first:,} steps, since "
                f"units are chosen every {self.steps_between:,} of them: set fewer cuts, a smaller "
                "every, or a later stop"
            )
        for other in others:
            shared = self.selection.chosen.keys() & other.selection.chosen.keys()
            if other is not self and shared and other.window.first < end and not self.is_final:
                raise ValueError(
                    f"{type(other).__name__} begins at step {other.window.first:,} with "
                    f"{min(shared)}, which ChannelPruning narrows until step {end:,}: let it begin "
                    f"then, with start_step={end}, or leave the weight out of one of them"
                )

    def surgery(self) -> Surgery | None:
        if not self._due or self.units is None:
            return None
        return Narrowing.of(self.units.cut(self.going), self._module)

    def operated(self, complete: Mapping[str, bool]) -> None:
        assert self.units is not None
        self.parameters = dict(self._module.named_parameters())
        for kind in (kind for kind, total in self.widths.totals.items() if total):
            self.left[kind] = self.widths.left(self.units, self.parameters, kind)
        self.history.remove(self.going)
        if self.latency:
            self.latency.operated()
            self.left["latency"] = self.latency.left
        left = ", ".join(f"{value:.1%} of the {kind}" for kind, value in self.left.items())
        inform(
            f"ChannelPruning: units left at step {self.clock.steps:,}, and {left} remain\n"
            f"{self.history.table()}"
        )
        self.finished += 1
        self.units, self._due, self.stands = None, False, False
        self.going, self.since, self._pulled = {}, {}, {}
        self.scores.reset()
        self.calls.found.clear()

    # State.

    def choices(self) -> dict[str, Any]:
        self.scores.end_step()
        return {
            "finished": self.finished,
            "totals": self.widths.totals,
            "positions": self.widths.positions,
            "left": self.left,
            "widths": self.history.counts,
            "scores": self.scores.averages,
            "going": self.going,
            "since": self.since,
            "stands": self.stands,
            "latency": self.latency.state_dict() if self.latency else None,
        }

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        device = next(module.parameters()).device
        self.finished = choices["finished"]
        self.widths.totals, self.left = dict(choices["totals"]), dict(choices["left"])
        self.widths.positions = dict(choices["positions"])
        self.history.counts = {name: list(both) for name, both in choices["widths"].items()}
        self.scores.load(choices["scores"], device)
        self.going = {name: mask.cpu() for name, mask in choices["going"].items()}
        self.since = {name: since.cpu() for name, since in choices["since"].items()}
        self.stands = choices["stands"]
        if self.latency and choices["latency"]:
            self.latency.load_state_dict(choices["latency"])
        self.units, self._pulled = None, {}
