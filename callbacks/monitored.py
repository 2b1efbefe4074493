"""The metric that a callback monitors after each validation."""

import re
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["MonitoredMetric"]


# Words in the names of metrics of which more is better.
_LARGER_IS_BETTER = re.compile(
    "acc|accuracy|ap|auc|auroc|bleu|dice|f1|fscore|iou|jaccard|kappa|map|mcc|miou|precision|psnr|"
    "r2|recall|reward|rouge|score|ssim|top1|top5"
)


@dataclass(frozen=True)
class MonitoredMetric:
    """Name of a logged metric, and whether it is an error (``"min"``) or an accuracy (``"max"``).

    Without a mode it is an error, unless its name is that of a metric of which more is better.

    Example:
        >>> MonitoredMetric("val/accuracy", "max").loss(0.75)
        -0.75
    """

    name: str
    mode: Literal["min", "max"] | None

    def __post_init__(self) -> None:
        habit = [word for word in sorted(_words(self.name)) if _LARGER_IS_BETTER.fullmatch(word)]
        if self.mode is None and habit:
            raise MisconfigurationException(
                f"of {self.name!r}, more is usually better, as of every {habit[0]}: give "
                "mode='max', or mode='min' if less is better here"
            )
        if self.mode not in ("min", "max", None):
            raise MisconfigurationException(
                f"the mode of {self.name!r} is min or max, got {self.mode!r}"
            )

    def loss(self, value: float) -> float:
        """Return the value with the sign by which smaller is better."""
        return -value if self.mode == "max" else value

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
                f"no {self.name!r} was logged, only {logged}: name one with monitor=..."
            )
        return float(trainer.callback_metrics[self.name])


def _words(name: str) -> set[str]:
    """Return the words of a metric's name, without the number after ``acc`` in ``acc1``.

    Example:
        >>> sorted(_words("val/BinaryAccuracy_top5")), sorted(_words("val_acc1"))
        (['accuracy', 'binary', 'top', 'top5', 'val'], ['acc', 'acc1', 'val'])
    """
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()
    words = re.findall(r"[a-z]+[0-9]*", apart)
    return {*words, *(word.rstrip("0123456789") for word in words)}
