"""Rank learning: training finds the rank of each layer, and replaces the layer by two factors."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fitsmall.compressors.choices.rank_choice import (
    DENSE,
    Options,
    Rank,
    choose_ranks,
    ranks_within,
)
from fitsmall.compressors.choices.schedules import Schedule
from fitsmall.compressors.projections.lowrank import Spectrum, matrix, tensor
from fitsmall.compressors.select import Selection, select
from fitsmall.compressors.surgery.factorable import factorable
from fitsmall.compressors.surgery.factors import Factored, Factorization, is_factor
from fitsmall.compressors.surgery.protocol import Surgery
from fitsmall.compressors.torch_internals import require
from fitsmall.compressors.training.messages import inform, warn
from fitsmall.compressors.training.methods.gradient_grams import GradientGrams
from fitsmall.compressors.training.methods.layer_costs import LayerCosts
from fitsmall.compressors.training.methods.product_decay import decay_products_
from fitsmall.compressors.training.methods.proximal import Proximal
from fitsmall.compressors.training.sharding import gather
from fitsmall.compressors.training.stage import Stage

__all__ = ["RankLearning"]

# Number of gradients that are observed between two choices of ranks.
_SAMPLES = 10

# A budget that is missed by more than this fraction of the total is worth a warning.
_TOLERANCE = 0.02


class RankLearning(Proximal):
    r"""Learn the rank of every layer during training, and replace the layer by two smaller ones.

    Idelbayev and Carreira-Perpinan, "Low-rank compression of neural nets: learning the rank of each
    layer" (CVPR 2020), within one training. From ``start`` to ``stop`` weights are pulled towards
    their best approximations of low rank, more and more strongly, see
    :class:`~fitsmall.compressors.training.Proximal`. At every choice the ranks are found again from
    the singular values of all layers,

        min over ranks  price C(r) + sum over layers of ||W - W_r||^2,

    where the price is the one that meets the budget, and the norm measures by how much a change of
    the weight raises the loss, see :class:`~fitsmall.compressors.choices.loss_metric.LossMetric`.

    At ``stop`` each layer for which that is cheaper is replaced by two, ``reduce`` and ``expand``.
    These train like any other layers: the optimizer continues with their share of its moments, and
    weight decay acts on their product. The other layers stay. A convolution is a matrix in one of
    two forms, see :mod:`fitsmall.compressors.projections.lowrank`; the better one is chosen.

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
        every: Steps between choices of ranks; by default the window has 10.
        include: Patterns of parameter names that replace the default, the weights of Linear layers
            and convolutions without groups.
        exclude: Patterns of parameter names to leave out.

    Example:
        >>> from torch import nn
        >>> from fitsmall.compressors.training import Plan
        >>> net = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
        >>> print(Plan([RankLearning(keep_size=0.3)], net, horizon=1000))
        Compression plan of 21,110 parameters
          RankLearning: ranks within 0.3 of the size, proximal, steps 0 to 500
            acts on 99.5 %:
              0.weight  20,000  94.7 %
              2.weight   1,000   4.7 %
          left out (a bias or a norm): 0.bias, 2.bias; 0.5 %, 440 bytes
    """

    order = -1
    num_updates = 10
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
        self.costs = LayerCosts()
        super().__init__(schedule, start, stop, start_step, stop_step, every, include, exclude)
        choices = {"keep_flops": keep_flops, "keep_size": keep_size, "price": price}
        given = {name: value for name, value in choices.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "RankLearning: give one of keep_flops, keep_size and price, and got "
                f"{', '.join(given) or 'none'}; keep_flops=0.5 leaves half of the multiply-adds"
            )
        ((name, value),) = given.items()
        number = isinstance(value, int | float)
        if name == "price" and not (number and value > 0 and math.isfinite(value)):
            raise ValueError(f"RankLearning: a price is above 0, got {value!r}")
        if name != "price" and not (number and 0 < value < 1):
            raise ValueError(f"RankLearning: {name} is a fraction in (0, 1), got {value!r}")
        if cost not in ("size", "flops"):
            raise ValueError(f"RankLearning: unknown cost {cost!r}, choose size or flops")
        self.keep = None if name == "price" else value
        self.keep_flops, self.keep_size, self.price = keep_flops, keep_size, price
        self.cost = cost if name == "price" else name.removeprefix("keep_")

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

    @property
    def takes_any_weight(self) -> bool:
        return False

    def attach(self, module: nn.Module) -> None:
        selection = select(module, self.include, self.exclude)
        factors = {name: "a factor already" for name in selection.chosen if is_factor(module, name)}
        if self.done or factors:
            others = dict.fromkeys(selection.chosen, "it is cheaper as it is")
            self.selection = Selection({}, {**selection.skipped, **others, **factors})
        else:
            self.selection = factorable(module, selection)
        self.parameters = dict(module.named_parameters())
        self.costs.attach(module)
        self.pairs = [layer for layer in module.modules() if isinstance(layer, Factored)]

    def hook(self) -> None:
        if not self.is_final:
            self.costs.hook()

    def unhook(self) -> None:
        self.costs.unhook()

    def reset(self) -> None:
        super().reset()
        self.done = False
        self.ranks: dict[str, Rank] = {}
        self.left: dict[str, float] = {}
        self.grams: dict[str, GradientGrams] = {}
        self.costs.reset()

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
        whole = gather(gradient, self.selection.chosen[name])
        if name in self.grams:
            self.grams[name].update(whole, 1 / _SAMPLES)
        elif grams := GradientGrams.of(whole):
            self.grams[name] = grams

    def narrowed(self, names: Collection[str]) -> None:
        self.grams = {name: own for name, own in self.grams.items() if name not in names}

    def is_ready(self, name: str) -> bool:
        return name in self.grams

    def choose_projections(self, weights: Mapping[str, Tensor]) -> None:
        self.costs.synchronize(next(iter(self.parameters.values())).device)
        ready = [name for name in weights if self.is_ready(name)]
        options = {name: self._options(name, weights[name]) for name in ready}
        self.ranks = self._choose(options)
        self.left = {kind: self._left(kind) for kind in ("size", "flops")}
        if math.isinf(self.penalty):
            self._report_budget()

    def _options(self, name: str, weight: Tensor) -> Options:
        whitened = self.grams[name].metric.whiten(weight)
        units = self.costs.units(name, self.cost)
        spectra = {form: Spectrum(matrix(whitened, form)) for form in units}
        return Options(spectra, units, self.costs.dense(name, self.cost))

    def nearest(self, name: str, weight: Tensor) -> Tensor:
        form, rank = self.ranks.get(name, DENSE)
        if rank is None:
            return weight
        metric = self.grams[name].metric
        left, right = Spectrum(matrix(metric.whiten(weight), form), rank).factors(rank)
        return metric.unwhiten(tensor(left @ right, weight.shape, form)).to(weight.dtype)

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        if self.ranks.get(name, DENSE).rank is not None:  # dense ones are not pulled
            super().project_(name, weight, strength)

    def _choose(self, options: Mapping[str, Options]) -> dict[str, Rank]:
        total = self.costs.total(self.cost)
        if not total:
            raise ValueError(
                "RankLearning: no Linear or convolution layer was called in training, and "
                "multiply-adds are unknown: give keep_size instead of keep_flops"
            )
        if self.price is None:
            return ranks_within(options, self._budget(options, total))
        return choose_ranks(
            options, self.price * sum(mine.norm for mine in options.values()) / total
        )

    def _budget(self, options: Mapping[str, Options], total: float) -> float:
        """Return the cost that layers may have which have had gradients.

        Until the last choice the others are expected to take their share as soon as they have some;
        then they stay as they are.
        """
        assert self.keep is not None
        self._check_budget(total)
        dense = {name: self.costs.dense(name, self.cost) for name in self.selection.chosen}
        others = total - sum(dense.values())
        budget, mine = self.keep * total - others, sum(dense[name] for name in options)
        if math.isinf(self.penalty):
            budget -= sum(dense.values()) - mine
        else:
            budget *= mine / sum(dense.values())
        return max(budget, sum(mine.least for mine in options.values()))

    def _check_budget(self, total: float) -> None:
        """Refuse a budget that no ranks meet."""
        assert self.keep is not None
        costs, chosen = self.costs, self.selection.chosen
        saved = sum(costs.dense(name, self.cost) - costs.least(name, self.cost) for name in chosen)
        if total - saved > self.keep * total:
            raise ValueError(
                f"RankLearning: keep_{self.cost}={self.keep:g} cannot be reached, since a rank of "
                f"1 in every layer leaves {1 - saved / total:.3f}: ask for more than that, or act "
                "on more layers"
            )

    def _report_budget(self) -> None:
        """Warn if the ranks miss the budget."""
        if self.keep is None or abs(self.left[self.cost] - self.keep) <= _TOLERANCE:
            return
        waiting = [name for name in self.selection.chosen if name not in self.ranks]
        reason = (
            f"{', '.join(waiting)} had no gradients and stay as they are"
            if self.left[self.cost] > self.keep
            else "no rank more of any layer fits into what is left, or lowers the error"
        )
        warn(
            f"RankLearning: keep_{self.cost}={self.keep:g} is missed, "
            f"{self.left[self.cost]:.3f} is what can be had: {reason}"
        )

    def _left(self, kind: str) -> float:
        total = self.costs.total(kind)
        saved = sum(
            self.costs.dense(name, kind) - rank.rank * self.costs.units(name, kind)[rank.form]
            for name, rank in self.ranks.items()
            if rank.rank is not None
        )
        return 1 - saved / total if total else 1.0

    # Factors.

    def check(self, others: Sequence[Stage]) -> None:
        require("RankLearning")
        # Multiply-adds are known only after a step, and sizes of lazy layers, too.
        known = self.selection.chosen and not self.selection.waiting
        if known and self.keep_size is not None:
            self._check_budget(self.costs.total("size"))
        end = self.window.last
        for other in others:
            shared = self.selection.chosen.keys() & other.selection.chosen.keys()
            if other is self or (other.replaces_layers and other.window.last <= self.window.first):
                continue
            if shared and other.window.first < end:
                raise ValueError(
                    f"{type(other).__name__} begins at step {other.window.first:,} with "
                    f"{min(shared)}, which RankLearning replaces by two factors at step {end:,}: "
                    f"let it begin then, with start_step={end}, or leave the weight out of one of "
                    "them"
                )

    def before_update(
        self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], gradient_scale: float
    ) -> None:
        self.costs.close()
        if self.done:
            decay_products_(optimizer, self.pairs, gradient_scale)

    @property
    def replaces_layers(self) -> bool:
        return True

    @property
    def replaces_parameters(self) -> bool:
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
        own = {
            "ranks": ranks,
            "costs": self.costs.state_dict(),
            "left": self.left,
            "done": self.done,
        }
        if self.done:
            return own
        grams = {name: [own.outputs, own.inputs, own.peak] for name, own in self.grams.items()}
        return {**super().choices(), **own, "grams": grams}

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        self.ranks = {name: Rank(form, rank) for name, (form, rank) in choices["ranks"].items()}
        self.costs.load_state_dict(choices["costs"])
        self.left, self.done = choices["left"], choices["done"]
        if not self.done:
            super().load_choices(choices, module)
            devices = {name: parameter.device for name, parameter in module.named_parameters()}
            self.grams = {
                name: GradientGrams(
                    outputs.to(devices[name]), inputs.to(devices[name]), float(peak)
                )
                for name, (outputs, inputs, peak) in choices["grams"].items()
            }
