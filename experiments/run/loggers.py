"""Records for loggers in addition to curves: the configuration, and at W&B axes, layers, the file.

Curves go through Lightning's loggers, whichever the user has chosen.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

__all__ = ["finish_wandb", "log_configuration", "log_result"]

_STEP, _BYTES = "trainer/global_step", "compression/bytes"


def log_configuration(loggers: Iterable[Logger], config: DictConfig) -> None:
    """Send the resolved configuration to every logger, and to W&B the axes of its charts.

    W&B draws the validation metric against steps, and its copy ``compression/val/...`` against the
    bytes that the network had at that step. For both it keeps the least value.
    """
    settings: Any = OmegaConf.to_container(config, resolve=True)
    for logger in loggers:
        if not isinstance(logger, CSVLogger):  # config.yaml is in its folder already
            logger.log_hyperparams(settings)
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            if config.size is not None:
                run.name = f"{config.size}, {config.compression or 'dense'}, seed {config.seed}"
            run.define_metric(_STEP)
            run.define_metric("*", step_metric=_STEP)
            run.define_metric(f"val/{config.metric}", step_metric=_STEP, summary="min")
            run.define_metric(f"compression/val/{config.metric}", step_metric=_BYTES)
            run.define_metric(_BYTES, step_metric=_STEP, summary="last")


def log_result(loggers: Iterable[Logger], result: dict[str, Any], file: Path) -> None:
    """Send the numbers of ``result.json``, a table of layers and the compressed file to W&B.

    Args:
        loggers: Loggers of the run; all but those of W&B are skipped.
        result: Content of ``result.json``.
        file: The compressed file.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb  # an extra, installed where its logger is used

        run = logger.experiment
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        run.summary.update({f"result/{name}": value for name, value in numbers.items()})
        columns = ["layer", *next(iter(result["layers"].values()))]
        rows = [[name, *layer.values()] for name, layer in result["layers"].items()]
        logger.log_table("layers", columns=columns, data=rows)
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=numbers)
        artifact.add_file(str(file))
        run.log_artifact(artifact)


def finish_wandb(loggers: Iterable[Logger]) -> None:
    """End the W&B run, if there is one: the next training of this process would continue it."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb  # an extra, installed where its logger is used

        wandb.finish()
