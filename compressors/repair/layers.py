"""Repair: a trained module is compressed layer by layer, each fitted to the data that reach it.

Layers come in the order in which a forward pass reaches them, so that the inputs of each are those
that the compressed layers before it produce. A weight is fitted to the outputs that its layer had
in the original network, see :mod:`~fitsmall.compressors.repair.surgeon`, and a bias takes the mean
of their error; the layer's input may be rounded from then on. A batch-norm gets the statistics of
its input. At the end, what is not pruned and on no grid is tuned for the outputs of the whole, see
:mod:`~fitsmall.compressors.repair.tuning`.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fitsmall.compressors.codes.code import Code, Lookup, Sparse
from fitsmall.compressors.projections.projection import Projection
from fitsmall.compressors.repair.batches import Batch
from fitsmall.compressors.repair.inputs import Moments, Statistics, Watch
from fitsmall.compressors.repair.metric import output_metrics
from fitsmall.compressors.repair.surgeon import fit
from fitsmall.compressors.repair.tuning import tune
from fitsmall.compressors.surgery.quantizers import (
    QUANTIZER,
    attach_quantizer,
    detach_quantizer,
    takes_quantizer,
)
from fitsmall.compressors.torch_internals import evaluating
from fitsmall.compressors.weights import BIAS_OR_NORM, Matrices, no_weight, twin_of

__all__ = ["Metrics", "metrics_of", "repair", "tune_shared"]

# Reasons why a weight is not fitted.
_UNSEEN = "no product of it with data was seen"
_TRANSPOSED = "it belongs to a transposed convolution"


Metrics: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor]]


@torch.no_grad()
def repair(
    module: nn.Module,
    weights: Mapping[str, nn.Parameter],
    projections: Mapping[str, Projection],
    forms: Mapping[str, Matrices],
    batches: list[Batch],
    activation_bits: int | None,
    tuned: bool = True,
    metrics: Metrics | None = None,
) -> tuple[dict[str, Code], dict[str, str]]:
    """Compress weights of a module in place, fitted to data.

    If it fails, the module is as it was.

    Args:
        module: The module.
        weights: Parameters by name.
        projections: Projection of each of them.
        forms: Dimensions of each of them.
        batches: See :func:`batches_of`.
        activation_bits: Bits of the inputs of these weights' layers, or None.
        tuned: Whether codebooks, biases and norms are tuned together at the end.
        metrics: Those of the module as it is, if they are known, see :func:`metrics_of`.

    Returns:
        Codes by name, and the reason for each one that could not be fitted to data.

    Raises:
        ValueError: The module cannot take the data, a weight or its inputs hold NaN, or a
            projection refuses a weight.
    """
    before = copy.deepcopy(module.state_dict())
    work = _Repair(module, weights, projections, forms, batches, activation_bits, metrics)
    try:
        with evaluating(module):
            work.run()
            if tuned:
                work.tune()
        for layer in work.attached:
            layer.get_submodule(QUANTIZER).train(layer.training)
    except BaseException:
        for layer in work.attached:
            detach_quantizer(layer)
        module.load_state_dict(before)
        raise
    return {name: work.codes[name] for name in projections}, work.reasons


def metrics_of(module: nn.Module, names: Iterable[str], batches: Sequence[Batch]) -> Metrics:
    """Return the metrics of weights by their names.

    See :func:`~fitsmall.compressors.repair.metric.output_metrics`.
    """
    original = twin_of(module).eval()
    weights: dict[Tensor, str] = {original.get_parameter(name): name for name in names}
    products, reads = output_metrics(original, weights, batches)
    return (
        {weights[weight]: metric for weight, metric in products.items()},
        {weights[weight]: metric for weight, metric in reads.items()},
    )


class _Repair:
    """State of a repair, see :func:`repair`."""

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, nn.Parameter],
        projections: Mapping[str, Projection],
        forms: Mapping[str, Matrices],
        batches: list[Batch],
        activation_bits: int | None,
        metrics: Metrics | None,
    ) -> None:
        self.module, self.batches = module, batches
        self.projections, self.forms = projections, forms
        self.original = twin_of(module).eval()
        self.weights = {name: weights[name] for name in projections}
        self.names: dict[Tensor, str] = {weight: name for name, weight in self.weights.items()}
        self.bits, self.metrics = activation_bits, metrics
        self.codes: dict[str, Code] = {}
        self.reasons: dict[str, str] = {}
        self.attached: list[nn.Module] = []

    def run(self) -> None:
        uses = self._survey()
        self.products, self.reads = self.metrics or metrics_of(
            self.original, self.weights, self.batches
        )
        for name, weight in self.weights.items():
            if weight not in uses:
                rounded = "" if self.bits is None else ", and inputs are not rounded"
                self.reasons[name] = _UNSEEN + rounded
                self._project(name)
        for tensor, use in uses.items():
            if tensor in self.names:
                moments = Moments()
                self._feed(tensor, use.calls, moments)
                self._fit(self.names[tensor], moments, use)
                self._round_inputs(self.names[tensor], moments)
            elif self.codes:
                statistics = Statistics()
                self._feed(tensor, use.calls, statistics)
                statistics.write_(tensor, use.variance)

    def tune(self) -> None:
        """Tune codebooks, biases and norms."""
        shared = {name: self.weights[name] for name, code in self.codes.items() if _codebook(code)}
        tune_shared(self.module, self.original, self.weights, shared, self.batches)
        for name in shared:
            self._project(name)

    def _project(self, name: str) -> None:
        """Project a weight as it is."""
        try:
            self.codes[name] = self.projections[name].encode(self.weights[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        self.weights[name].copy_(self.codes[name].decode())

    def _fit(self, name: str, moments: Moments, use: "_Use") -> None:
        """Fit a weight to its layer's own outputs, and correct the bias."""
        weight, form = self.weights[name], self.forms[name]
        before = form.split(weight.double())
        frequencies = moments.frequencies
        bias = None if use.bias in self.names else use.bias
        # A bias, or the norm after the layer, takes the mean of the error.
        centred = use.normed or bias is not None
        seconds = moments.seconds(weight, centred, self.reads.get(name))
        if seconds is None:
            self.reasons[name] = _TRANSPOSED if moments.seen else _UNSEEN
        else:
            if not (seconds[0].isfinite().all() and weight.isfinite().all()):
                raise ValueError(
                    f"{name}, or inputs of its layer, hold NaN or infinity: did training diverge?"
                )
            try:
                metric = self.products.get(name) if frequencies is None else frequencies
                found = fit(weight, self.projections[name], *seconds, metric, form)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if found is None:
                self.reasons[name] = f"{self.projections[name]} has no levels to choose from"
            else:
                weight.copy_(found)
        self._project(name)
        if bias is not None and moments.means is not None:
            now, then = moments.means
            shape = (len(now), -1, now.shape[1])
            after = form.split(weight.double())
            mean = before.reshape(shape) @ then[..., None] - after.reshape(shape) @ now[..., None]
            bias += mean.flatten().to(bias.dtype)

    def _round_inputs(self, name: str, moments: Moments) -> None:
        """Round the inputs of a weight's layer from now on, in the range that does it best."""
        if self.bits is None:
            return
        path = name.rpartition(".")[0]
        layer = self.module.get_submodule(path)
        parent = self.module.get_submodule(path.rpartition(".")[0])
        if not takes_quantizer(layer) or isinstance(parent, nn.MultiheadAttention):
            return
        if moments.low == moments.high:
            self.reasons.setdefault(name, "its inputs are zero in all data, and are not rounded")
            return
        if not hasattr(layer, QUANTIZER):
            self.attached.append(layer)
        quantizer = attach_quantizer(layer, self.bits)
        quantizer.calibrate(moments.low, moments.high, moments.values)

    # Forward passes.

    def _survey(self) -> dict[Tensor, "_Use"]:
        """Return the weights, and the means of batch-norms, in the order of their first use."""
        layers = self.module.modules()
        means = {getattr(layer, "running_mean", None) for layer in layers} - {None}
        # A bias may be a part of a parameter, as in attention.
        trainable = {_storage(p) for p in self.module.parameters() if p.requires_grad}
        uses: dict[Tensor, _Use] = {}
        last: tuple[Any, Any] = None, None

        def before(function: Any, tensor: Tensor, named: Mapping[str, Any]) -> None:
            if tensor in self.names or tensor in means:
                use = uses.setdefault(tensor, _Use([0] * len(self.batches)))
                use.calls[number] += 1
                bias = named.get("bias")
                use.bias = bias if bias is not None and _storage(bias) in trainable else None
                use.variance = named.get("running_var")
            if tensor in means and named["input"] is last[1] and last[0] in uses:
                uses[last[0]].normed = True

        def after(tensor: Tensor, output: Tensor) -> None:
            nonlocal last
            last = tensor, output

        for number, batch in enumerate(self.batches):
            try:
                with Watch(before, after):
                    batch.call(self.module)
            except Exception as error:
                raise ValueError(
                    f"{type(self.module).__name__} cannot take batch {number} of data: {error}"
                ) from error
        return uses

    def _feed(self, tensor: Tensor, calls: list[int], see: Moments | Statistics) -> None:
        """Show all uses of a tensor; nothing after the last one of a batch is computed."""
        name = self.names.get(tensor)
        twin = self.original.get_parameter(name) if name is not None else None
        originals: list[Tensor] = []
        left = 0

        def before_original(function: Any, used: Tensor, named: Mapping[str, Any]) -> None:
            if used is twin:
                originals.append(named["input"])
                if len(originals) == left:
                    raise _Reached

        def before(function: Any, used: Tensor, named: Mapping[str, Any]) -> None:
            nonlocal left
            if used is tensor:
                x = named["input"]
                original = originals.pop(0) if originals else x
                # Data may take another path through the compressed network.
                see(function, used, named, original if original.shape == x.shape else x)
                left -= 1
                if not left:
                    raise _Reached

        for batch, left in zip(self.batches, calls, strict=True):
            if left:
                originals.clear()
                if twin is not None:
                    with suppress(_Reached), Watch(before_original):
                        batch.call(self.original)
                with suppress(_Reached), Watch(before):
                    batch.call(self.module)


