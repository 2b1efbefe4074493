"""Cells of the zoo: one network with one method, trained for a few steps and checked."""

import logging
import os
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fitsmall.callbacks import (
    EMA,
    ChannelPruning,
    CompressedCheckpoint,
    GradualPruning,
    QuantizationAwareTraining,
    RankLearning,
    SizeTarget,
    WeightSharing,
    stages_of,
)
from fitsmall.compressors import restore, same_bits
from fitsmall.compressors.export.onnx import export_onnx
from fitsmall.compressors.torch_internals import tensors_in
from fitsmall.compressors.weights import no_weight
from fitsmall.experiments.zoo.networks import NETWORKS, Entry

__all__ = ["METHODS", "Cell", "run_cell"]

STEPS = 10


def _pruning() -> GradualPruning:
    return GradualPruning(0.8, stop=0.4)


def _quantization() -> QuantizationAwareTraining:
    return QuantizationAwareTraining(8, 8, start=0.5, stop=0.9, observe_steps=3)


METHODS: Mapping[str, Callable[[], list[pl.Callback]]] = {
    "prune": lambda: [_pruning()],
    "prune + share": lambda: [_pruning(), WeightSharing(8, start=0.4, stop=0.8)],
    "quantize 8/8": lambda: [_quantization()],
    "weights of 4 bits": lambda: [QuantizationAwareTraining(4, None, start=0.3, stop=0.9)],
    "prune + quantize": lambda: [_pruning(), _quantization()],
    "ranks": lambda: [RankLearning(price=0.2, stop=0.6)],
    "size": lambda: [SizeTarget(1 / 10, stop=0.6)],
    "channels": lambda: [ChannelPruning(keep_size=0.9, round_to=8, stop=0.6)],
    "EMA": lambda: [_pruning(), EMA(decay=0.5)],
    "bf16-mixed": lambda: [_pruning(), _quantization()],
    "compile": lambda: [_pruning()],
    "export": lambda: [_quantization()],
}


class Cell(NamedTuple):
    """The outcome of one network with one method.

    Args:
        network: Name of the network.
        method: Name of the method.
        outcome: ``works``, ``refused`` before the first step or by the exporter, ``crashed`` or
            ``wrong``.
        coverage: Share of the trainable matrix weights that every stage acts on, in [0, 1].
        remark: The refusal or the error.
        seconds: Seconds that it took.
    """

    network: str
    method: str
    outcome: str
    coverage: float
    remark: str
    seconds: float


class Subject(pl.LightningModule):
    """A network that learns to give small outputs."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.net = entry.make()

    def forward(self, **batch: Any) -> Any:
        return self.net(**batch)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        outputs = [o for o in tensors_in(_plain(self(**batch))) if o.requires_grad]
        return torch.stack([output.float().square().mean() for output in outputs]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class AdversarialSubject(Subject):
    """A generator and a discriminator that take turns, stepped by hand."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Any], _: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for sign, optimizer in zip((1, -1), optimizers, strict=True):
            optimizer.zero_grad()
            self.manual_backward(sign * self(**batch).tanh().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts: Any = self.net
        return [
            torch.optim.Adam(part.parameters(), lr=1e-3)
            for part in (parts.generator, parts.discriminator)
        ]


class Coverage(pl.Callback):
    """Measures the share of the trainable weights of layers that every stage acts on."""

    share = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.share = min(_coverage(pl_module, stage) for stage in stages_of(trainer))


def _subject(entry: Entry) -> Subject:
    return (AdversarialSubject if "GAN" in entry.family else Subject)(entry)


class WrongError(Exception):
    """A check failed."""


class RefusedError(Exception):
    """The network is trained and its file is there, but it is not exported."""


def run_cell(network: str, method: str) -> Cell:
    """Train a network with a method, check what came out, and never raise."""
    start, outcome, remark, coverage = time.monotonic(), "works", "", Coverage()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trainer = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer, module, batches, file = _trainer(
                NETWORKS[network], method, Path(folder), coverage
            )
            trainer.fit(
                torch.compile(module, backend="eager") if method == "compile" else module,  # type: ignore[arg-type]
                DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
            )
            _check(NETWORKS[network], module, batches[0], file, method, Path(folder))
        except WrongError as error:
            outcome, remark = "wrong", str(error)
        except RefusedError as error:
            outcome, remark = "refused", str(error)
        except Exception as error:  # noqa: BLE001  a crash is an outcome
            early = trainer is not None and not trainer.global_step
            refused = early and isinstance(error, ValueError | RuntimeError | TypeError)
            outcome = "refused" if refused else "crashed"
            remark = f"{type(error).__name__}: {error}"
        for path in (folder, sysconfig.get_path("purelib")):
            remark = remark.replace(f"{path}{os.sep}", "")
    return Cell(network, method, outcome, coverage.share, remark, time.monotonic() - start)


def _trainer(
    entry: Entry, method: str, folder: Path, coverage: Coverage
) -> tuple[pl.Trainer, Subject, list[Any], CompressedCheckpoint]:
    pl.seed_everything(0, verbose=False)
    module, file = _subject(entry), CompressedCheckpoint(folder, coder="ans")
    batches = [dict(entry.batch()) for _ in range(STEPS)]
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed" if method == "bf16-mixed" else "32-true",
        callbacks=[*METHODS[method](), file, coverage],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    return trainer, module, batches, file


def _coverage(module: nn.Module, stage: Any) -> float:
    """Return the share of the trainable weights of layers that a stage acts on."""
    weights = {
        name: parameter.numel()
        for name, parameter in stage.parameters.items()
        if name in stage.selection.chosen or not no_weight(module, name)
        if parameter.requires_grad or name in stage.selection.chosen
    }
    acted = sum(weights[name] for name in stage.selection.chosen)
    return float(acted / max(1, sum(weights.values())))


def _check(
    entry: Entry,
    module: Subject,
    batch: dict[str, Any],
    file: CompressedCheckpoint,
    method: str,
    folder: Path,
) -> None:
    """Check that the file gives a fresh network the trained one's outputs, bit for bit.

    Raises:
        WrongError: It does not.
        RefusedError: The exporter refuses the network.
    """
    if file.path is None:
        raise WrongError("no file was written")
    fresh = restore(_subject(entry), file.path).eval()
    module.eval()
    for name, tensor in module.state_dict().items():
        if not same_bits(fresh.state_dict()[name], tensor):
            raise WrongError(f"{name} of the restored network differs")
    with torch.no_grad():
        outputs = [tensors_in(_plain(each.net(**batch))) for each in (module, fresh)]
    for trained, restored in zip(*outputs, strict=True):
        if not trained.isfinite().all() or not torch.equal(trained, restored):
            raise WrongError("outputs of the restored network differ")
    if method == "export":
        try:
            export_onnx(module.net, folder / "model.onnx", batch)
        except ValueError as error:
            raise RefusedError(str(error)) from error


def _plain(outputs: Any) -> Any:
    """Return the outputs of a network of Hugging Face as a plain dictionary."""
    return dict(outputs) if hasattr(outputs, "keys") else outputs
