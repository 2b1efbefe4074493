"""Loss of a trained network at several sizes: ``fitsmall suggest CHECKPOINT``.

One pass over some training data gives the squared gradients of the loss, and with them the
estimated rise of the loss at each size (:mod:`fitsmall.compressors.trade_off`). Next to it stands
the measured loss of the rounded network. Nothing is trained.
"""

import csv
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from fitsmall.compressors.choices.clusterings import clusterings_table
from fitsmall.compressors.text_table import aligned
from fitsmall.compressors.torch_internals import tensors_in
from fitsmall.compressors.trade_off import Offer, trade_off
from fitsmall.compressors.weights import twin_of
from fitsmall.experiments.run.experiment import instantiate_node
from fitsmall.experiments.run.initial_weights import load_weights
from fitsmall.experiments.run.plot_style import (
    GRID,
    INK,
    as_text,
    format_bytes,
    set_title,
    style_axes,
)

__all__ = ["curvatures", "main", "some_batches"]

RATIOS = (4, 6, 8, 10, 15, 20, 30, 40, 60, 80)

_EXAMPLES = 1024
# The measured rise of the loss, as a part of the loss, up to which a size is suggested: what
# fine-tuning makes up for.
_RISE = 0.2

# Parameters that are listed.
_MOST = 20


@hydra.main(version_base="1.3", config_path="pkg://fitsmall.configs", config_name="train")
def main(config: DictConfig) -> None:
    """Print and draw the trade-off of a network."""
    job: Any = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    begin = time.perf_counter()
    pl.seed_everything(config.seed, verbose=False)
    module, data = instantiate_node(config.model), instantiate_node(config.data)
    load_weights(module, config.init)
    data.prepare_data()
    data.setup("fit")
    batches = some_batches(data.train_dataloader())
    module.eval()
    found = curvatures(module, batches)
    offers = trade_off(module, found, RATIOS)
    if not offers:
        raise ValueError(
            f"{type(module).__name__} cannot be {RATIOS[0]} times smaller: most of its bytes are "
            "no weights that train"
        )
    before = _loss(module, batches)
    after = [_rounded_loss(module, offer, batches) for offer in offers]
    print(_table(offers, before, after))
    chosen = max(
        (
            offer
            for offer, loss in zip(offers, after, strict=True)
            if loss - before <= _RISE * abs(before)
        ),
        key=lambda offer: offer.ratio,
        default=offers[0],
    )
    most = sorted(chosen.losses, key=lambda name: -chosen.losses[name])[:_MOST]
    listed = clusterings_table({name: chosen.clusterings[name] for name in most})
    every = f"; the {len(most)} most sensitive of {len(chosen.losses)} parameters"
    print("\n  ".join([f"\nAt {chosen.ratio:g} times smaller{every}:", *listed]))
    _write_csv(folder / "trade_off.csv", offers, after)
    _draw(folder / "trade_off.png", offers, before, after, chosen, most)
    seconds = time.perf_counter() - begin
    print(
        f"\nNothing was trained; fine-tuning makes up for most of the rise. Try "
        f"size=1/{chosen.ratio:g}:\n    fitsmall compress {config.init} size=1/{chosen.ratio:g} ..."
        f"\n{folder / 'trade_off.png'}, after {seconds:.0f} s"
    )


def some_batches(loader: Any) -> list[Any]:
    """Return training batches with 1,024 examples or more."""
    batches, examples = [], 0
    for batch in loader:
        batches.append(batch)
        examples += _examples(batch)
        if examples >= _EXAMPLES:
            break
    if not batches:
        raise ValueError("the training data have no batch")
    return batches


def _examples(batch: Any) -> int:
    return max((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), default=1)


