"""A saved view at W&B of the runs of a sweep: error against bytes, training, layers."""

from pathlib import Path
from typing import Any

import wandb_workspaces.workspaces as ws
from omegaconf import DictConfig, OmegaConf
from wandb_workspaces.reports.v2.interface import LinePlot, ScatterPlot, SummaryMetric

__all__ = ["build_workspace"]

_LAYERS = {"Zeros": "sparsity", "Bits": "bits", "Clusters": "clusters", "Rank": "rank"}
_GROUPS = ("size", "compression", "fine_tune", "trainer.max_steps")


def build_workspace(folder: Path, entity: str) -> ws.Workspace:
    """Build the view of the runs in a folder. Its ``save()`` sends it to W&B.

    Runs of a study are grouped by size, compression and steps, so that lines are means over seeds.
    The dense trainings that they start from are shown too.

    Args:
        folder: A run, or a sweep, whose first run gives metric, project and group.
        entity: User or team that owns the project.

    Raises:
        FileNotFoundError: The folder has no run that was sent to W&B.
    """
    config = _find_config(folder)
    held_out = f"val/{config.metric}"
    steps: dict[str, Any] = {"x": "trainer/global_step", "title_x": "steps"}
    layers: list[Any] = [
        LinePlot(title=f"{title} of each layer", metric_regex=f"compression/{key}/.*", **steps)
        for title, key in _LAYERS.items()
    ]
    return ws.Workspace(
        entity=entity,
        project=config.logger.wandb.project,
        name=f"Compression: {config.group or Path(config.folder).name}",
        sections=[
            ws.Section(
                name="Error against bytes",
                is_open=True,
                panels=[
                    ScatterPlot(
                        title="Tested error against bytes of the file",
                        x=SummaryMetric("result/bytes"),
                        y=SummaryMetric("result/error"),
                        log_x=True,
                    ),
                    LinePlot(
                        title="Held-out error against bytes, while compression goes on",
                        x="compression/bytes",
                        y=[f"compression/{held_out}"],
                        log_x=True,
                        title_x="bytes",
                    ),
                ],
            ),
            ws.Section(
                name="Training",
                is_open=True,
                panels=[
                    LinePlot(title="Held-out error", y=[held_out], **steps),
                    LinePlot(title="Bytes", y=["compression/bytes"], log_y=True, **steps),
                    LinePlot(title="Loss", y=["train/loss"], **steps),
                ],
            ),
            ws.Section(name="Layers", panels=layers),
        ],
        runset_settings=ws.RunsetSettings(
            filters=[
                ws.Metric("Group") == config.group
                if config.group
                else ws.Metric("ID") == config.logger.wandb.id
            ],
            groupby=[ws.Config(name) for name in _GROUPS] if config.size else [],
        ),
    )


def _find_config(folder: Path) -> DictConfig:
    """Configuration of the first run that was sent to W&B."""
    for path in [folder / "config.yaml", *sorted(folder.glob("*/config.yaml"))]:
        if path.is_file():
            config = OmegaConf.load(path)
            assert isinstance(config, DictConfig)
            if OmegaConf.select(config, "logger.wandb"):
                return config
    raise FileNotFoundError(
        f"{folder} has no run that was sent to W&B: train with 'logger=[csv,wandb]'"
    )
