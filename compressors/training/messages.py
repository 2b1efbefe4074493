"""Messages of a training, from the first process only."""

import logging
import warnings

from fitsmall.compressors.training.sharding import processes

__all__ = ["LOGGER", "inform", "warn"]

LOGGER = logging.getLogger("fitsmall")


def inform(text: str) -> None:
    """Log a message at the level INFO."""
    if processes()[0] == 0:
        LOGGER.info(text)


def warn(text: str) -> None:
    """Warn of something that the user can fix."""
    if processes()[0] == 0:
        warnings.warn(text, stacklevel=3)
