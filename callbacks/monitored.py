"""The metric that a callback monitors after each validation."""

from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["MonitoredMetric"]


@dataclass(frozen=True)
class MonitoredMetric:
    """Name of a logged metric, and whether it is an error (``"min"``) or an accuracy (``"max"``).

    Example:
        >>> MonitoredMetric("val/accuracy", "max").loss(0.75)
        -0.75
    """

    name: str
    mode: Literal["min", "max"]

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise MisconfigurationException(
                f"the mode of {self.name!r} is min or max, got {self.mode!r}"
            )

    def loss(self, value: float) -> float:
        """Return the value with the sign by which smaller is better."""
        return value if self.mode == "min" else -value

    def expect(self, trainer: pl.Trainer, asker: pl.Callback) -> None:
        """Warn if the Trainer does not validate."""
        if not trainer.enable_validation:
            pl.utilities.rank_zero_warn(
                f"{type(asker).__name__} does nothing without a validation: give fit a validation "
                "loader, and the module a validation_step"
            )

    def validated(self, trainer: pl.Trainer) -> float | None:
        """Return the value that a validation within ``fit`` logged; None in other validations.

        Raises:
            MisconfigurationException: The validation logged no such metric.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return None
        if self.name not in trainer.callback_metrics:
            logged = ", ".join(trainer.callback_metrics) or "nothing"
            raise MisconfigurationException(
                f"the validation logged no {self.name!r}, only {logged}: name one with monitor=..."
            )
        return float(trainer.callback_metrics[self.name])
