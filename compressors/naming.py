"""Names: of functions that a user gives, and of entries of a table that a user asks for."""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from typing import TypeVar

__all__ = ["lookup", "name_of", "printable"]

T = TypeVar("T")


def name_of(function: object) -> str:
    """The name that messages give to a function; that of its class for any other object.

    Example:
        >>> name_of(partial(max, 0)), name_of(partial)
        ('max', 'partial')
    """
    if isinstance(function, partial):
        return name_of(function.func)
    name: str = getattr(function, "__name__", type(function).__name__)
    return name.rstrip("_")  # which only keeps a name apart from a word of Python's


def printable(text: str) -> str:
    """The text in one line, without control characters, which could rewrite what a terminal shows.

    Example:
        >>> print(printable("red" + chr(27) + "[31m.fitsmall"))
        red\\x1b[31m.fitsmall
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """The entry of a table.

    Args:
        kind: Kind of the entries, for the error.
        name: Name of the entry.
        table: Entries by name.

    Raises:
        ValueError: The table has no such entry; the error tells the nearest ones.

    Example:
        >>> lookup("size", "larg", {"small": 1, "large": 9})
        Traceback (most recent call last):
        ValueError: unknown size 'larg': did you mean large? Choose one of small, large
    """
    if name not in table:
        near = get_close_matches(name, table)
        hint = f"did you mean {' or '.join(near)}? Choose" if near else "choose"
        raise ValueError(f"unknown {kind} {name!r}: {hint} one of {', '.join(table)}")
    return table[name]
