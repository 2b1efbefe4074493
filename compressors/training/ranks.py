"""Rank learning: training finds the rank of each layer, and replaces the layer by two factors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fitsmall.compressors.lowrank import (
    DENSE,
    LossMetric,
    Options,
    Rank,
    Spectrum,
    Truncate,
    choose_ranks,
    matrix,
    price_of,
)
from fitsmall.compressors.schedules import Schedule
from fitsmall.compressors.select import Selection, select
from fitsmall.compressors.surgery.factorable import factorable, forms, places, unit_costs
from fitsmall.compressors.surgery.factors import Factored, Factorization, is_factor
from fitsmall.compressors.surgery.protocol import Surgery
from fitsmall.compressors.torch_internals import require
from fitsmall.compressors.training.messages import inform, warn
from fitsmall.compressors.training.product_decay import decay_products_
from fitsmall.compressors.training.proximal import Proximal
from fitsmall.compressors.training.sharding import gather, processes
from fitsmall.compressors.training.stage import Stage

__all__ = ["RankLearning"]

# Number of gradients that are observed between two choices of ranks.
_SAMPLES = 10

# Layers whose multiply-adds are counted.
_COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RankLearning(Proximal):
    r"""Learn the rank of every layer during training, and replace the layer by two smaller ones.

    Idelbayev and Carreira-Perpinan, "Low-rank compression of neural nets: learning the rank of each
    layer" (CVPR 2020), within one training. From ``start`` to ``stop`` weights are pulled towards
    their best approximations of low rank, more and more strongly, see
    :class:`~fitsmall.compressors.training.Proximal`. At every choice the ranks are found again from
    the singular values of all layers,

        min over ranks  price C(r) + sum over layers of ||W - W_r||^2,

    where the price is the one that meets the budget, and the norm measures by how much a change of
    the weight raises the loss, see :class:`~fitsmall.compressors.lowrank.LossMetric`.

    At ``stop`` each layer for which that is cheaper is replaced by two, ``reduce`` and ``expand``.
    These train like any other layers: the optimizer continues with their share of its moments, and
    weight decay acts on their product. The other layers stay. A convolution is a matrix in one of
    two forms, see :mod:`fitsmall.compressors.lowrank`; the better one is chosen.

    List it before other methods. Those that begin at its ``stop`` or later act on the factors.

    Args:
        keep_flops: Budget: fraction of the multiply-adds of all Linear and convolution layers.
        keep_size: Budget: fraction of the module's parameters.
        price: Price of the whole cost, instead of a budget: an error as a fraction of
            ``sum of ||W||^2``.
        cost: Cost that the price is paid for, ``"size"`` or ``"flops"``.
        schedule: Strength of the pull as a function of progress through the window.
        start: Fraction of training at which the pull begins.
        stop: Fraction of training at which layers are replaced.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between choices of ranks; by default the window has 50.
        include: Patterns of parameter names that replace the default, the weights of Linear
            layers and convolutions without groups.
        exclude: Patterns of parameter names to leave out.

    Example:
        >>> from torch import nn
        >>> from fitsmall.compressors.training import Plan
        >>> net = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
        >>> print(Plan([RankLearning(keep_size=0.3)], net, horizon=1000))
        Compression plan
          RankLearning: ranks within 0.3 of the size, proximal, steps 0 to 500
            2 tensors, 21,000 weights: 0.weight, 2.weight
          left out (not the weight of a Linear, Conv, Embedding or attention layer): 0.bias, 2.bias
    """

    order = -1
    followed = frozenset({"keep_flops", "keep_size", "price", "cost", "schedule", "every"})

    def __init__(
        self,
        keep_flops: float | None = None,
        keep_size: float | None = None,
        price: float | None = None,
        cost: Literal["size", "flops"] = "size",
        schedule: Schedule | None = None,
        start: float = 0.0,
        stop: float = 0.5,
        start_step: int | None = None,
        stop_step: int | None = None,
        every: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
    ) -> None:
        super().__init__(schedule, start, stop, start_step, stop_step, every, include, exclude)
        choices = {"keep_flops": keep_flops, "keep_size": keep_size, "price": price}
        given = {name: value for name, value in choices.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "RankLearning: give one of keep_flops, keep_size and price, and got "
                f"{', '.join(given) or 'none'}; keep_flops=0.5 leaves half of the multiply-adds"
            )
        ((name, value),) = given.items()
        if name == "price" and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"RankLearning: a price is above 0, got {value}")
        if name != "price" and not 0 < value < 1:
            raise ValueError(f"RankLearning: {name} is a fraction in (0, 1), got {value}")
        if cost not in ("size", "flops"):
            raise ValueError(f"RankLearning: unknown cost {cost!r}, choose size or flops")
        self.keep = None if name == "price" else value
        self.keep_flops, self.keep_size, self.price = keep_flops, keep_size, price
        self.cost = cost if name == "price" else name.removeprefix("keep_")
        self.layers: dict[str, Any] = {}
        self._meters: list[RemovableHandle] = []

    def describe(self) -> str:
        if self.keep is None:
            return f"ranks at price {self.price:g} of the {self.cost}"
        return f"ranks within {self.keep:g} of the {self.cost}"

    def remarks(self) -> list[str]:
        learned = [f"{name} {rank}" for name, rank in self.ranks.items()]
        return [f"ranks: {', '.join(learned)}"] if learned else []

    def metrics(self) -> dict[str, float]:
        found = {f"rank/{name}": float(rank.rank or 0) for name, rank in self.ranks.items()}
        return found | self.left

    # Selection.

    def attach(self, module: nn.Module) -> None:
        selection = select(module, self.include, self.exclude)
        factors = {name: "a factor already" for name in selection.chosen if is_factor(module, name)}
        if self.done or factors:
            others = dict.fromkeys(selection.chosen, "it is cheaper as it is")
            self.selection = Selection({}, {**selection.skipped, **others, **factors})
        else:
            self.selection = factorable(module, selection)
        self.parameters = dict(module.named_parameters())
        self.layers = {
            name: layer for name, layer in module.named_modules() if isinstance(layer, _COUNTED)
        }
        self.pairs = [layer for layer in module.modules() if isinstance(layer, Factored)]
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())

    def hook(self) -> None:
        if self.chosen_at is None:
            self._meters = [
                layer.register_forward_hook(_Meter(self.positions, name))
                for name, layer in self.layers.items()
            ]

    def unhook(self) -> None:
        while self._meters:
            self._meters.pop().remove()

    def reset(self) -> None:
        super().reset()
        self.done = False
        self.ranks: dict[str, Rank] = {}
        self.left: dict[str, float] = {}
        # Averages of ``G G^T`` and ``G^T G``, with ``G`` the gradient of a weight.
        self.grams: dict[str, tuple[Tensor, Tensor]] = {}
        self._metrics: dict[str, LossMetric] = {}
        # By layer: positions at which it computes outputs, and at which the first layer of a
        # separable pair would, summed over forward passes.
        self.positions: dict[str, tuple[float, float]] = {}

    # Ranks.

    def has_choice(self, name: str) -> bool:
        return name in self.ranks

    @property
    def is_final(self) -> bool:
        """Whether ranks are final."""
        return self.chosen_at is not None and self.chosen_at >= self.window.last

    @property
    def needs_gradients(self) -> bool:
        return not self.is_final

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        first, last = self.window
        between = max(1, (self.every or (last - first) // self.num_updates) // _SAMPLES)
        if gradient is None or (name in self.grams and self.clock.steps % between):
            return
        whole = gather(gradient, self.selection.chosen[name]).float()
        rows, columns = whole.flatten(1), whole.transpose(0, 1).flatten(1)
        grams = rows @ rows.T, columns @ columns.T
        if name not in self.grams:
            self.grams[name] = grams
        for average, gram in zip(self.grams[name], grams, strict=True):
            average.lerp_(gram, 1 / _SAMPLES)

    def is_ready(self, name: str) -> bool:
        return name in self.grams

    def choose_projections(self, weights: Mapping[str, Tensor]) -> None:
        if self._meters:
            self._add_up_positions()
        self.unhook()
        self._metrics = {}
        ready = [name for name in weights if self.is_ready(name)]
        options = {
            name: Options(
                {
                    form: Spectrum(matrix(self._metric(name).whiten(weights[name]), form))
                    for form in forms(self._layer(name))
                },
                self._units(name, self.cost),
                self._dense(name, self.cost),
            )
            for name in ready
        }
        self.ranks = choose_ranks(options, self._price(options))
        self.left = {kind: self._left(kind) for kind in ("size", "flops")}

    def _add_up_positions(self) -> None:
        """Add up the positions that all processes have counted, so that all choose alike."""
        if processes()[1] == 1:
            return
        device = next(iter(self.parameters.values())).device
        counts = [self.positions.get(name, (0.0, 0.0)) for name in self.layers]
        totals = torch.tensor(counts, dtype=torch.float32, device=device)
        dist.all_reduce(totals)
        self.positions.update(
            (name, (after, between))
            for name, (after, between) in zip(self.layers, totals.tolist(), strict=True)
            if after
        )

    def nearest(self, name: str, weight: Tensor) -> Tensor:
        form, rank = self.ranks.get(name, DENSE)
        if rank is None:
            return weight
        metric = self._metric(name)
        projected = Truncate(rank, form=form).project(metric.whiten(weight))
        return metric.unwhiten(projected).to(weight.dtype)

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        if self.ranks.get(name, DENSE).rank is not None:  # dense ones are not pulled
            super().project_(name, weight, strength)

    def _metric(self, name: str) -> LossMetric:
        if name not in self._metrics:
            self._metrics[name] = LossMetric(*self.grams[name])
        return self._metrics[name]

    def _price(self, options: Mapping[str, Options]) -> float:
        total = self._total(self.cost)
        if not total:
            raise ValueError(
                "RankLearning: no Linear or convolution layer was called in training, and "
                "multiply-adds are unknown: give keep_size instead of keep_flops"
            )
        if self.price is not None:
            return self.price * sum(mine.norm for mine in options.values()) / total
        assert self.keep is not None
        others = total - sum(self._dense(name, self.cost) for name in options)
        try:
            return price_of(options, self.keep * total - others)
        except ValueError as error:
            least = (others + sum(mine.least for mine in options.values())) / total
            raise ValueError(
                f"RankLearning: keep_{self.cost}={self.keep:g} cannot be reached, since a rank of "
                f"1 in every layer leaves {least:.3f}: ask for more than that, or act on more "
                "layers"
            ) from error

    def _layer(self, name: str) -> Any:
        return self.layers[name.rpartition(".")[0]]

    def _places(self, name: str, kind: str) -> tuple[float, float]:
        return (1.0, 1.0) if kind == "size" else self.positions.get(name, (0.0, 0.0))

    def _dense(self, name: str, kind: str) -> float:
        """Return the cost of a layer as it is."""
        after, _ = self._places(name.rpartition(".")[0], kind)
        return float(after * self._layer(name).weight.numel())

    def _units(self, name: str, kind: str) -> dict[str, float]:
        """Return the cost of one rank of a layer, by form."""
        return unit_costs(self._layer(name), *self._places(name.rpartition(".")[0], kind))

    def _total(self, kind: str) -> float:
        if kind == "size":
            return self.num_parameters
        return float(
            sum(
                after * self.layers[name].weight.numel()
                for name, (after, _) in self.positions.items()
            )
        )

    def _left(self, kind: str) -> float:
        total = self._total(kind)
        saved = sum(
            self._dense(name, kind) - rank.rank * self._units(name, kind)[rank.form]
            for name, rank in self.ranks.items()
            if rank.rank is not None
        )
        return 1 - saved / total if total else 1.0

    # Factors.

    def check(self, others: Sequence[Stage]) -> None:
        require("RankLearning")
        end = self.window.last
        for other in others:
            shared = self.selection.chosen.keys() & other.selection.chosen.keys()
            if other is not self and shared and other.window.first < end:
                raise ValueError(
                    f"{type(other).__name__} begins at step {other.window.first:,} with "
                    f"{min(shared)}, which RankLearning replaces by two factors at step {end:,}: "
                    f"let it begin then, with start_step={end}, or leave the weight out of one of "
                    "them"
                )

    def before_update(
        self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], gradient_scale: float
    ) -> None:
        if self.done:
            decay_products_(optimizer, self.pairs, gradient_scale)

    @property
    def replaces_layers(self) -> bool:
        return True

    def surgery(self) -> Surgery | None:
        if not self.is_final or self.done:
            return None
        return Factorization(self.ranks)

    @property
    def surgery_waits(self) -> bool:
        # A sharded weight cannot be replaced: each process has only a part of it.
        return any(isinstance(parameter, DTensor) for parameter in self.selection.chosen.values())

    def operated(self, complete: Mapping[str, bool]) -> None:
        self.done = True
        lost = [name for name, whole in complete.items() if not whole]
        if lost:
            warn(
                f"RankLearning: the optimizer's state of {', '.join(lost)} is of a kind that "
                "cannot be carried over to factors: the optimizer starts without a state for these"
            )
        inform(f"RankLearning: layers became two at step {self.clock.steps:,}, {self._summary()}")
        if ones := [name for name, rank in self.ranks.items() if rank.rank == 1]:
            warn(
                f"RankLearning: {', '.join(ones)} keep a rank of 1, the lowest: lower the price, "
                "raise the budget, or leave them out with exclude=[...]"
            )

    def finish(self) -> list[str]:
        if self.surgery() and self.surgery_waits:
            inform(
                "RankLearning: sharded weights are projected to their ranks and keep their shapes "
                "in this training; the file of CompressedCheckpoint holds two layers for each, "
                f"which restore() creates, {self._summary()}"
            )
        return []

    def _summary(self) -> str:
        made = ", ".join(f"{name} {rank}" for name, rank in self.ranks.items())
        return (
            f"with {self.left['size']:.1%} of the parameters and {self.left['flops']:.1%} of the "
            f"multiply-adds left: {made}"
        )

    def choices(self) -> dict[str, Any]:
        ranks = {name: [rank.form, rank.rank] for name, rank in self.ranks.items()}
        positions = {name: list(both) for name, both in self.positions.items()}
        own = {"ranks": ranks, "positions": positions, "left": self.left, "done": self.done}
        if self.done:
            return own
        return {**super().choices(), **own, "grams": {n: list(g) for n, g in self.grams.items()}}

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        self.ranks = {name: Rank(form, rank) for name, (form, rank) in choices["ranks"].items()}
        self.positions = {name: (a, b) for name, (a, b) in choices["positions"].items()}
        self.left, self.done = choices["left"], choices["done"]
        if not self.done:
            super().load_choices(choices, module)
            devices = {name: parameter.device for name, parameter in module.named_parameters()}
            self.grams = {
                name: (a.to(devices[name]), b.to(devices[name]))
                for name, (a, b) in choices["grams"].items()
            }


class _Meter:
    """A hook that counts the positions at which a layer computes outputs in training."""

    def __init__(self, positions: dict[str, tuple[float, float]], name: str) -> None:
        self.positions, self.name = positions, name

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not layer.training:
            return
        after, between = places(layer, inputs[0], output)
        before = self.positions.get(self.name, (0.0, 0.0))
        self.positions[self.name] = before[0] + after, before[1] + between
