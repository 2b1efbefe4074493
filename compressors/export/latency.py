"""Latency: the time of a forward pass in an engine, and its ratio between two networks."""

import copy
import inspect
import statistics
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fitsmall.compressors.export.engines import session
from fitsmall.compressors.export.integer import integers_of, to_integers_
from fitsmall.compressors.export.onnx import fused, write_onnx
from fitsmall.compressors.export.tracing import Arguments, outputs_of
from fitsmall.compressors.naming import lookup
from fitsmall.compressors.projections.quantize import Quantize
from fitsmall.compressors.surgery.quantizers import attach_quantizer, takes_quantizer
from fitsmall.compressors.timing import interleaved
from fitsmall.compressors.weights import matrices_of, owner

__all__ = ["LATENCY_ENGINES", "LatencyRatio", "forward_of", "latency_ratio"]

# Engines by the name that settings have, and of those that run a file its name among ENGINES.
LATENCY_ENGINES: dict[str, str | None] = {
    "torch": None,
    "compiled": None,
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
}


# Inputs of a layer by which the range of its integers is chosen.
_SAMPLE = 2**14


class LatencyRatio(NamedTuple):
    """The latency of a network as a fraction of that of another.

    Args:
        median: Median over rounds.
        spread: Half of the distance between the quartiles.
    """

    median: float
    spread: float


def forward_of(
    engine: str,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    integers: Collection[str] = (),
) -> Callable[[], object]:
    """Return a function that runs a network in an engine, on inputs that stay.

    Args:
        engine: One of :data:`LATENCY_ENGINES`.
        module: The network, in evaluation mode.
        args: Inputs by position.
        kwargs: Inputs by name.
        integers: Names of weights that are rounded to 8 bits, with the inputs of their layers.
            Engines that run a file have kernels for them.

    Raises:
        ImportError: The engine is not installed.
        ValueError: There is no such engine, or it cannot run the network.
    """
    name = lookup("engine", engine, LATENCY_ENGINES)
    if name is not None:
        return _session_of(name, module, args, kwargs, integers)
    if integers:
        files = ", ".join(each for each, name in LATENCY_ENGINES.items() if name)
        raise ValueError(f"engine {engine!r} has no integers: choose one of {files}")
    forward = _compiled(module) if engine == "compiled" else module
    on_gpu = any(parameter.is_cuda for parameter in module.parameters())

    @torch.inference_mode()
    def run() -> None:
        forward(*args, **kwargs)
        if on_gpu:
            torch.cuda.synchronize()

    return run


def _compiled(module: nn.Module) -> Callable[..., Any]:
    """Return a compiled call of a network.

    torch.compile keeps few versions of a function, and runs it as it is where it needs more. So
    each network has a function with code of its own: else only the first widths that are tried
    would be compiled, and none of a network of this class that trains.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    code = forward.__code__.replace()
    return torch.compile(FunctionType(code, globals(), closure=forward.__closure__))


def _session_of(
    engine: str,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    integers: Collection[str],
) -> Callable[[], object]:
    """Return a function that runs a module in an engine that reads a file."""
    examples: Any = tuple(args)
    if kwargs:
        examples = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    arguments = Arguments.of(examples)
    if integers:
        module = _with_integers(copy.deepcopy(module).cpu().float(), integers, arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write_onnx(module, path, examples)
        run = session(engine, path, torch.get_num_threads(), names=arguments.names(module))
    return lambda: run(arguments.tensors)


@torch.no_grad()
def _with_integers(module: nn.Module, names: Collection[str], arguments: Arguments) -> nn.Module:
    """Round weights and the inputs of their layers to 8 bits, in the range of an example.

    Args:
        module: Module in evaluation mode, which is changed in place.
        names: Names of the weights. Layers that cannot compute with integers keep their inputs.
        arguments: Arguments of its forward.
    """
    layers: set[nn.Module] = set()
    for name in names:
        layer, weight = owner(module, name)[1], module.get_parameter(name)
        if takes_quantizer(layer):
            weight.copy_(Quantize(8).along(matrices_of(module, name)).project(weight))
            if integers_of(layer, 127) is not None:
                layers.add(layer)
    values: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        values[layer] = (*inputs, *named.values())[0].detach().flatten()

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    outputs_of(module, arguments)
    for hook in hooks:
        hook.remove()
    for layer, seen in values.items():
        low, high = (float(bound) for bound in seen.aminmax())
        attach_quantizer(layer, 8).calibrate(min(low, 0.0), max(high, 0.0), seen[:_SAMPLE])
    to_integers_(module)
    return fused(module, arguments)


def latency_ratio(
    one: Callable[[], object], other: Callable[[], object], rounds: int = 9, least: float = 0.12
) -> LatencyRatio:
    """Return the latency of one network as a fraction of that of the other.

    They take turns, so that a busy machine slows both alike.

    Args:
        one: Function that runs the network.
        other: Function that runs the other one.
        rounds: Number of turns.
        least: Seconds of each turn.
    """
    seconds = interleaved({"one": one, "other": other}, rounds, least)
    ratios = [mine / theirs for mine, theirs in zip(*seconds.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return LatencyRatio(middle, (high - low) / 2)
