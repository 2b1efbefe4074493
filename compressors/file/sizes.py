"""Sizes of files as a user writes them: fractions of the dense bytes, and bytes with a unit."""

import re
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

__all__ = ["bytes_of", "dense_bytes"]

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"


def dense_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's state dict as it is, with tied tensors once.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        >>> net[1].weight = net[0].weight
        >>> dense_bytes(net)
        36
    """
    tensors = module.state_dict(keep_vars=True).values()
    return sum(each.nbytes for each in {each for each in tensors if isinstance(each, Tensor)})


def bytes_of(size: Any, dense: int, owner: str) -> int:
    """Return the bytes that a size means.

    Args:
        size: A fraction in (0, 1), or text with a unit.
        dense: Bytes that a fraction is one of.
        owner: Name of what the size was given to, for errors.

    Raises:
        ValueError: It is neither a fraction nor a number with a unit.

    Example:
        >>> [bytes_of(size, dense=1000, owner="") for size in (1 / 20, "1/20", "40 KB")]
        [50, 50, 40000]
    """
    number = size
    if isinstance(size, str):
        found = re.fullmatch(rf"\s*({_NUMBER}(?:/{_NUMBER})?)\s*([A-Za-z]*)\s*", size)
        try:
            number = float(Fraction(found[1].replace(",", ""))) if found else None
        except (ValueError, ZeroDivisionError):
            number = None
        if found and number and found[2].upper() in _UNITS:
            return int(number * _UNITS[found[2].upper()])
        number = None if found and found[2] else number
    if isinstance(number, int | float) and 0 < number < 1:
        return int(number * dense)
    hint = f": for bytes write '{number:g} B'" if number and number >= 1 else ""
    raise ValueError(
        f"{owner}: a size is a fraction of the dense bytes, such as 1/20, or a number with a "
        f"unit, such as '40 KB', and got {size!r}{hint}"
    )