def tune_shared(
    module: nn.Module,
    original: nn.Module,
    fixed: Collection[str],
    shared: Mapping[str, nn.Parameter],
    batches: list[Batch],
) -> None:
    """Tune what is neither pruned nor on a grid: codebooks, and biases and norms.

    Args:
        module: The compressed module, in evaluation mode.
        original: The module before compression, in evaluation mode.
        fixed: Names of parameters that stay as they are, but for codebooks.
        shared: Parameters with a codebook, by name.
        batches: Data.
    """
    free = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and no_weight(module, name) == BIAS_OR_NORM
        if name not in fixed and parameter.is_floating_point() and parameter.numel()
    }
    tune(module, original, free, shared, batches)


def _storage(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a part of."""
    return tensor.untyped_storage().data_ptr()


def _codebook(code: Code) -> bool:
    """Return whether a weight's values are those of a codebook."""
    return isinstance(code.values if isinstance(code, Sparse) else code, Lookup)


@dataclass
class _Use:
    """How a network uses a weight, or a batch-norm.

    Args:
        calls: Number of uses in each batch.
        bias: What is added to the product, if it is trainable.
        variance: Running variance of a batch-norm.
        normed: Whether a batch-norm takes the product.
    """

    calls: list[int]
    bias: Any = None
    variance: Any = None
    normed: bool = False


class _Reached(BaseException):
    """Ends a forward pass; no module catches it by mistake."""
