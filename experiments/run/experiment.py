"""One run: train with compression, write the file, measure the restored network, draw a picture.

The run's folder then holds ``config.yaml`` (resolved), ``metrics.csv``, ``model.fitsmall``,
``result.json`` and ``report.png``. An interrupted run resumes from a checkpoint in its folder. The
checkpoint has the fingerprint of the configuration in its name, so other settings ignore it.
"""

import csv
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from fitsmall.callbacks import Compress, CompressedCheckpoint
from fitsmall.callbacks.outcomes import targets_table
from fitsmall.compressors import Report, restore
from fitsmall.compressors.file.sizes import dense_bytes
from fitsmall.experiments.run.fingerprint import fingerprint
from fitsmall.experiments.run.folder import write_json
from fitsmall.experiments.run.initial_weights import load_weights
from fitsmall.experiments.run.loggers import finish_wandb, log_configuration, log_result
from fitsmall.experiments.run.metric_format import describe_metric, format_metric
from fitsmall.experiments.run.picture import draw_run
from fitsmall.experiments.run.processes import is_rank_zero
from fitsmall.experiments.run.provenance import provenance
from fitsmall.experiments.run.trust import remember

__all__ = ["fit", "instantiate_group", "instantiate_node", "run_experiment"]


def run_experiment(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Train, compress, measure and record one run.

    Args:
        config: Configuration that ``configs/train.yaml`` composes.
        overrides: Command-line words that gave the configuration, for the record.

    Returns:
        Content of ``result.json``.

    Raises:
        MisconfigurationException: The callbacks do not fit together, none of them writes the
            compressed file, or the module does not log the metric.
    """
    # Logger and checkpoint share the run's folder on purpose. The second warning is about code of
    # Lightning's own.
    warnings.filterwarnings("ignore", "(Experiment logs|Checkpoint) directory")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if is_rank_zero():
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        remember(folder)
    # A group without a chosen option, as in `callbacks=[]`, has no node.
    methods = instantiate_group(config.get("callbacks"))
    callbacks = [*methods, *instantiate_group(config.get("observers"))]
    checkpoint = next((c for c in callbacks if isinstance(c, CompressedCheckpoint)), None)
    if checkpoint is None:
        raise MisconfigurationException(
            "no observer writes the compressed file: add checkpoint to callbacks@observers"
        )
    loggers = instantiate_group(config.get("logger"))
    try:
        return _train_and_measure(config, overrides, callbacks, checkpoint, loggers)
    finally:
        finish_wandb(loggers)


def _train_and_measure(
    config: DictConfig,
    overrides: list[str],
    callbacks: list[pl.Callback],
    checkpoint: CompressedCheckpoint,
    loggers: list[Any],
) -> dict[str, Any]:
    folder = Path(config.folder)
    resume = folder / f"resume-{fingerprint(config)}.ckpt"
    trainer, seconds = fit(config, callbacks, loggers, resume)
    # Measure what the file holds, in a module that was never trained.
    path = trainer.strategy.broadcast(checkpoint.path)
    assert path is not None, "the checkpoint wrote no file, and said nothing"
    restored: pl.LightningModule = restore(instantiate_node(config.model), path)
    validation = _evaluate(config, trainer, restored, "val")
    error = _evaluate(config, trainer, restored, config.evaluate_on)

    before: tuple[int, float] | None = None
    if config.init is not None:
        start = instantiate_node(config.model)
        load_weights(start, config.init)
        before = dense_bytes(start), _evaluate(config, trainer, start, config.evaluate_on)

    error_dense, seconds_dense = None, None
    if config.reference:
        # The fair rival is the same training without compression: same seed, batches and
        # schedule. The weights just before compression starts would come for free, but from the
        # middle of the schedule, at a high learning rate, and make any compression look good.
        dense, seconds_dense = fit(config, callbacks=[], loggers=[])
        error_dense = _evaluate(config, dense, dense.lightning_module, config.evaluate_on)

    result: dict[str, Any] = {
        "fingerprint": fingerprint(config),
        "metric": config.metric,
        "error": error,
        "error_dense": error_dense,
        "error_before": None if before is None else before[1],
        "error_validation": validation,
        "evaluated_on": config.evaluate_on,
        "seconds": seconds,
        "seconds_dense": seconds_dense,
        "steps": trainer.global_step,
        "seed": config.seed,
        "overrides": overrides,
        "provenance": provenance(trainer.strategy.root_device),
    }
    if checkpoint.report is not None:  # rank zero
        result |= _sizes(checkpoint.report)
        for compress in (c for c in callbacks if isinstance(c, Compress)):
            outcome = compress.outcome(checkpoint.report.total)
            result["targets_met"] = all(row.met for row in outcome)
            print(f"\n{targets_table(outcome)}")
        write_json(folder / "result.json", result)
        _remove_resume_checkpoints(folder)
        marks = {"compressed": (result["bytes"], error)}
        if before is not None:
            marks["before"] = before
        if error_dense is not None:
            marks["dense"] = (result["bytes_dense"], error_dense)
        on = "" if config.evaluate_on == "val" else ", on test data"
        marks = {f"{name}{on}": mark for name, mark in marks.items()}
        metrics = folder / "metrics.csv"
        draw_run(folder / "report.png", checkpoint.report, metrics, marks, config.metric)
        print(_summary(result, before, folder))
        log_result(loggers, result, path)
    return result


def instantiate_node(node: DictConfig) -> Any:
    """The object that a node of the configuration describes by its ``_target_``."""
    return instantiate(node, _convert_="all")


def instantiate_group(nodes: DictConfig | None) -> list[Any]:
    """The objects that the nodes of a group describe, in their order.

    An experiment may tune methods that ``callbacks=[...]`` does not choose. Their nodes have
    settings but no ``_target_``; they are skipped, and named in a printed line.

    Args:
        nodes: The group, or None if nothing is chosen.
    """
    skipped = [name for name, node in (nodes or {}).items() if "_target_" not in node]
    if skipped:
        print(f"settings without a chosen method are ignored: {', '.join(map(str, skipped))}")
    return [instantiate_node(node) for name, node in (nodes or {}).items() if name not in skipped]


def fit(
    config: DictConfig,
    callbacks: list[pl.Callback],
    loggers: list[Any],
    resume: Path | None = None,
) -> tuple[pl.Trainer, float]:
    """Train the configured model once.

    Args:
        config: Configuration of model, data and trainer.
        callbacks: Callbacks of the trainer.
        loggers: Loggers of the trainer.
        resume: Checkpoint to resume from, if it exists.

    Returns:
        The trainer, and the seconds of training, including those before the checkpoint.
    """
    pl.seed_everything(config.seed, verbose=False)
    timer = next((c for c in callbacks if isinstance(c, Timer)), None)
    if timer is None:
        callbacks = [timer := Timer(), *callbacks]
    callbacks = [*callbacks, _MetricCheck(config)]
    trainer = instantiate(config.trainer, _partial_=True)(
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    model, data = instantiate_node(config.model), instantiate_node(config.data)
    if not isinstance(model, pl.LightningModule):
        raise MisconfigurationException(
            f"the configuration 'model' makes a {type(model).__name__}, and no LightningModule: "
            "name its class by _target_"
        )
    if resume is not None and resume.exists():
        # A sharded checkpoint is a folder.
        file = resume / "meta.pt" if resume.is_dir() else resume
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{resume} holds more than tensors and numbers, and reading it could run code of "
                "its author: remove it to start again; or, if it is from this run, leave out what "
                "your module and callbacks save, as by save_hyperparameters(ignore=[...])"
            ) from error
        _reload_curve(loggers, int(saved["global_step"]))
    else:
        resume = None
        if config.init is not None:
            load_weights(model, config.init)
            _measure_dense(config, model, data, callbacks)
    log_configuration(loggers, config)
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer, timer.time_elapsed()


def _measure_dense(
    config: DictConfig, model: pl.LightningModule, data: Any, callbacks: list[pl.Callback]
) -> None:
    """Tell callbacks that keep a metric what it is before training."""
    floors = [c.floor for c in callbacks if isinstance(c, Compress) and c.floor is not None]
    if all(floor.given is not None for floor in floors):
        return
    plain = instantiate(config.trainer, _partial_=True)(
        callbacks=[], logger=False, enable_checkpointing=False
    )
    loaders = plain.validate(model, datamodule=data, verbose=False)
    metrics = {name: value for loader in loaders for name, value in loader.items()}
    for floor in floors:
        floor.given = metrics.get(floor.metric.name, floor.given)
        floor.reset()


def _reload_curve(loggers: list[Any], step: int) -> None:
    """Give Lightning's CSV logger the rows before a step: it would overwrite the file without."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / "metrics.csv"
            if path.is_file():
                with open(path, newline="") as file:
                    rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
                logger.experiment.metrics.extend(r for r in rows if int(r["step"]) < step)


def _evaluate(
    config: DictConfig, trainer: pl.Trainer, module: pl.LightningModule, split: str
) -> float:
    """The configured metric of a module on the ``"val"`` or ``"test"`` split."""
    evaluate = {"test": trainer.test, "val": trainer.validate}[split]
    loggers = trainer.loggers
    if split == "val":
        trainer.loggers = []  # the logged curve is that of training, and this is no point of it
    loaders = evaluate(module, datamodule=instantiate_node(config.data), verbose=False)
    metrics = {name: value for loader in loaders for name, value in loader.items()}
    trainer.loggers = loggers
    return _metric_of(config, metrics, split)


def _metric_of(config: DictConfig, metrics: Mapping[str, Any], split: str) -> float:
    """The configured metric among those that were logged.

    Raises:
        MisconfigurationException: It was not.
    """
    name = f"{split}/{config.metric}"
    if name not in metrics:
        raise MisconfigurationException(
            f"{config.model._target_} does not log {name}, by which runs are compared; it logs "
            f"{', '.join(metrics) or 'nothing'}: choose one by metric=..., or log it"
        )
    return float(metrics[name])


class _MetricCheck(pl.Callback):
    """Ends a training after its first validation if the configured metric is not logged."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            _metric_of(self.config, trainer.callback_metrics, "val")


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


def _remove_resume_checkpoints(folder: Path) -> None:
    for saved in folder.glob("resume-*.ckpt"):
        if saved.is_dir():
            shutil.rmtree(saved)
        else:
            saved.unlink()


def _summary(result: dict[str, Any], before: tuple[int, float] | None, folder: Path) -> str:
    metric, dense = result["metric"], result["error_dense"]
    rival = "" if dense is None else f" (dense {format_metric(metric, dense)})"
    start = ""
    if before is not None:
        start = f"\nbefore: {format_metric(metric, before[1])} in {before[0]:,} bytes"
    return (
        f"\n{format_metric(metric, result['error'])} {result['evaluated_on']} "
        f"{describe_metric(metric)}{rival} in {result['bytes']:,} bytes, "
        f"{result['ratio']:.0f} times smaller, "
        f"after {result['seconds']:.0f} s{start}\n{folder / 'report.png'}"
    )
