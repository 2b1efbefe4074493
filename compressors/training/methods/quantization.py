"""Quantization-aware training: the network trains with the rounding of its deployment."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fitsmall.compressors.codes.lattice import blocked, spread
from fitsmall.compressors.naming import abridged, group_by, grouped
from fitsmall.compressors.projections.quantize import (
    Quantize,
    bounds,
    clipped,
    few_digits,
    half,
    quantize_,
    scales_of,
)
from fitsmall.compressors.surgery.quantizers import (
    QUANTIZER,
    ActivationQuantizer,
    InputQuantizers,
    detach_quantizer,
    takes_quantizer,
)
from fitsmall.compressors.torch_internals import require
from fitsmall.compressors.training.messages import inform
from fitsmall.compressors.training.methods.bitwidth_search import BitwidthSearch
from fitsmall.compressors.training.methods.scales import INPUT_SUFFIX, ScaleLearning
from fitsmall.compressors.training.optimizers import like_gradient
from fitsmall.compressors.training.sharding import gather, local, processes, shard, stack
from fitsmall.compressors.training.stage import Stage
from fitsmall.compressors.weights import owner

__all__ = ["QuantizationAwareTraining"]

# Layers that use running statistics once they are frozen.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Bits = int | Sequence[int | str | None]


class QuantizationAwareTraining(Stage):
    r"""Round weights, and the inputs of their layers, as the deployed network does.

    The forward pass sees ``s q`` with few-bit integers ``q``. Gradients are taken there, and move
    the latent weights (the straight-through estimator, Bengio et al., 2013). Weights are symmetric
    with a scale for each output channel, activations unsigned with one scale for each layer's
    input. Zero is a level, so pruned weights stay zero.

    Training has up to four phases:

    1. float;
    2. observing: the ranges of activations are recorded, for ``observe_steps`` before ``start``;
    3. quantized, from ``start`` on;
    4. quantized with fixed scales and ranges, from ``stop`` on.

    Under mixed precision (``bf16-mixed``, ``16-mixed``) the weights, scales and ranges stay in
    float32, and so does the arithmetic of rounding. Only the layers' products are computed in half
    precision, as without quantization.

    Args:
        weight_bits: 2 to 8, or 16 for half precision; or ``"auto"``: each weight tensor gets its
            own 2, 3, 4, 6, 8 or 16 bits, so that rounding raises the loss least within a budget.
        activation_bits: 2 to 8, or None to leave activations as they are.
        weight_scale: ``"mse"``: the scale with the least squared error, searched ten times in the
            window; ``"learned"``: the first such scale, then trained by its gradient (LSQ, Esser
            et al., 2020).
        activation_scale: ``"learned"``, as LSQ, or ``"range"``: the grid covers a moving average of
            the minimum and the maximum. Inputs without a gradient, such as the data, always use
            the range.
        granularity: Weights that share a scale: ``"channel"``, ``"tensor"``, or the size of groups
            of inputs of a channel.
        start: Fraction of training after which the network is quantized.
        stop: Fraction of training after which scales and ranges stay as they are.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        observe_steps: Steps before ``start`` in which activations are observed, and gradients for
            automatic bits; at least the first step of training is observed.
        freeze_norms: Fraction of training after which batch-norm layers use their running
            statistics, as they do once they are folded into the weights.
        every: Steps between searches for the weights' scales.
        include: Patterns of parameter names that replace the default, all weights: see
            :func:`~fitsmall.compressors.select`.
        exclude: Patterns of parameter names to leave out.
        overrides: Bits by pattern of parameter names: one number for weights and activations, or a
            pair ``(weight bits, activation bits)``. First and last layers usually keep 8 bits:
            ``{"conv1": 8, "fc": 8}``. ``("auto", 8)`` is automatic bits with inputs of 8 bits.
        average_bits: Budget of automatic bits: the average number of bits of a quantized weight,
            those with overrides included.
        max_bytes: Budget of automatic bits: bytes of the whole state dict, with quantized weights
            as integers and scales, before entropy coding.
        reallocate: Whether automatic bits are chosen a second time, halfway from ``start`` to
            ``stop``, from the gradients of the last ``observe_steps`` steps.

    Example:
        >>> from torch import nn
        >>> from fitsmall.compressors.training import Plan
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10), nn.Linear(10, 5))
        >>> print(Plan([QuantizationAwareTraining(4, 4, overrides={"2": 8})], net, horizon=100))
        Compression plan of 285 parameters
          QuantizationAwareTraining: 4-bit weights (mse), 4-bit activations (learned), 1 ...
            inputs of 4 bits: 0
            inputs of 8 bits: 2
            acts on 87.7 %:
              0.weight  200  70.2 %
              2.weight   50  17.5 %
          left out (a bias or a norm): 0-2.bias, 1.weight; 12.3 %, 140 bytes
    """

    order = 1
    num_updates = 10
    followed = frozenset({"every", "freeze_norms"})
    fixed = frozenset({"activation_bits", "activation_scale", "overrides"})

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
                raise ValueError(
                    f"QuantizationAwareTraining: unknown {name} {value!r}, choose "
                    f"{' or '.join(known)}"
                )
        if freeze_norms is not None and not 0.0 <= freeze_norms <= 1.0:
            raise ValueError(
                f"QuantizationAwareTraining: freeze_norms={freeze_norms} is no fraction of training"
            )
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.weight_scale, self.activation_scale = weight_scale, activation_scale
        self.granularity, self.observe_steps = granularity, observe_steps
        self.freeze_norms, self.reallocate = freeze_norms, reallocate
        self.overrides = self._overrides(overrides)
        if not isinstance(observe_steps, int) or observe_steps < 1:
            raise ValueError(
                f"QuantizationAwareTraining: observe_steps={observe_steps!r} is no number of "
                "optimizer steps"
            )
        self.average_bits, self.max_bytes = average_bits, max_bytes
        auto = weight_bits == "auto"
        self.search = BitwidthSearch(average_bits, max_bytes) if auto else None
        given = {"average_bits": average_bits, "max_bytes": max_bytes, "reallocate": reallocate}
        if not auto and (unused := [name for name, value in given.items() if value]):
            raise ValueError(
                f"QuantizationAwareTraining: {', '.join(unused)} needs weight_bits='auto', and "
                f"weight_bits is {weight_bits!r}"
            )
        for bits in ((weight_bits, activation_bits), *map(self._pair, self.overrides.values())):
            # Both constructors check the bits.
            Quantize(8 if auto and bits[0] == "auto" else bits[0], granularity)
            if bits[1] is not None:
                ActivationQuantizer(bits[1])
        self.bits: dict[str, tuple[int | Literal["auto"], int | None]] = {}
        self.blocks: dict[str, tuple[int, ...]] = {}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.norms: list[nn.Module] = []
        self._plain: list[nn.Module] = []
        self._tied: list[str] = []  # layers whose weight another layer has first
        self._norms_frozen_at = float("inf")
        self.reset()

    def describe(self) -> str:
        kind = f"{self.weight_bits}-bit weights"
        if self.search is not None:
            kind = f"weights of automatic bits within {self.search}"
        weights = f"{kind} ({self.weight_scale})"
        activations = f"{self.activation_bits}-bit activations ({self.activation_scale})"
        own = f", {len(self.overrides)} overrides" if self.overrides else ""
        return f"{weights}{f', {activations}' if self.activation_bits else ''}{own}"

    def remarks(self) -> list[str]:
        by_bits = group_by(self.quantizers, lambda name: self.bits[name][1])
        lines = [f"inputs of {bits} bits: {self._layers(names)}" for bits, names in by_bits.items()]
        others = [name for name in self.bits if name not in self.quantizers]
        if others or self._tied:
            lines.append(f"weights alone, not their inputs: {self._layers(others, self._tied)}")
        return lines

    def _layers(self, names: Iterable[str], more: Iterable[str] = ()) -> str:
        """Return a list of the layers of some weights, and of more layers."""
        layers = dict.fromkeys([*(self.selection.forms[name].layer for name in names), *more])
        return abridged([pattern for pattern, _ in grouped(layers)])

    # Weights and layers that are quantized.

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        numbers = [name for name, p in self.selection.chosen.items() if not p.dim()]
        self.selection = self.selection.without(dict.fromkeys(numbers, "it is a single number"))
        chosen = self.selection.chosen
        overrides = self.selection.match(self.overrides)
        own = {name: self._pair(bits) for name, bits in overrides.items()}
        self.bits = {
            name: own.get(name, (self.weight_bits, self.activation_bits)) for name in chosen
        }
        self.norms = [layer for layer in module.modules() if isinstance(layer, _NORMS)]
        self.blocks, self._plain = {}, []
        input_bits: dict[str, int] = {}
        weights: dict[str, str] = {}
        for name, parameter in chosen.items():
            form = self.selection.forms[name]
            try:
                self.blocks[name] = form.scale_shape(parameter.shape, self.granularity)
            except ValueError as error:
                raise ValueError(f"{name}: {error}, or leave it out with exclude=[...]") from error
            path, layer, own_name = owner(module, name)
            attention = isinstance(_parent(module, path), nn.MultiheadAttention)
            called = takes_quantizer(layer) and not attention
            bits = self.bits[name][1]
            if own_name == "weight" and bits is not None and called:
                input_bits[path] = bits
                weights[path] = name
            elif own_name == "weight":
                self._plain.append(layer)
        quantizers = InputQuantizers(input_bits, self.activation_scale == "learned")
        quantizers.apply(module)
        self.quantizers = {
            weights[layer]: quantizer for layer, quantizer in quantizers.of(module).items()
        }
        first = {parameter: name for name, parameter in chosen.items()}
        self._tied = [
            path
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if first.get(parameter, name) != name
            and not hasattr(module.get_submodule(path := owner(module, name)[0]), QUANTIZER)
        ]
        if self.search is not None:
            fixed = {name: bits for name, (bits, _) in self.bits.items() if bits != "auto"}
            self.search.attach(module, self.blocks, fixed)

    def _pair(self, bits: Any) -> tuple[Any, Any]:
        if isinstance(bits, int):
            return bits, None if self.activation_bits is None else min(bits, 8)
        pair = isinstance(bits, Sequence) and not isinstance(bits, str) and len(bits) == 2
        if not pair or bits[0] is None:
            raise ValueError(
                "QuantizationAwareTraining: an override is a number of bits, or a pair of bits of "
                f"weights and of activations, and got {bits!r}; to leave a layer out, exclude it"
            )
        return bits[0], bits[1]

    def _weight_bits(self, name: str) -> int | None:
        """Return the bits of a weight, or None before they are chosen."""
        bits = self.bits[name][0]
        if bits != "auto":
            return bits
        return self.search.chosen.get(name) if self.search else None

    # Phases.

    def check(self, others: Sequence[Stage]) -> None:
        require("QuantizationAwareTraining")

    def begin(self, horizon: float) -> None:
        if self.freeze_norms is None:
            self._norms_frozen_at = float("inf")
        elif horizon == float("inf"):
            raise ValueError(
                f"QuantizationAwareTraining: freeze_norms={self.freeze_norms} is a fraction of "
                "a training that has no known end: set max_steps or max_epochs"
            )
        else:
            self._norms_frozen_at = self.freeze_norms * horizon

    def prepare_step(self) -> None:
        first, last = self.window
        now = self.clock.now
        pending = [name for name, q in self.quantizers.items() if not q.active]
        for name in pending if now >= max(first, 1) else ():
            self._activate(name)
        for quantizer in self.quantizers.values():
            needed = not quantizer.active or not quantizer.learned
            quantizer.observing = first - self.observe_steps <= now < last and needed
            trains = quantizer.active and quantizer.learned and now < last
            if quantizer.log_scale.requires_grad != trains:
                quantizer.log_scale.requires_grad_(trains)
        if self.clock.steps >= self._norms_frozen_at:
            for norm in self.norms:
                if norm.training:
                    norm.eval()

    def _activate(self, name: str) -> None:
        quantizer, layer = self.quantizers[name], self.selection.forms[name].layer
        low, high, mean = quantizer.seen.tolist()
        if mean < 0:
            return
        if not math.isfinite(low + high + mean):
            raise FloatingPointError(
                f"the inputs of {layer} hold NaN or infinity, and have no range to quantize: "
                "training diverged; lower the learning rate, or clip gradients"
            )
        quantizer.active = low < high  # zeros, as of a pruned layer, wait for a range

    def finish(self) -> list[str]:
        self.rest()
        unseen = [name for name, q in self.quantizers.items() if not q.active]
        if not unseen or self.chosen_at is None:
            return []
        warning = (
            f"QuantizationAwareTraining: the inputs of {self._layers(unseen)} were always zero or "
            "never seen in training, and are not quantized: are these layers called as modules, "
            "and is anything left of the layers before them?"
        )
        return [warning]

    def rest(self) -> None:
        for quantizer in self.quantizers.values():
            quantizer.observing = False
            quantizer.log_scale.requires_grad_(False)
            quantizer.log_scale.grad = None

    # Scales of weights.

    def reset(self) -> None:
        for quantizer in self.quantizers.values():
            quantizer.reset()
        for layer in self._plain:  # an earlier training may have quantized their inputs
            detach_quantizer(layer)
        self.scales: dict[str, Tensor] = {}
        self.learning = ScaleLearning()
        if self.search is not None:
            self.search.reset()

    def has_choice(self, name: str) -> bool:
        return name in self.scales

    def narrowed(self, names: Collection[str]) -> None:
        if self.search is not None:
            self.search.drop(names)

    def is_ready(self, name: str) -> bool:
        if self.search is not None and name in self.search.fisher:
            return True
        return self._weight_bits(name) is not None

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        if self.search is not None:
            self._choose_bits(self.search, weights)
        for name in weights:
            bits = self._weight_bits(name)
            if bits is None:  # no gradient yet to choose them by
                continue
            if bits == 16:
                self.scales[name] = weights[name].new_ones(self.blocks[name])
            elif self.weight_scale == "mse" or name not in self.scales:
                self.scales[name] = scales_of(weights[name], bits, self.blocks[name])

    def _choose_bits(self, search: BitwidthSearch, weights: Mapping[str, Tensor]) -> None:
        reallocate = self.clock.now >= self._reallocate_at
        due = [n for n in weights if n in search.fisher and (reallocate or n not in search.chosen)]
        if not due:
            return
        for name in due:
            search.measure(name, weights[name])
        search.reallocated = search.reallocated or reallocate
        for name in search.solve():
            self.scales.pop(name, None)
            self.learning.forget(name)
        inform(search.table())

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        bits = self._weight_bits(name)
        if name not in self.scales or bits is None:
            return
        if bits == 16:
            weight.copy_(half(weight))
        else:
            quantize_(weight, self._own_scales(name), bits)

    # Gradients.

    @property
    def needs_gradients(self) -> bool:
        return self.weight_scale == "learned" or self.search is not None

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        """Collect sensitivities and LSQ's gradient of the weight's scale.

        Where the latent is outside of the range, its own gradient is set to 0.
        """
        if self.search is not None and gradient is not None and self._counts(self.search, name):
            self.search.observe(name, gradient)
        bits, latent = self._weight_bits(name), state.get("latent")
        if self.weight_scale == "mse" or name not in self.scales or bits is None or bits == 16:
            return
        if latent is None or gradient is None:
            return
        low, high = bounds(bits)
        u, g, parameter = local(latent).float(), gradient.float(), self.selection.chosen[name]
        levels = u / spread(self._own_scales(name).float(), weight.shape)
        if self.clock.now < self.window.last:
            inside = clipped(g, levels, low, high)
            if name in self.projected_before:  # a pruned weight has no gradient of the scale
                inside.masked_fill_((weight == 0) & (levels.abs() > 0.5), 0.0)
            log_gradient = (g * weight.float()).sub_(inside.mul_(u))
            rows = blocked(gather(log_gradient, parameter), self.blocks[name])
            self.learning.gradients[name] = rows.sum(1).view(self.blocks[name])
        if parameter.grad is not None:
            grad = local(parameter.grad)
            dense = grad.to_dense().float() if grad.is_sparse else grad.float()
            grad.copy_(like_gradient(clipped(dense, levels, low, high).to(grad.dtype), grad))

    def _counts(self, search: BitwidthSearch, name: str) -> bool:
        """Return whether a gradient counts for the next choice of bits."""
        if self.bits[name][0] != "auto":
            return False
        choice = self._reallocate_at if name in search.chosen else self.window.first
        return self.clock.now >= choice - self.observe_steps

    @property
    def _reallocate_at(self) -> float:
        """The step from which bits may be chosen a second time."""
        first, last = self.window
        done = not self.reallocate or self.search is None or self.search.reallocated
        return float("inf") if done else (first + last) / 2

    def train_own(self, names: Collection[str], learning_rate: float, loss_scale: float) -> None:
        quantizers = {name: q for name, q in self.quantizers.items() if name in names}
        observing = [quantizer for quantizer in quantizers.values() if quantizer.observing]
        _share_ranges(observing)
        for quantizer in observing:
            quantizer.commit()
        for name in self.learning.step(names, self.scales, quantizers, learning_rate, loss_scale):
            bits, dtype = self._weight_bits(name), self.scales[name].dtype
            assert bits is not None  # weights with scales have bits
            learned = self.learning.log_scales[name].exp()
            self.scales[name] = few_digits(learned, bits, dtype).to(dtype)
        self.discard(names)

    def discard(self, names: Collection[str]) -> None:
        self.learning.discard(names)
        for name in self.quantizers.keys() & names:
            quantizer = self.quantizers[name]
            quantizer.log_scale.grad = None
            if quantizer.observing:
                quantizer.drop()

    # State.

    def choices(self) -> dict[str, Any]:
        choices = {"scales": self.scales, **self.learning.state_dict()}
        return choices if self.search is None else choices | self.search.state()

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        def device(key: str) -> torch.device:
            return module.get_parameter(key.removesuffix(INPUT_SUFFIX)).device

        self.scales = {name: tensor.to(device(name)) for name, tensor in choices["scales"].items()}
        self.learning.load_state_dict(choices, device)
        if self.search is not None:
            self.search.load(choices)

    def _own_scales(self, name: str) -> Tensor:
        """Return the scales of this process's part of a weight."""
        scales, parameter = self.scales[name], self.selection.chosen[name]
        if local(parameter) is parameter:
            return scales
        rows = (len(parameter), *scales.shape[1:])
        return shard(spread(scales, rows).expand(rows).contiguous(), parameter)


def _parent(module: nn.Module, layer: str) -> nn.Module:
    return module.get_submodule(layer.rpartition(".")[0])


def _share_ranges(quantizers: list[ActivationQuantizer]) -> None:
    """Give every process the range of values that all processes together have seen."""
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
