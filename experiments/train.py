"""One run: fit with compression, write the file, measure what it restores, and draw a picture.

The run's directory then holds ``config.yaml`` (resolved), ``metrics.csv``, ``model.pressfit``,
``result.json`` and ``report.png``.
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from pressfit.callbacks import CompressedCheckpoint
from pressfit.compressors import Report, restore
from pressfit.experiments.figures import draw

__all__ = ["main", "train"]


@hydra.main(version_base="1.3", config_path="pkg://pressfit.configs", config_name="train")
def main(config: DictConfig) -> float:
    """What Hydra runs for each job; returns the held-out error, which a sweeper may minimise."""
    overrides = list(HydraConfig.get().overrides.task)
    # Distributed training starts its other processes from the words of this one, and they must
    # name the command and this job alone, not the whole sweep.
    sys.argv = [sys.argv[0], "train", *overrides]
    result = train(config, Path(HydraConfig.get().runtime.output_dir), overrides)
    return float(result["error_validation"])


def train(config: DictConfig, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run an experiment in a folder, and return what ``result.json`` says.

    Args:
        config: As ``configs/train.yaml`` composes it.
        folder: The run's directory.
        overrides: Words that made the configuration, for the record.

    Raises:
        MisconfigurationException: Callbacks that do not fit together, or none that writes a file.
    """
    # The logger shares the run's directory on purpose; the other is Lightning's own to mend.
    warnings.filterwarnings("ignore", "Experiment logs directory")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    # A group of which nothing is chosen, `callbacks=[]`, has no node.
    callbacks = [*_instances(config.get("callbacks")), *_instances(config.get("observers"))]
    checkpoint = next((c for c in callbacks if isinstance(c, CompressedCheckpoint)), None)
    if checkpoint is None:
        raise MisconfigurationException("no checkpoint among the observers: none writes the file")

    trainer, seconds = _fit(config, callbacks, _instances(config.get("logger")))
    if "val/error" not in trainer.callback_metrics:
        raise MisconfigurationException(
            f"{config.model._target_} logs no val/error in its validation_step, by which runs are "
            f"compared; {checkpoint.path} is complete"
        )
    validation = float(trainer.callback_metrics["val/error"])
    # What is measured is what the file holds, in a module that was never trained.
    path = trainer.strategy.broadcast(checkpoint.path)
    assert path is not None, "the checkpoint wrote no file, and said nothing"
    restored: pl.LightningModule = restore(_build(config.model), path)
    error = _error(config, trainer, restored)

    error_dense, seconds_dense = None, None
    if config.reference:
        # The honest rival is the same training without compression: same seed, batches and
        # schedule. The weights just before compression starts would come for free, but from the
        # middle of the schedule, at a high learning rate, and make any compression look good.
        dense, seconds_dense = _fit(config, callbacks=[], loggers=[])
        error_dense = _error(config, dense, dense.lightning_module)

    result: dict[str, Any] = {
        "error": error,
        "error_dense": error_dense,
        "error_validation": validation,
        "evaluated_on": config.evaluate_on,
        "seconds": seconds,
        "seconds_dense": seconds_dense,
        "seed": config.seed,
        "overrides": overrides,
    }
    if checkpoint.report is not None:  # on the first process
        result |= _sizes(checkpoint.report)
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        marks = {"compressed": (result["bytes"], error)}
        if error_dense is not None:
            marks["dense"] = (result["bytes_dense"], error_dense)
        on = "" if config.evaluate_on == "val" else ", on test images"
        marks = {f"{name}{on}": mark for name, mark in marks.items()}
        draw(folder / "report.png", checkpoint.report, folder / "metrics.csv", marks)
        print(_summary(result, folder))
    return result


def _build(node: DictConfig) -> Any:
    return instantiate(node, _convert_="all")


def _instances(nodes: DictConfig | None) -> list[Any]:
    # An experiment may tune methods that `callbacks=[...]` leaves out: settings alone are no call.
    left_out = [name for name, node in (nodes or {}).items() if "_target_" not in node]
    if left_out:
        print(f"left out, since only settings are given: {', '.join(map(str, left_out))}")
    return [_build(node) for name, node in (nodes or {}).items() if name not in left_out]


def _fit(
    config: DictConfig, callbacks: list[pl.Callback], loggers: list[Any]
) -> tuple[pl.Trainer, float]:
    pl.seed_everything(config.seed, verbose=False)
    trainer = instantiate(config.trainer, _partial_=True)(
        callbacks=callbacks, logger=loggers or False
    )
    model, data = _build(config.model), _build(config.data)
    if config.init is not None:
        restore(model, config.init)
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    return trainer, time.perf_counter() - start


def _error(config: DictConfig, trainer: pl.Trainer, module: pl.LightningModule) -> float:
    evaluate = {"test": trainer.test, "val": trainer.validate}[config.evaluate_on]
    (metrics,) = evaluate(module, datamodule=_build(config.data), verbose=False)
    return metrics[f"{config.evaluate_on}/error"]


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
    dense = result["error_dense"]
    rival = "" if dense is None else f" (dense {100 * dense:.2f} %)"
    return (
        f"\n{100 * result['error']:.2f} % {result['evaluated_on']} error{rival} in "
        f"{result['bytes']:,} bytes, {result['ratio']:.0f} times smaller, "
        f"after {result['seconds']:.0f} s\n{folder / 'report.png'}"
    )
