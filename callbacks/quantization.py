"""Quantization-aware training: the network meets the rounding that it will be deployed with."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.adam import adam

from fitsmall.callbacks.method import Method
from fitsmall.compressors.lattice import blocked, spread
from fitsmall.compressors.oneshot import attach_saved
from fitsmall.compressors.quantize import (
    QUANTIZER,
    TRANSPOSED,
    ActivationQuantizer,
    Quantize,
    attach_quantizer,
    bounds,
    clipped,
    detach_quantizer,
    half,
    layout,
    quantize_,
    rounded,
    steps_of,
)
from fitsmall.compressors.select import match
from fitsmall.compressors.training.bitwidth_search import Widths
from fitsmall.compressors.training.sharding import gather, local, processes, shard, stack

__all__ = ["QuantizationAwareTraining"]

# Learning rate of the logarithms of steps, under Adam: a fraction of themselves in every step.
_RATE = 3e-3

# Layers that have one input, of activations.
_QUANTIZED_INPUTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

Bits = int | Sequence[int | str | None]


class QuantizationAwareTraining(Method):
    r"""Round weights, and the inputs of their layers, as the deployed network will.

    The forward pass sees ``s q`` with few-bit integers ``q``; gradients are taken there, and move
    the latent weights (the straight-through estimator, Bengio et al., 2013). Weights are symmetric
    with a step for each output channel, activations unsigned with one step for each layer's input.
    Zero is a level, so pruned weights stay zero.

    Training has up to four phases: float; observing, in which the ranges of activations are
    recorded; quantized, from ``start`` on; and from ``stop`` on with steps and ranges fixed. They
    are counted in steps, and go on where they were when a run is resumed.

    Under mixed precision (``bf16-mixed``, ``16-mixed``) the master weights, steps and ranges stay
    in float32, and so does the arithmetic of rounding; only the layers' products are computed in
    half precision, as they would be without quantization.

    Args:
        weight_bits: 2 to 8, or 16 for half precision; or ``"auto"``: each weight has a width of its
            own, 2, 3, 4, 6, 8 or 16, those by which rounding raises the loss least within a budget.
        activation_bits: 2 to 8, or None to leave activations as they are.
        weight_scale: ``"mse"``: the step with the least squared error, found anew ten times in the
            window; ``"learned"``: it starts there, and is trained by its gradient (LSQ, Esser et
            al., 2020).
        activation_scale: ``"learned"``, as LSQ, or ``"range"``: the grid covers a moving average of
            the least and the largest value, as it always does for inputs that no gradient reaches,
            such as the data.
        granularity: ``"channel"``, ``"tensor"``, or a number of inputs of a channel that share a
            step.
        start: Fraction of training after which the network is quantized.
        stop: Fraction of training after which steps and ranges stay as they are.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        observe_steps: Steps before ``start`` in which activations are observed, and gradients for
            automatic widths; at least the first step of training is.
        freeze_norms: Fraction of training after which batch-norm layers use their running
            statistics, as they will when they are folded into the weights.
        every: Steps between searches for the weights' steps.
        include: Patterns of parameter names that replace the default, the weights of Linear,
            Conv, Embedding and attention layers.
        exclude: Patterns of parameter names to leave out.
        overrides: Bits by pattern: of weights and activations, or a pair of both. First and last
            layers are usually kept at 8 bits: ``{"conv1": 8, "fc": 8}``. ``("auto", 8)`` is an
            automatic width with inputs of 8 bits.
        average_bits: Budget of automatic widths: bits of a weight on average, over all that are
            quantized, overrides among them.
        max_bytes: The same in bytes, of all that the module saves: weights and their steps before
            entropy coding, which makes them smaller, and everything else as it is.
        reallocate: Whether automatic widths are chosen once more, halfway from ``start`` to
            ``stop``, by the gradients of the ``observe_steps`` before.

    Example:
        >>> from fitsmall.callbacks import Plan
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10), nn.Linear(10, 5))
        >>> print(Plan([QuantizationAwareTraining(4, 4, overrides={"2": 8})], net, horizon=100))
        Compression plan
          QuantizationAwareTraining: 4-bit weights (mse), 4-bit activations (learned), 1 ...
            2 tensors, 250 weights: 0.weight, 2.weight
            inputs of 0 (4 bits), 2 (8 bits)
          left out (not the weight of a Linear, Conv, Embedding or attention layer): 0.bias, ...
    """

    place = 1
    times = 10

    def __init__(
        self,
        weight_bits: int | Literal["auto"] = 8,
        activation_bits: int | None = 8,
        weight_scale: Literal["mse", "learned"] = "mse",
        activation_scale: Literal["learned", "range"] = "learned",
        granularity: str | int = "channel",
        start: float = 0.3,
        stop: float = 0.9,
        start_step: int | None = None,
        stop_step: int | None = None,
        observe_steps: int = 100,
        freeze_norms: float | None = None,
        every: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        overrides: Mapping[str, Bits] | None = None,
        average_bits: float | None = None,
        max_bytes: int | None = None,
        reallocate: bool = False,
    ) -> None:
        super().__init__(start, stop, start_step, stop_step, every, include, exclude)
        for name, value, known in (
            ("weight_scale", weight_scale, ("mse", "learned")),
            ("activation_scale", activation_scale, ("learned", "range")),
        ):
            if value not in known:
                raise MisconfigurationException(
                    f"QuantizationAwareTraining: unknown {name} {value!r}, choose "
                    f"{' or '.join(known)}"
                )
        if freeze_norms is not None and not 0.0 <= freeze_norms <= 1.0:
            raise MisconfigurationException(
                f"QuantizationAwareTraining: freeze_norms={freeze_norms} is no fraction of training"
            )
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.weight_scale, self.activation_scale = weight_scale, activation_scale
        self.granularity, self.observe_steps = granularity, observe_steps
        self.freeze_norms, self.reallocate = freeze_norms, reallocate
        self.overrides = self._overrides(overrides)
        if not isinstance(observe_steps, int) or observe_steps < 1:
            raise MisconfigurationException(
                f"QuantizationAwareTraining: observe_steps={observe_steps!r} is no number of "
                "optimizer steps"
            )
        auto = weight_bits == "auto"
        self.widths = Widths(average_bits, max_bytes) if auto else None
        given = {"average_bits": average_bits, "max_bytes": max_bytes, "reallocate": reallocate}
        if not auto and (unused := [name for name, value in given.items() if value]):
            raise MisconfigurationException(
                f"QuantizationAwareTraining: {', '.join(unused)} is for weight_bits='auto', and "
                f"weight_bits is {weight_bits!r}"
            )
        for bits in ((weight_bits, activation_bits), *map(self._pair, self.overrides.values())):
            # Both raise for what there is not.
            Quantize(8 if auto and bits[0] == "auto" else bits[0], granularity)
            if bits[1] is not None:
                ActivationQuantizer(bits[1])
        self.bits: dict[str, tuple[int | Literal["auto"], int | None]] = {}
        self.blocks: dict[str, tuple[int, ...]] = {}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.norms: list[nn.Module] = []
        self._norms_from = float("inf")
        self.reset()

    def describe(self) -> str:
        kind = f"{self.weight_bits}-bit weights"
        if self.widths is not None:
            kind = f"weights of automatic widths within {self.widths}"
        weights = f"{kind} ({self.weight_scale})"
        activations = f"{self.activation_bits}-bit activations ({self.activation_scale})"
        own = f", {len(self.overrides)} overrides" if self.overrides else ""
        return f"{weights}{f', {activations}' if self.activation_bits else ''}{own}"

    def remarks(self) -> list[str]:
        inputs = [f"{_layer(name)} ({self.bits[name][1]} bits)" for name in self.quantizers]
        others = [_layer(name) for name in self.bits if name not in self.quantizers]
        lines = [f"inputs of {', '.join(inputs)}"] if inputs else []
        if others:
            lines.append(f"weights alone, not their inputs: {', '.join(others)}")
        return lines

    # What is quantized.

    def attach(self, module: nn.Module) -> None:
        """Give every chosen layer its quantizer, once."""
        super().attach(module)
        chosen = self.selection.chosen
        own = {name: self._pair(bits) for name, bits in match(self.overrides, [*chosen]).items()}
        self.bits = {
            name: own.get(name, (self.weight_bits, self.activation_bits)) for name in chosen
        }
        self.norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self.blocks, self.quantizers = {}, {}
        for name, parameter in chosen.items():
            layer = module.get_submodule(_layer(name))
            axis = int(isinstance(layer, TRANSPOSED))
            self.blocks[name] = layout(parameter.shape, self.granularity, axis)
            functional = isinstance(_parent(module, name), nn.MultiheadAttention)
            bits = self.bits[name][1] if name.endswith("weight") else None
            if bits is not None and isinstance(layer, _QUANTIZED_INPUTS) and not functional:
                learned = self.activation_scale == "learned"
                self.quantizers[name] = attach_quantizer(layer, bits, learned)
        if self.widths is not None:
            fixed = {name: bits for name, (bits, _) in self.bits.items() if bits != "auto"}
            self.widths.attach(module, self.blocks, fixed)

    def _pair(self, bits: Any) -> tuple[Any, Any]:
        if isinstance(bits, int):
            return bits, None if self.activation_bits is None else min(bits, 8)
        pair = isinstance(bits, Sequence) and not isinstance(bits, str) and len(bits) == 2
        if not pair or bits[0] is None:
            raise MisconfigurationException(
                "QuantizationAwareTraining: overrides are bits, or pairs of bits of weights and of "
                f"activations, and got {bits!r}; to leave a layer out, exclude it"
            )
        return bits[0], bits[1]

    def _width(self, name: str) -> int | None:
        """Bits of a weight, None before they are chosen."""
        bits = self.bits[name][0]
        if bits != "auto":
            return bits
        assert self.widths is not None
        return self.widths.chosen.get(name)

    # Lightning's side: quantizers before optimizers, and the phases.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, WeightAveraging) and self.activation_bits is not None:
                raise MisconfigurationException(
                    f"{type(callback).__name__} before QuantizationAwareTraining would average a "
                    "network without its quantizers: list it behind"
                )
        self._attach_early(pl_module)
        if stage == "fit" and not trainer.global_step:
            for name in self.bits:  # what an earlier training left
                if name in self.quantizers:
                    self.quantizers[name].reset()
                elif name.endswith("weight"):
                    detach_quantizer(pl_module.get_submodule(_layer(name)))

    def _attach_early(self, module: nn.Module) -> None:
        try:
            self.attach(module)
        except ValueError:  # no layers yet; the plan asks again, and says so
            return

    def before_reading(self, module: nn.Module, state: dict[str, Any]) -> None:
        # A checkpoint may have other quantizers than the module: of layers that configure_model
        # made or that joined later, or none at all.
        self._attach_early(module)
        attach_saved(module, state)
        for name, tensor in module.state_dict().items():
            if f"{QUANTIZER}." in name:
                state.setdefault(name, tensor)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        horizon = trainer.estimated_stepping_batches
        self._norms_from = float("inf")
        if self.freeze_norms is not None:
            if horizon == float("inf"):
                raise MisconfigurationException(
                    f"QuantizationAwareTraining: freeze_norms={self.freeze_norms} is a fraction of "
                    "a training that has no known end: set max_steps or max_epochs"
                )
            self._norms_from = self.freeze_norms * horizon

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_start(trainer, *args, **kwargs)
        assert self.plan is not None
        first, last = self.plan.windows[self]
        clock = self.plan.clock
        pending = [name for name, q in self.quantizers.items() if not q.active]
        for name in pending if clock >= max(first, 1) else ():
            self._activate(name)
        for quantizer in self.quantizers.values():
            needed = not quantizer.active or not quantizer.learned
            quantizer.observing = first - self.observe_steps <= clock < last and needed
            trains = quantizer.active and quantizer.learned and clock < last
            if quantizer.log_step.requires_grad != trains:
                quantizer.log_step.requires_grad_(trains)
        if self.plan.step >= self._norms_from:
            for norm in self.norms:
                if norm.training:
                    norm.eval()

    def _activate(self, name: str) -> None:
        quantizer, layer = self.quantizers[name], _layer(name)
        low, high, mean = quantizer.seen.tolist()
        if mean < 0:
            return
        if not math.isfinite(low + high + mean):
            raise FloatingPointError(
                f"the inputs of {layer} hold NaN or infinity, and have no range to quantize: "
                "training diverged; lower the learning rate, or clip gradients"
            )
        if low == high:
            raise MisconfigurationException(
                f"QuantizationAwareTraining: the inputs of {layer} were zero in all steps that "
                f"were observed: observe more than {self.observe_steps} steps, or exclude the layer"
            )
        quantizer.active = True

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._rest()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._rest()
        unseen = [_layer(name) for name, q in self.quantizers.items() if not q.active]
        if unseen and self.chosen_at is not None:
            pl.utilities.rank_zero_warn(
                f"QuantizationAwareTraining: the inputs of {', '.join(unseen)} were never seen in "
                "training and are not quantized: are these layers called as modules?"
            )

    def _rest(self) -> None:
        for quantizer in self.quantizers.values():
            quantizer.observing = False
            quantizer.log_step.requires_grad_(False)
            quantizer.log_step.grad = None

    # Steps of weights.

    def reset(self) -> None:
        self.steps: dict[str, Tensor] = {}
        # Learned logarithms of steps, their gradients and Adam's state; of activations the key is
        # the quantizer's name.
        self.log_steps: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.moments: dict[str, list[Tensor]] = {}
        if self.widths is not None:
            self.widths.reset()

    def holds(self, name: str) -> bool:
        return name in self.steps

    @property
    def observes(self) -> bool:
        return self.weight_scale == "learned" or self.widths is not None

    def ready(self, name: str) -> bool:
        if self.widths is not None and name in self.widths.fisher:
            return True
        return self._width(name) is not None

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        if self.widths is not None:
            self._choose_widths(self.widths, weights)
        for name in weights:
            bits = self._width(name)
            if bits is None:  # it waits for its first gradient
                continue
            if bits == 16:
                self.steps[name] = weights[name].new_ones(self.blocks[name])
            elif self.weight_scale == "mse" or name not in self.steps:
                self.steps[name] = steps_of(weights[name], bits, self.blocks[name])

    def _choose_widths(self, widths: Widths, weights: Mapping[str, Tensor]) -> None:
        assert self.plan is not None
        again = self.plan.clock >= self._again_at
        due = [n for n in weights if n in widths.fisher and (again or n not in widths.chosen)]
        if not due:
            return
        for name in due:
            widths.weigh(name, weights[name])
        widths.again = widths.again or again
        for name in widths.solve():
            for kept in (self.steps, self.log_steps, self.moments):
                kept.pop(name, None)
        pl.utilities.rank_zero_info(widths.table())

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        if name not in self.steps:
            return
        bits = self._width(name)
        assert bits is not None
        if bits == 16:
            weight.copy_(half(weight))
        else:
            quantize_(weight, self._own(name), bits)

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        """Sensitivities, and LSQ's gradient of a weight's step; the latent's own is 0 outside of
        the range."""
        if self._gathers(name) and gradient is not None:
            assert self.widths is not None
            self.widths.observe(name, gradient)
        bits, latent = self._width(name), state.get("latent")
        if self.weight_scale == "mse" or name not in self.steps or bits is None or bits == 16:
            return
        if latent is None or gradient is None:
            return
        assert self.plan is not None
        low, high = bounds(bits)
        u, g, parameter = local(latent).float(), gradient.float(), self.selection.chosen[name]
        levels = u / spread(self._own(name).float(), weight.shape)
        if self._trains:
            inside = clipped(g, levels, low, high)
            if len(self.plan.chain(name)) > 1:  # a weight that was pruned follows no step
                inside.masked_fill_((weight == 0) & (levels.abs() > 0.5), 0.0)
            of_log = (g * weight.float()).sub_(inside.mul_(u))
            rows = blocked(gather(of_log, parameter), self.blocks[name])
            self.gradients[name] = rows.sum(1).view(self.blocks[name])
        if parameter.grad is not None:
            grad = local(parameter.grad)
            grad.copy_(clipped(grad.float(), levels, low, high))

    def _gathers(self, name: str) -> bool:
        """Whether a gradient counts for the choice of widths that comes next."""
        if self.widths is None or self.bits[name][0] != "auto":
            return False
        assert self.plan is not None
        first, _ = self.plan.windows[self]
        choice = self._again_at if name in self.widths.chosen else first
        return self.plan.clock >= choice - self.observe_steps

    @property
    def _again_at(self) -> float:
        """The step from which widths may be chosen once more."""
        assert self.plan is not None
        assert self.widths is not None
        first, last = self.plan.windows[self]
        return (first + last) / 2 if self.reallocate and not self.widths.again else float("inf")

    def update(self, names: Collection[str], rate: float, scale: float) -> None:
        mine = {name: q for name, q in self.quantizers.items() if name in names}
        observing = [quantizer for quantizer in mine.values() if quantizer.observing]
        _share_staged(observing)
        for quantizer in observing:
            quantizer.commit()
        parameters: dict[str, Tensor] = {}
        gradients: list[Tensor] = []
        for name, gradient in self.gradients.items():
            if name not in names:
                continue
            if name not in self.log_steps:
                self.log_steps[name] = self.steps[name].float().log()
            parameters[name] = self.log_steps[name]
            gradients.append(gradient)
        for name, quantizer in mine.items():
            step = quantizer.log_step
            if step.requires_grad:  # on every process, whether or not it has used the layer
                parameters[f"{name}:input"] = step.detach()
                own = torch.zeros_like(step) if step.grad is None else step.grad
                gradients.append(own if scale == 1.0 else own / scale)
        _share_mean(gradients)
        if parameters:
            # A gradient scaler does not look at these.
            self._adam(parameters, [g.nan_to_num(0.0, 0.0, 0.0) for g in gradients], rate)
        for name in self.gradients.keys() & names:
            dtype = self.steps[name].dtype
            bits = self._width(name)
            assert bits is not None
            self.steps[name] = rounded(self.log_steps[name].exp(), bits, dtype).to(dtype)
        self.skip(names)

    @property
    def _trains(self) -> bool:
        return self.plan is not None and self.plan.clock < self.plan.windows[self][1]

    def _adam(self, parameters: dict[str, Tensor], gradients: list[Tensor], rate: float) -> None:
        """A step of Adam: of its own, since the steps are no parameters of the module, in no
        optimizer's groups, and of another scale."""
        for key, parameter in parameters.items():
            if key not in self.moments:
                zeros = torch.zeros_like(parameter)
                self.moments[key] = [zeros, zeros.clone(), torch.zeros(())]
        first, second, count = zip(*(self.moments[key] for key in parameters), strict=True)
        with torch.no_grad():
            adam(
                list(parameters.values()),
                gradients,
                list(first),
                list(second),
                [],
                list(count),
                foreach=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=_RATE * rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )

    def skip(self, names: Collection[str]) -> None:
        self.gradients = {name: g for name, g in self.gradients.items() if name not in names}
        for name in self.quantizers.keys() & names:
            quantizer = self.quantizers[name]
            quantizer.log_step.grad = None
            if quantizer.observing:
                quantizer.drop()

    def choices(self) -> dict[str, Any]:
        choices = {"steps": self.steps, "log_steps": self.log_steps, "moments": self.moments}
        return choices if self.widths is None else choices | self.widths.state()

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        def here(name: str, tensor: Tensor) -> Tensor:
            return tensor.to(module.get_parameter(name.removesuffix(":input")).device)

        self.gradients = {}
        self.steps = {name: here(name, tensor) for name, tensor in choices["steps"].items()}
        self.log_steps = {name: here(name, t) for name, t in choices["log_steps"].items()}
        self.moments = {
            key: [here(key, first), here(key, second), count]
            for key, (first, second, count) in choices["moments"].items()
        }
        if self.widths is not None:
            self.widths.load(choices)

    def _own(self, name: str) -> Tensor:
        """Steps of this process's part of a weight."""
        steps, parameter = self.steps[name], self.selection.chosen[name]
        if local(parameter) is parameter:
            return steps
        return shard(steps.expand(len(parameter), *steps.shape[1:]).contiguous(), parameter)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _parent(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(_layer(_layer(name)))


def _share_staged(quantizers: list[ActivationQuantizer]) -> None:
    """Let every process see what all have seen."""
    _, world = processes()
    if world == 1 or not quantizers:
        return
    mine = torch.stack([quantizer.staged for quantizer in quantizers])
    parts = stack(mine)
    seen = parts[..., 2] >= 0
    means = (parts[..., 2] * seen).sum(0) / seen.sum(0)
    means = torch.where(seen.any(0), means, -1.0)
    low, high = parts[..., 0].amin(0), parts[..., 1].amax(0)
    for quantizer, staged in zip(quantizers, torch.stack([low, high, means], 1), strict=True):
        quantizer.staged.copy_(staged)


def _share_mean(gradients: list[Tensor]) -> None:
    """Put the mean over all processes in place of each one's gradients."""
    _, world = processes()
    if world == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
