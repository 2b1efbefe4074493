"""The rank that each layer of a trained network needs: ``fitsmall ranks RUN``.

Three criteria (:mod:`fitsmall.compressors.choices.responses`) are fitted to responses to one half
of some training images, and their errors are measured on the other half. A picture in the run's
folder shows the singular values, and the ReLU singular values of layers with up to 64 outputs; a
CSV next to it lists them.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fitsmall.compressors.choices.responses import (
    Map,
    error,
    plain,
    rectified,
    relu_singular_values,
    smallest,
    whitened,
)
from fitsmall.compressors.projections.lowrank import matrix
from fitsmall.compressors.surgery.factorable import forms
from fitsmall.compressors.surgery.factors import Factored
from fitsmall.experiments.run.plot_style import GRID, set_title, style_axes

__all__ = ["LayerResponses", "rank_table", "record_responses"]

_RELU = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, nn.functional.relu)

_POSITIONS = 16  # of each image, sampled from the output of a convolution
_MAX_OUTPUTS = 64  # ReLU singular values of larger layers take too long

Spectra = dict[str, tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class LayerResponses:
    """Responses of a layer to some images, after its batch-norm if it has one.

    Args:
        weight: ``m x n`` matrix.
        scale: Factor of each output in the batch-norm, of ``m`` numbers.
        shift: Response to an input of zeros, of ``m`` numbers.
        responses: One response a row, ``N x m``.
        relu: Whether a ReLU, and nothing else, reads the responses.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    responses: Tensor
    relu: bool


