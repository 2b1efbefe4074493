"""Widths: how many units each group had before training, and has now."""

from collections.abc import Mapping

from torch import Tensor

from fitsmall.compressors.text_table import aligned

__all__ = ["WidthHistory"]

# Rows of the table.
_ROWS = 30


class WidthHistory:
    """Numbers of units, by group.

    Attributes:
        counts: Number of units before training, and now.
    """

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}

    def begin(self, widths: Mapping[str, int]) -> None:
        """Take the widths before training."""
        self.counts = {name: [width, width] for name, width in widths.items()}

    def remove(self, going: Mapping[str, Tensor]) -> None:
        """Count the units that have left.

        Args:
            going: True for each unit that left, by group.
        """
        for name, mask in going.items():
            if name in self.counts:
                self.counts[name][1] -= int(mask.sum())

    def before(self, name: str, now: int) -> int:
        """Return the width of a group before training, given that of one that joined later."""
        return self.counts[name][0] if name in self.counts else now

    def metrics(self, going: Mapping[str, Tensor]) -> dict[str, float]:
        """Return units that are not chosen to leave, as numbers and as fractions of all.

        Args:
            going: True for each unit that is chosen to leave, by group.
        """
        found: dict[str, float] = {}
        for name, (before, now) in self.counts.items():
            left = now - (int(going[name].sum()) if name in going else 0)
            found |= {f"units/{name}": float(left), f"kept/{name}": left / before}
        return found

    def table(self) -> str:
        """Return a table of the groups that have lost units.

        Example:
            >>> history = WidthHistory()
            >>> history.counts = {"conv1": [64, 48], "conv2": [128, 32], "fc1": [100, 100]}
            >>> print(history.table())
              units of  before  now  kept
              conv1         64   48   75%
              conv2        128   32   25%
              1 more keep all
        """
        rows = [
            (name, f"{before:,}", f"{now:,}", f"{now / before:.0%}")
            for name, (before, now) in self.counts.items()
            if now < before
        ]
        whole, more = len(self.counts) - len(rows), len(rows) - _ROWS
        rows = [("units of", "before", "now", "kept"), *rows[:_ROWS]]
        lines = [f"  {line}" for line in aligned(rows)]
        lines += [f"  and {more} more"] * (more > 0) + [f"  {whole} more keep all"] * (whole > 0)
        return "\n".join(lines)