def _training_loss(module: pl.LightningModule, batch: Any, number: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*self.log.*")  # there is no Trainer
        try:
            found: Any = module.training_step(batch, number)
        except RuntimeError as error:
            raise ValueError(
                f"{type(module).__name__}.training_step cannot run without a Trainer, and suggest "
                f"has none: use fitsmall compress ({error})"
            ) from error
    loss = found["loss"] if isinstance(found, dict) else found
    if not isinstance(loss, Tensor):
        raise ValueError(  # noqa: TRY004  the command tells errors of a user's by this class
            f"{type(module).__name__}.training_step returns a {type(loss).__name__}, and suggest "
            "needs a loss: use fitsmall compress"
        )
    return loss


def curvatures(module: pl.LightningModule, batches: Sequence[Any]) -> dict[str, Tensor]:
    """Return the mean square of an example's gradient, for each number that trains.

    Gradients are of means over batches; at a minimum those of examples are independent, and their
    squares add up.
    """
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        module.zero_grad()
        _training_loss(module, batch, number).backward()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                squares = parameter.grad.to_dense().float().square() * _examples(batch)
                found[name] = found.get(name, 0) + squares / len(batches)
    module.zero_grad()
    return found


@torch.no_grad()
def _loss(module: pl.LightningModule, batches: Sequence[Any]) -> float:
    return sum(float(_training_loss(module, b, n)) for n, b in enumerate(batches)) / len(batches)


@torch.no_grad()
def _rounded_loss(module: pl.LightningModule, offer: Offer, batches: Sequence[Any]) -> float:
    """Return the loss of the rounded network, with batch-norms whose statistics are those of it."""
    twin: Any = twin_of(module).eval()
    offer.apply_(twin)
    norms = [layer for layer in twin.modules() if isinstance(layer, _NormBase)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    if norms:
        _loss(twin, batches)
    return _loss(twin.eval(), batches)


def _table(offers: Sequence[Offer], before: float, after: Sequence[float]) -> str:
    rows = [("times smaller", "bytes", "zeros %", "loss, estimated", "rounded, measured")]
    for offer, loss in zip(offers, after, strict=True):
        every = offer.clusterings.values()
        kept = sum(each.kept for each in every) / sum(each.index.size for each in every)
        estimated = f"{before + offer.loss:.3g}"
        row = (f"{offer.ratio:g}", f"{offer.size:,}", f"{100 - 100 * kept:.1f}", estimated)
        rows.append((*row, f"{loss:.3g}"))
    return "\n".join([f"training loss {before:.3g} as it is", *aligned(rows, left=0)])


def _write_csv(path: Path, offers: Sequence[Offer], after: Sequence[float]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = [*offers[0].losses]
        writer.writerow(["ratio", "bytes", "rise", "rounded_loss", *names])
        for offer, loss in zip(offers, after, strict=True):
            losses = [offer.losses[name] for name in names]
            writer.writerow([offer.ratio, offer.size, offer.loss, loss, *losses])


def _draw(
    path: Path,
    offers: Sequence[Offer],
    before: float,
    after: Sequence[float],
    chosen: Offer,
    most: Sequence[str],
) -> None:
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.06)
    figure = Figure(figsize=(12, 5.2), dpi=150, layout=layout)
    left, right = figure.subplots(1, 2)
    style_axes(left)
    style_axes(right)
    set_title(left, "Loss against size", "on training data, without training")
    sizes = [offer.size for offer in offers]
    left.axhline(before, color=GRID, linewidth=2, zorder=0)
    left.plot(sizes, [before + offer.loss for offer in offers], "o-", label="estimated")
    left.plot(sizes, after, "o-", label="rounded, measured")
    left.axvline(chosen.size, color=GRID, linewidth=2, zorder=0)
    left.set_xscale("log")
    left.set_xticks(sizes, [f"1/{offer.ratio:g}" for offer in offers])
    if before > 0:  # the log-likelihood of a density is not
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:.3g}"))
    left.minorticks_off()
    dense = format_bytes(chosen.size * chosen.ratio)
    left.set_xlabel(f"size of the file, of {dense}", color=INK, fontsize=10)
    left.legend(frameon=False, fontsize=9)
    shown = f"rise of the loss, the {len(most)} largest of {len(chosen.losses)}"
    set_title(right, f"Sensitivity at {chosen.ratio:g} times smaller", shown)
    right.barh([as_text(name) for name in most], [chosen.losses[name] for name in most])
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