class _ReadLog(TorchFunctionMode):
    """Record which operators read which tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[Any, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Reading a shape or a size gives no tensor, and does not count.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.reads += [(leaf, func) for leaf in tree_leaves((args, kwargs))]
        return result

    def only_relu(self, tensor: Tensor) -> bool:
        """True if ReLU is the only operator that reads a tensor."""
        readers = [func for read, func in self.reads if read is tensor]
        return bool(readers) and all(func in _RELU for func in readers)


def record_responses(
    module: nn.Module, images: Tensor
) -> tuple[dict[str, LayerResponses], dict[str, str]]:
    """Run a module on images and record the responses of all layers that can be factored.

    Args:
        module: A trained module. It is left in evaluation mode.
        images: A batch of its inputs.

    Returns:
        Responses by name of the layer, and the reason for each layer that is left out.
    """
    outputs: dict[str, list[Tensor]] = {}
    norms: list[tuple[Any, Tensor, Tensor]] = []
    left_out = {}
    handles = []
    inside = {id(part) for m in module.modules() if isinstance(m, Factored) for part in m}
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            handles.append(
                part.register_forward_hook(lambda norm, x, y: norms.append((norm, x[0], y)))
            )
        elif isinstance(part, Factored):
            left_out[name] = "two factors already"
        elif id(part) not in inside and isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
            if not forms(part):
                left_out[name] = "grouped, or of a class of its own"
                continue
            calls = outputs.setdefault(name, [])
            handles.append(part.register_forward_hook(lambda _, x, y, calls=calls: calls.append(y)))
    with torch.no_grad(), _ReadLog() as log:
        module.eval()(images)
    for handle in handles:
        handle.remove()
    layers = {}
    for name, calls in outputs.items():
        if len(calls) != 1:
            left_out[name] = f"called {len(calls)} times"
            continue
        (output,) = calls
        layer: Any = module.get_submodule(name)
        scale, shift = torch.ones(len(layer.weight)), torch.zeros(len(layer.weight))
        if layer.bias is not None:
            shift = layer.bias.detach()
        for norm, before, after in norms:
            if before is output:
                scale = torch.rsqrt(norm.running_var + norm.eps)
                scale = scale if norm.weight is None else scale * norm.weight.detach()
                bias = 0.0 if norm.bias is None else norm.bias.detach()
                shift, output = (shift - norm.running_mean) * scale + bias, after
        relu = log.only_relu(output)
        rows = _sample_rows(output, isinstance(layer, nn.Linear))
        weight = matrix(layer.weight.detach()).double()
        layers[name] = LayerResponses(weight, scale.double(), shift.double(), rows, relu)
    return layers, left_out


def rank_table(module: nn.Module, images: Tensor, tolerance: float, picture: Path) -> Table:
    """Ranks that all layers need; also draws and lists their singular values.

    Args:
        module: A trained module.
        images: Inputs to record responses to.
        tolerance: Squared error of a layer's outputs, as a fraction of their variance.
        picture: PNG to write. A CSV of the same name, but for its suffix, lists the values.

    Returns:
        A row for each layer: its full rank, and the rank within the tolerance by each criterion.

    Raises:
        ValueError: The tolerance is not between 0 and 1, or no layer can be factored.
    """
    if not 0 < tolerance < 1:
        raise ValueError(
            f"a tolerance is a fraction of a layer's variance, between 0 and 1; got {tolerance}"
        )
    layers, left_out = record_responses(module, images)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no layers"
        raise ValueError(f"{type(module).__name__} has no layer to reduce ({reasons})")
    table = Table(title=f"ranks for errors up to {tolerance:g}", show_edge=False)
    names = ("layer", "followed by")
    for column in (*names, "full", "plain", "whitened", "rectified"):
        table.add_column(column, justify="left" if column in names else "right")
    totals = np.zeros(4)
    saved = []
    for name, layer in layers.items():
        full = min(layer.weight.shape)
        row = (full, *_needed_ranks(layer, tolerance, full))
        totals += row
        saved.append(1 - row[3] / row[1])
        cells = [*map(str, row[:3]), str(row[3]) if layer.relu else "-"]
        table.add_row(name, "relu" if layer.relu else "-", *cells)
    table.add_section()
    table.add_row("total", "", *(f"{total:.0f}" for total in totals))
    mean = 100 * float(np.mean(saved))
    lines = [f"{mean:.0f} % fewer ranks than by plain singular values, on average over layers"]
    lines += [f"left out: {name} ({why})" for name, why in left_out.items()]
    spectra = _spectra(layers)
    _write_spectra(picture.with_suffix(".csv"), spectra)
    _draw_spectra(picture, spectra)
    table.caption = "\n".join([*lines, str(picture)])
    return table


def _needed_ranks(layer: LayerResponses, tolerance: float, full: int) -> tuple[int, int, int]:
    """The smallest rank within the tolerance: plain, whitened, rectified."""
    half = len(layer.responses) // 2
    seen, unseen = layer.responses[:half], layer.responses[half:]

    def needed(fit: Callable[[int], Map]) -> int:
        return smallest(lambda rank: error(unseen, fit(rank), layer.relu), tolerance, full)

    of_plain = needed(lambda rank: plain(layer.weight, layer.scale, layer.shift, rank))
    of_whitened = needed(lambda rank: whitened(seen, rank))
    # Without a ReLU the third criterion is the second.
    of_rectified = needed(lambda rank: rectified(seen, rank)) if layer.relu else of_whitened
    return of_plain, of_whitened, of_rectified


def _sample_rows(output: Tensor, linear: bool) -> Tensor:
    """Responses at a few positions of each image, one a row, in an order that a fixed seed
    shuffles."""
    rows = output if linear else output.flatten(2).transpose(1, 2)
    rows = rows.reshape(len(rows), -1, rows.shape[-1])
    generator = torch.Generator().manual_seed(0)
    positions = torch.randperm(rows.shape[1], generator=generator)[:_POSITIONS]
    rows = rows[:, positions].flatten(0, 1)
    return rows[torch.randperm(len(rows), generator=generator)].double().cpu()


def _spectra(layers: dict[str, LayerResponses]) -> Spectra:
    """Singular values of each layer, and its ReLU singular values if it is small enough."""
    return {
        name: (
            torch.linalg.svdvals(layer.weight),
            relu_singular_values(layer.weight)
            if layer.relu and len(layer.weight) <= _MAX_OUTPUTS
            else None,
        )
        for name, layer in layers.items()
    }


def _write_spectra(path: Path, spectra: Spectra) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "dimension", "singular_value", "relu_singular_value"])
        for name, (values, relu_values) in spectra.items():
            last = [""] * len(values) if relu_values is None else relu_values.tolist()
            for number, row in enumerate(zip(values.tolist(), last, strict=True), start=1):
                writer.writerow([name, number, *row])


def _draw_spectra(path: Path, spectra: Spectra) -> None:
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.06)
    figure = Figure(figsize=(12, 5.2), dpi=150, layout=layout)
    left, right = figure.subplots(1, 2, sharey=True)
    style_axes(left)
    style_axes(right)
    set_title(left, "Singular values", "of each layer's weight, relative to the largest")
    outputs = f"upper estimates, for layers of up to {_MAX_OUTPUTS} outputs"
    set_title(right, "ReLU singular values", outputs)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(spectra)))
    for (name, (values, relu_values)), colour in zip(spectra.items(), colours, strict=True):
        dimensions = np.arange(1, len(values) + 1)
        label = name.removeprefix("net.")
        left.plot(dimensions, values / values[0], color=colour, linewidth=1.2, label=label)
        if relu_values is not None:
            right.plot(dimensions, relu_values / values[0], color=colour, linewidth=1.2)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-3)
        axes.set_xlabel("dimension", fontsize=10)
        axes.grid(color=GRID, linewidth=0.8)
    left.legend(frameon=False, fontsize=7, ncols=1 + len(spectra) // 12)
    figure.savefig(path)
