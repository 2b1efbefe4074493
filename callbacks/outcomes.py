"""Targets, and what training made of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from fitsmall.compressors.text_table import aligned

__all__ = ["Outcome", "targets_table"]


@dataclass(frozen=True)
class Outcome:
    """A target, and what training made of it.

    Args:
        target: What it is about.
        wanted: Text of what was asked for.
        reached: Text of what is there.
        met: Whether that is enough.
    """

    target: str
    wanted: str
    reached: str
    met: bool


def targets_table(outcomes: Sequence[Outcome]) -> str:
    """Return a table of targets.

    Example:
        >>> print(targets_table([Outcome("file", "at most 400 bytes", "398 bytes", True)]))
        target  wanted             reached    met
        file    at most 400 bytes  398 bytes  yes
    """
    rows = [("target", "wanted", "reached", "met")]
    rows += [(o.target, o.wanted, o.reached, "yes" if o.met else "no") for o in outcomes]
    return "\n".join(aligned(rows, left=4))
