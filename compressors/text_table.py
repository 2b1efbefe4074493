"""Tables of text whose columns stand below each other."""

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table.

    Args:
        rows: Cells of each line, the heading first.
        left: Number of columns that begin on the left; the others end on the right.

    Example:
        >>> print("\\n".join(aligned([("layer", "bytes"), ("fc", "1,000")])))
        layer  bytes
        fc     1,000
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
