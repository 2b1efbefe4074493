"""What a run tells a dashboard beside its curves: axes, the table of layers, and the file itself.

Curves go through Lightning's loggers, whichever they are; this is what W&B can show on top.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

__all__ = ["close", "declare", "publish"]

_STEP, _BYTES = "trainer/global_step", "compression/bytes"


def declare(loggers: Iterable[Logger], config: DictConfig) -> None:
    """Tell every logger the whole configuration, and W&B what to draw against what.

    Held-out errors are drawn against steps; the same error beside the bytes that the network had
    then, ``compression/val/...``, is drawn against bytes. Of both W&B keeps the least.
    """
    settings: Any = OmegaConf.to_container(config, resolve=True)
    for logger in loggers:
        if not isinstance(logger, CSVLogger):  # beside which config.yaml lies
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


def publish(loggers: Iterable[Logger], result: dict[str, Any], file: Path) -> None:
    """Give W&B the numbers of ``result.json``, the table of layers, and the compressed file."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb  # where there is its logger

        run = logger.experiment
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        run.summary.update({f"result/{name}": value for name, value in numbers.items()})
        columns = ["layer", *next(iter(result["layers"].values()))]
        rows = [[name, *layer.values()] for name, layer in result["layers"].items()]
        logger.log_table("layers", columns=columns, data=rows)
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=numbers)
        artifact.add_file(str(file))
        run.log_artifact(artifact)


def close(loggers: Iterable[Logger]) -> None:
    """End the run of W&B, if one began, or the next one of this process would go on with it."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb  # where there is its logger

        wandb.finish()
