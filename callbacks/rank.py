"""Rank learning: training finds how many dimensions each layer needs, and ends in real factors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fitsmall.callbacks.plan import gradient_scale
from fitsmall.callbacks.proximal import Proximal
from fitsmall.compressors.lowrank import (
    DENSE,
    Metric,
    Options,
    Rank,
    Spectrum,
    Truncate,
    choose_ranks,
    matrix,
    price_of,
)
from fitsmall.compressors.quantize import detach_quantizer
from fitsmall.compressors.schedules import Schedule
from fitsmall.compressors.select import Selection, select
from fitsmall.compressors.surgery.factors import (
    Factored,
    attach_factors,
    factorable,
    forms,
    is_factor,
    places,
    replace_layer,
    split,
    unit_costs,
)
from fitsmall.compressors.training.optimizers import decay_, transplant_
from fitsmall.compressors.training.sharding import gather

__all__ = ["RankLearning"]

# Gradients that are looked at between two choices.
_SAMPLES = 10

# Layers whose multiply-adds are counted.
_COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RankLearning(Proximal):
    r"""Find the rank of every layer during training, and make two smaller layers of it.

    Idelbayev and Carreira-Perpinan, "Low-rank compression of neural nets: learning the rank of each
    layer" (CVPR 2020), inside of one training. From ``start`` to ``stop`` weights are pulled to
    their best approximations of low rank, ever more strongly, as
    :class:`~fitsmall.callbacks.proximal.Proximal` does it. Ranks are chosen anew every time: with
    the singular values of all layers,

        min over ranks  price C(r) + sum over layers of ||W - W_r||^2,

    where the price is the one that meets the budget, and the norm the one in which a change of a
    weight counts by what it does to the loss, see :class:`~fitsmall.compressors.lowrank.Metric`.

    At ``stop`` each layer that is cheaper that way becomes two, ``reduce`` and ``expand``, which
    train on as any layers do: the optimizer goes on with the moments that it had, and weight decay
    acts on their product. A layer that is cheaper as it is stays. Convolutions are matrices in two
    forms, see :mod:`fitsmall.compressors.lowrank`, and the cheaper one is taken.

    List it before other methods: what begins at its ``stop`` or later acts on the factors.

    Args:
        keep_flops: Fraction of the multiply-adds of all Linear and convolution layers that is left.
        keep_size: Fraction of the module's parameters that is left.
        price: Instead of a budget: the error, as a fraction of ``sum of ||W||^2``, that is worth
            all of the cost.
        cost: What a price is for, ``"size"`` or ``"flops"``.
        schedule: Strength of the pull as a function of progress through the window.
        start: Fraction of training at which the pull begins.
        stop: Fraction of training at which layers become two.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between choices of ranks; by default 50 are spread over the window.
        include: Patterns of parameter names that replace the default, the weights of Linear
            layers and convolutions without groups.
        exclude: Patterns of parameter names to leave out.

    Example:
        >>> from fitsmall.callbacks import Plan
        >>> net = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
        >>> print(Plan([RankLearning(keep_size=0.3)], net, horizon=1000))
        Compression plan
          RankLearning: ranks within 0.3 of the size, proximal, steps 0 to 500
            2 tensors, 21,000 weights: 0.weight, 2.weight
          left out (not the weight of a Linear, Conv, Embedding or attention layer): 0.bias, 2.bias
    """

    place = -1

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
            raise MisconfigurationException(
                "RankLearning: give one of keep_flops, keep_size and price, and got "
                f"{', '.join(given) or 'none'}; keep_flops=0.5 leaves half of the multiply-adds"
            )
        ((name, value),) = given.items()
        if name == "price" and not (value > 0 and math.isfinite(value)):
            raise MisconfigurationException(f"RankLearning: a price is above 0, got {value}")
        if name != "price" and not 0 < value < 1:
            raise MisconfigurationException(
                f"RankLearning: {name} is a fraction in (0, 1), got {value}"
            )
        if cost not in ("size", "flops"):
            raise MisconfigurationException(
                f"RankLearning: unknown cost {cost!r}, choose size or flops"
            )
        self.keep = None if name == "price" else value
        self.price = price
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

    # What has a rank.

    def attach(self, module: nn.Module) -> None:
        selection = select(module, self.include, self.exclude)
        factors = {name: "a factor already" for name in selection.chosen if is_factor(module, name)}
        if self.done or factors:
            others = dict.fromkeys(selection.chosen, "it is cheaper as it is")
            self.selection = Selection({}, {**selection.skipped, **others, **factors})
        else:
            self.selection = factorable(module, selection)
        self.layers = {
            name: layer for name, layer in module.named_modules() if isinstance(layer, _COUNTED)
        }
        self.pairs = [layer for layer in module.modules() if isinstance(layer, Factored)]
        self.parameters = sum(parameter.numel() for parameter in module.parameters())

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
        self._metrics: dict[str, Metric] = {}
        # By layer: places at which it computes outputs, and at which the first layer of a
        # separable pair would.
        self.positions: dict[str, tuple[float, float]] = {}

    # Ranks.

    def holds(self, name: str) -> bool:
        return name in self.ranks

    @property
    def settled(self) -> bool:
        """Whether ranks are final."""
        chosen, span = self.chosen_at, self.span
        return chosen is not None and span is not None and chosen >= span[1]

    @property
    def observes(self) -> bool:
        return not self.settled

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        assert self.plan is not None
        first, last = self.plan.windows[self]
        between = max(1, (self.every or (last - first) // self.times) // _SAMPLES)
        if gradient is None or (name in self.grams and self.plan.step % between):
            return
        whole = gather(gradient, self.selection.chosen[name]).float()
        rows, columns = whole.flatten(1), whole.transpose(0, 1).flatten(1)
        grams = rows @ rows.T, columns @ columns.T
        if name not in self.grams:
            self.grams[name] = grams
        for average, gram in zip(self.grams[name], grams, strict=True):
            average.lerp_(gram, 1 / _SAMPLES)

    def ready(self, name: str) -> bool:
        return name in self.grams

    def prepare(self, weights: Mapping[str, Tensor]) -> None:
        self.unhook()
        self._metrics = {}
        ready = [name for name in weights if self.ready(name)]
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

    def _metric(self, name: str) -> Metric:
        if name not in self._metrics:
            self._metrics[name] = Metric(*self.grams[name])
        return self._metrics[name]

    def _price(self, options: Mapping[str, Options]) -> float:
        total = self._total(self.cost)
        if not total:
            raise MisconfigurationException(
                "RankLearning: no Linear or convolution layer was seen at work, and multiply-adds "
                "are unknown: give keep_size instead of keep_flops"
            )
        if self.price is not None:
            return self.price * sum(mine.norm for mine in options.values()) / total
        assert self.keep is not None
        others = total - sum(self._dense(name, self.cost) for name in options)
        try:
            return price_of(options, self.keep * total - others)
        except ValueError as error:
            least = (others + sum(mine.least for mine in options.values())) / total
            raise MisconfigurationException(
                f"RankLearning: keep_{self.cost}={self.keep:g} cannot be reached, since a rank of "
                f"1 in every layer leaves {least:.3f}: ask for more than that, or act on more "
                "layers"
            ) from error

    def _layer(self, name: str) -> Any:
        return self.layers[name.rpartition(".")[0]]

    def _places(self, name: str, kind: str) -> tuple[float, float]:
        return (1.0, 1.0) if kind == "size" else self.positions.get(name, (0.0, 0.0))

    def _dense(self, name: str, kind: str) -> float:
        """Cost of a layer as it is."""
        after, _ = self._places(name.rpartition(".")[0], kind)
        return float(after * self._layer(name).weight.numel())

    def _units(self, name: str, kind: str) -> dict[str, float]:
        """Cost of a rank of a layer, by form."""
        return unit_costs(self._layer(name), *self._places(name.rpartition(".")[0], kind))

    def _total(self, kind: str) -> float:
        if kind == "size":
            return self.parameters
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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and stage == "fit":
                raise MisconfigurationException(
                    f"{type(callback).__name__} averages a network that RankLearning is about to "
                    "rebuild: average in a training of its own, behind this one"
                )

    def before_reading(self, module: nn.Module, state: dict[str, Any]) -> None:
        attach_factors(module, state)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self.plan is not None
        end = self.plan.windows[self][1]
        for method, (first, _) in self.plan.windows.items():
            shared = self.selection.chosen.keys() & method.selection.chosen.keys()
            if method is not self and shared and first < end:
                raise MisconfigurationException(
                    f"{type(method).__name__} begins at step {first:,} with {min(shared)}, which "
                    f"RankLearning replaces by two factors at step {end:,}: let it begin then, "
                    f"with start_step={end}, or leave the weight out of one of them"
                )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.done:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            decay_(optimizer, self.pairs, gradient_scale(optimizer, scaler))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if self.settled and not self.done:
            self._factorize(trainer, pl_module)

    def _factorize(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make two layers of each that has a rank, and let all that holds its weight hold them."""
        assert self.plan is not None
        chosen = self.selection.chosen
        made = ", ".join(f"{name} {rank}" for name, rank in self.ranks.items())
        left = (
            f"with {self.left['size']:.1%} of the parameters and {self.left['flops']:.1%} of the "
            f"multiply-adds left: {made}"
        )
        if any(isinstance(parameter, DTensor) for parameter in chosen.values()):
            if self.plan.clock == self.chosen_at:
                rank_zero_info(
                    "RankLearning: sharded weights have their ranks, and keep their shapes as long "
                    "as this training goes on; the file of CompressedCheckpoint will hold two "
                    f"layers for each, and restore() makes them, {left}"
                )
            return
        self.done = True
        for name, rank in self.ranks.items():
            if rank.rank is None:
                continue
            weight = chosen[name]
            detach_quantizer(self._layer(name))
            pair = replace_layer(module, name, rank)
            for optimizer in trainer.optimizers:
                if not transplant_(optimizer, weight, rank.form, pair):
                    rank_zero_warn(
                        f"RankLearning: what {type(optimizer).__name__} knew of {name} is of no "
                        "kind that its factors could take over: it begins anew with them"
                    )
        self.plan.reselect()
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = trainer.strategy._setup_model(module)
            trainer.strategy._register_ddp_hooks()
        rank_zero_info(f"RankLearning: layers became two at step {self.plan.step:,}, {left}")
        if ones := [name for name, rank in self.ranks.items() if rank.rank == 1]:
            rank_zero_warn(
                f"RankLearning: {', '.join(ones)} keep a rank of 1, the lowest: lower the price, "
                "raise the budget, or leave them out with exclude=[...]"
            )

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # What is not sharded became two layers in training.
        whole = {
            name.removesuffix(".weight"): self.ranks[name]
            for name in self.selection.chosen
            if self.settled and self.ranks[name].rank is not None
        }
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            path, _, kind = name.rpartition(".")
            if path not in whole:
                found[name] = tensor
            elif kind == "weight":
                pair = split(self.layers[path], tensor, whole[path])
                found[f"{path}.reduce.weight"] = pair.reduce.weight.detach()
                found[f"{path}.expand.weight"] = pair.expand.weight.detach()
            else:
                found[f"{path}.expand.{kind}"] = tensor
        return found

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
        if self.done:
            assert self.plan is not None
            self.plan.select()
        else:
            super().load_choices(choices, module)
            devices = {name: parameter.device for name, parameter in module.named_parameters()}
            self.grams = {
                name: (a.to(devices[name]), b.to(devices[name]))
                for name, (a, b) in choices["grams"].items()
            }


class _Meter:
    """Counts the places at which a layer computes outputs while it trains."""

    def __init__(self, positions: dict[str, tuple[float, float]], name: str) -> None:
        self.positions, self.name = positions, name

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not layer.training:
            return
        after, between = places(layer, inputs[0], output)
        before = self.positions.get(self.name, (0.0, 0.0))
        self.positions[self.name] = before[0] + after, before[1] + between
