"""The rank that each layer of a trained network needs, by three criteria.

fitsmall ranks RUN [--tolerance 0.1] [--images 512]

Responses to training images are fitted on one half and measured on the other. The picture in the
run's directory shows singular values, and ReLU singular values of layers of up to 64 outputs; a CSV
beside it lists them.
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

from fitsmall.compressors.lowrank import matrix
from fitsmall.compressors.responses import (
    Map,
    error,
    plain,
    rectified,
    relu_singular_values,
    smallest,
    whitened,
)
from fitsmall.compressors.surgery.factors import Factored, forms
from fitsmall.experiments.run.figures import style, title

__all__ = ["Layer", "layers_of", "ranks"]

_RELU = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, nn.functional.relu)

_PLACES = 16  # of an image, in a layer's output
_DRAWN = 64  # outputs of a layer, whose ReLU singular values take a moment


@dataclass(frozen=True, eq=False)
class Layer:
    """What a layer answers, behind its batch-norm where it has one.

    Args:
        weight: ``m x n`` matrix.
        scale: Factor of each output in the batch-norm.
        shift: Response to an input of zeros.
        responses: ``N x m``.
        relu: Whether a ReLU is what follows.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    responses: Tensor
    relu: bool


class _Watch(TorchFunctionMode):
    """Which operators read a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[Any, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # no shape, no size
            self.reads += [(leaf, func) for leaf in tree_leaves((args, kwargs))]
        return result

    def only_relu(self, tensor: Tensor) -> bool:
        """Whether ReLU is all that is computed of a tensor."""
        readers = [func for read, func in self.reads if read is tensor]
        return bool(readers) and all(func in _RELU for func in readers)


def layers_of(module: nn.Module, images: Tensor) -> tuple[dict[str, Layer], dict[str, str]]:
    """Responses of every layer that can be factored to some images; a reason for each other one."""
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
            mine = outputs.setdefault(name, [])
            handles.append(part.register_forward_hook(lambda _, x, y, mine=mine: mine.append(y)))
    with torch.no_grad(), _Watch() as watch:
        module.eval()(images)
    for handle in handles:
        handle.remove()
    found = {}
    for name, mine in outputs.items():
        if len(mine) != 1:
            left_out[name] = f"called {len(mine)} times"
            continue
        (output,) = mine
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
        relu = watch.only_relu(output)
        rows = _rows(output, isinstance(layer, nn.Linear))
        weight = matrix(layer.weight.detach()).double()
        found[name] = Layer(weight, scale.double(), shift.double(), rows, relu)
    return found, left_out


def ranks(module: nn.Module, images: Tensor, tolerance: float, picture: Path) -> Table:
    """Print-ready ranks of all layers, and their spectra in a picture.

    Args:
        module: A trained module.
        images: What it is shown.
        tolerance: Squared error of a layer's outputs, as a fraction of their variance.
        picture: PNG to write, and beside it a CSV of the values that it shows.

    Raises:
        ValueError: The tolerance is no fraction, or the module has no layer that can be factored.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"a tolerance is a fraction of a layer's variance, got {tolerance}")
    layers, left_out = layers_of(module, images)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no layers"
        raise ValueError(f"{type(module).__name__} has no layer to reduce ({reasons})")
    table = Table(title=f"ranks for errors up to {tolerance:g}", show_edge=False)
    for column in ("layer", "behind it", "full", "plain", "whitened", "rectified"):
        table.add_column(column, justify="left" if column in ("layer", "behind it") else "right")
    totals = np.zeros(4)
    saved = []
    for name, layer in layers.items():
        full = min(layer.weight.shape)
        of_plain, of_whitened, of_rectified = _needed(layer, tolerance, full)
        row = (full, of_plain, of_whitened, of_rectified)
        totals += row
        saved.append(1 - row[3] / row[1])
        cells = [*map(str, row[:3]), str(of_rectified) if layer.relu else "-"]
        table.add_row(name, "relu" if layer.relu else "-", *cells)
    table.add_section()
    table.add_row("total", "", *(f"{total:.0f}" for total in totals))
    mean = 100 * float(np.mean(saved))
    lines = [f"{mean:.0f} % fewer ranks than by plain singular values, on average over layers"]
    lines += [f"left out: {name} ({why})" for name, why in left_out.items()]
    spectra = _spectra(layers)
    _write(picture.with_suffix(".csv"), spectra)
    _draw(picture, spectra)
    table.caption = "\n".join([*lines, str(picture)])
    return table


def _needed(layer: Layer, tolerance: float, full: int) -> tuple[int, int, int]:
    """The smallest rank within the tolerance, by each criterion."""
    half = len(layer.responses) // 2
    seen, unseen = layer.responses[:half], layer.responses[half:]

    def rank(fit: Callable[[int], Map]) -> int:
        return smallest(lambda r: error(unseen, fit(r), layer.relu), tolerance, full)

    of_plain = rank(lambda r: plain(layer.weight, layer.scale, layer.shift, r))
    of_whitened = rank(lambda r: whitened(seen, r))
    # Without a ReLU there is nothing that it could hide.
    of_rectified = rank(lambda r: rectified(seen, r)) if layer.relu else of_whitened
    return of_plain, of_whitened, of_rectified


def _rows(output: Tensor, linear: bool) -> Tensor:
    """A few places of each image in random order, the same in every run; a response a row."""
    rows = output if linear else output.flatten(2).transpose(1, 2)
    rows = rows.reshape(len(rows), -1, rows.shape[-1])
    random = torch.Generator().manual_seed(0)
    places = torch.randperm(rows.shape[1], generator=random)[:_PLACES]
    rows = rows[:, places].flatten(0, 1)
    return rows[torch.randperm(len(rows), generator=random)].double().cpu()


def _spectra(layers: dict[str, Layer]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Singular values of each layer, and ReLU singular values of those that are shown with them."""
    return {
        name: (
            torch.linalg.svdvals(layer.weight),
            relu_singular_values(layer.weight)
            if layer.relu and len(layer.weight) <= _DRAWN
            else None,
        )
        for name, layer in layers.items()
    }


def _write(path: Path, spectra: dict[str, tuple[Tensor, Tensor | None]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "dimension", "singular_value", "relu_singular_value"])
        for name, (values, bent) in spectra.items():
            of_relu = [""] * len(values) if bent is None else bent.tolist()
            for number, row in enumerate(zip(values.tolist(), of_relu, strict=True), start=1):
                writer.writerow([name, number, *row])


def _draw(path: Path, spectra: dict[str, tuple[Tensor, Tensor | None]]) -> None:
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.06)
    figure = Figure(figsize=(12, 5.2), dpi=150, layout=layout)
    left, right = figure.subplots(1, 2, sharey=True)
    style(left)
    style(right)
    title(left, "Singular values", "of each layer's weight, relative to the largest")
    title(right, "ReLU singular values", f"of layers of up to {_DRAWN} outputs, from above")
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(spectra)))
    for (name, (values, bent)), colour in zip(spectra.items(), colours, strict=True):
        steps = np.arange(1, len(values) + 1)
        label = name.removeprefix("net.")
        left.plot(steps, values / values[0], color=colour, linewidth=1.2, label=label)
        if bent is not None:
            right.plot(steps, bent / values[0], color=colour, linewidth=1.2)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-3)
        axes.set_xlabel("dimension", fontsize=10)
        axes.grid(color="#eceef1", linewidth=0.8)
    left.legend(frameon=False, fontsize=7, ncols=1 + len(spectra) // 12)
    figure.savefig(path)
