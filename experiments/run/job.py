"""One run: fit with compression, write the file, measure what it restores, and draw a picture.

The run's directory then holds ``config.yaml`` (resolved), ``metrics.csv``, ``model.fitsmall``,
``result.json`` and ``report.png``. A run that was interrupted goes on from the checkpoint in it
that is named by the fingerprint of its configuration.
"""

import csv
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from fitsmall.callbacks import CompressedCheckpoint
from fitsmall.compressors import Report, restore
from fitsmall.experiments.run.figures import draw
from fitsmall.experiments.run.fingerprint import fingerprint, record
from fitsmall.experiments.run.loggers import close, declare, publish
from fitsmall.experiments.run.provenance import provenance
from fitsmall.experiments.run.units import shown, words

__all__ = ["build", "disband", "first", "fit", "instances", "run"]


def run(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Run an experiment, and return what ``result.json`` says.

    Args:
        config: As ``configs/train.yaml`` composes it.
        overrides: Words that made the configuration, for the record.

    Raises:
        MisconfigurationException: Callbacks that do not fit together, or none that writes a file.
    """
    # Logger and checkpoint share the run's directory on purpose; the other is Lightning's to mend.
    warnings.filterwarnings("ignore", "(Experiment logs|Checkpoint) directory")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if first():
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
    # A group of which nothing is chosen, `callbacks=[]`, has no node.
    callbacks = [*instances(config.get("callbacks")), *instances(config.get("observers"))]
    checkpoint = next((c for c in callbacks if isinstance(c, CompressedCheckpoint)), None)
    if checkpoint is None:
        raise MisconfigurationException("no checkpoint among the observers: none writes the file")

    loggers = instances(config.get("logger"))
    try:
        return _measured(config, overrides, callbacks, checkpoint, loggers)
    finally:
        close(loggers)


def _measured(
    config: DictConfig,
    overrides: list[str],
    callbacks: list[pl.Callback],
    checkpoint: CompressedCheckpoint,
    loggers: list[Any],
) -> dict[str, Any]:
    """Train, and measure what the file holds."""
    folder = Path(config.folder)
    resume = folder / f"resume-{fingerprint(config)}.ckpt"
    trainer, seconds = fit(config, callbacks, loggers, resume)
    # What is measured is what the file holds, in a module that was never trained.
    path = trainer.strategy.broadcast(checkpoint.path)
    assert path is not None, "the checkpoint wrote no file, and said nothing"
    restored: pl.LightningModule = restore(build(config.model), path)
    validation = _error(config, trainer, restored, "val")
    error = _error(config, trainer, restored, config.evaluate_on)

    error_dense, seconds_dense = None, None
    if config.reference:
        # The honest rival is the same training without compression: same seed, batches and
        # schedule. The weights just before compression starts would come for free, but from the
        # middle of the schedule, at a high learning rate, and make any compression look good.
        dense, seconds_dense = fit(config, callbacks=[], loggers=[])
        error_dense = _error(config, dense, dense.lightning_module, config.evaluate_on)

    result: dict[str, Any] = {
        "fingerprint": fingerprint(config),
        "metric": config.metric,
        "error": error,
        "error_dense": error_dense,
        "error_validation": validation,
        "evaluated_on": config.evaluate_on,
        "seconds": seconds,
        "seconds_dense": seconds_dense,
        "steps": trainer.global_step,
        "seed": config.seed,
        "overrides": overrides,
        "provenance": provenance(trainer.strategy.root_device),
    }
    if checkpoint.report is not None:  # on the first process
        result |= _sizes(checkpoint.report)
        record(folder / "result.json", result)
        for saved in folder.glob("resume-*.ckpt"):
            if saved.is_dir():
                shutil.rmtree(saved)
            else:
                saved.unlink()
        marks = {"compressed": (result["bytes"], error)}
        if error_dense is not None:
            marks["dense"] = (result["bytes_dense"], error_dense)
        on = "" if config.evaluate_on == "val" else ", on test data"
        marks = {f"{name}{on}": mark for name, mark in marks.items()}
        draw(
            folder / "report.png",
            checkpoint.report,
            folder / "metrics.csv",
            marks,
            config.metric,
        )
        print(_summary(result, folder))
        publish(loggers, result, path)
    return result


def build(node: DictConfig) -> Any:
    """What a node of the configuration describes."""
    return instantiate(node, _convert_="all")


def instances(nodes: DictConfig | None) -> list[Any]:
    """What the nodes of a group describe, in their order."""
    # An experiment may tune methods that `callbacks=[...]` leaves out: settings alone are no call.
    left_out = [name for name, node in (nodes or {}).items() if "_target_" not in node]
    if left_out:
        print(f"left out, since only settings are given: {', '.join(map(str, left_out))}")
    return [build(node) for name, node in (nodes or {}).items() if name not in left_out]


def fit(
    config: DictConfig,
    callbacks: list[pl.Callback],
    loggers: list[Any],
    resume: Path | None = None,
) -> tuple[pl.Trainer, float]:
    """Train once, from the beginning or from where a checkpoint is, and count the seconds, those
    before it included."""
    pl.seed_everything(config.seed, verbose=False)
    timer = next((c for c in callbacks if isinstance(c, Timer)), None)
    if timer is None:
        callbacks = [timer := Timer(), *callbacks]
    trainer = instantiate(config.trainer, _partial_=True)(
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    model, data = build(config.model), build(config.data)
    if resume is not None and resume.exists():
        # A sharded one is a folder.
        file = resume / "meta.pt" if resume.is_dir() else resume
        saved = torch.load(file, map_location="cpu", weights_only=False)
        _keep_curve(loggers, int(saved["global_step"]))
    else:
        resume = None
        if config.init is not None:
            restore(model, config.init)
    declare(loggers, config)
    trainer.fit(model, datamodule=data, ckpt_path=resume)
    return trainer, timer.time_elapsed()


def first() -> bool:
    """Whether this is the first of the processes that train together, or will be."""
    return getattr(rank_zero_only, "rank", 0) == 0


def disband() -> None:
    """End the group of processes that trained together: what comes is for one process."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _keep_curve(loggers: list[Any], step: int) -> None:
    """Lightning's logger begins anew in a directory that has a curve: give it what there was."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / "metrics.csv"
            if path.is_file():
                with open(path, newline="") as file:
                    rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
                logger.experiment.metrics.extend(r for r in rows if int(r["step"]) < step)


def _error(config: DictConfig, trainer: pl.Trainer, module: pl.LightningModule, on: str) -> float:
    evaluate = {"test": trainer.test, "val": trainer.validate}[on]
    loggers = trainer.loggers
    if on == "val":
        trainer.loggers = []  # what was logged while training is the curve, and this no point of it
    loaders = evaluate(module, datamodule=build(config.data), verbose=False)
    metrics = {name: value for loader in loaders for name, value in loader.items()}
    trainer.loggers = loggers
    name = f"{on}/{config.metric}"
    if name not in metrics:
        raise MisconfigurationException(
            f"{config.model._target_} logs no {name}, by which runs are compared; it logs "
            f"{', '.join(metrics) or 'nothing'}: choose with metric=..., or log it; "
            f"{config.folder} holds the compressed file"
        )
    return metrics[name]


def _sizes(report: Report) -> dict[str, Any]:
    return {
        "bytes": report.total,
        "bytes_dense": report.bytes_dense,
        "ratio": report.ratio,
        "coder": report.coder,
        "overhead": report.overhead,
        "layers": {
            tensor.name: {
                "weights": tensor.weights,
                "kept": tensor.kept,
                "levels": tensor.levels,
                "value_bits": tensor.value_bits,
                "position_bits": tensor.position_bits,
                "bytes": tensor.bytes,
                "bytes_dense": tensor.bytes_dense,
            }
            for tensor in report.tensors
        },
    }


def _summary(result: dict[str, Any], folder: Path) -> str:
    metric, dense = result["metric"], result["error_dense"]
    rival = "" if dense is None else f" (dense {shown(metric, dense)})"
    return (
        f"\n{shown(metric, result['error'])} {result['evaluated_on']} {words(metric)}"
        f"{rival} in {result['bytes']:,} bytes, {result['ratio']:.0f} times smaller, "
        f"after {result['seconds']:.0f} s\n{folder / 'report.png'}"
    )
