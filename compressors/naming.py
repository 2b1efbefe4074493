"""Names: of functions that a user gives, of entries of a table, and of many similar parameters."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import chain, zip_longest
from typing import TypeVar

__all__ = ["abridged", "dotted", "group_by", "grouped", "lookup", "name_of", "printable"]

T = TypeVar("T")
Key = TypeVar("Key")

# Names that differ in numbers alone become one pattern if they are as many as this.
_FEWEST = 3


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


def dotted(*names: str) -> str:
    """The name of something in a module, from the paths and names that lead to it.

    Example:
        >>> dotted("", "block", "weight")
        'block.weight'
    """
    return ".".join(name for name in names if name)


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
        near = get_close_matches(str(name), table)
        hint = f"did you mean {' or '.join(near)}? Choose" if near else "choose"
        raise ValueError(f"unknown {kind} {name!r}: {hint} one of {', '.join(table)}")
    return table[name]


def group_by(items: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """Items by key, in the order in which the keys come first.

    Example:
        >>> group_by(["a", "bc", "d"], len)
        {1: ['a', 'd'], 2: ['bc']}
    """
    groups: dict[Key, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def abridged(items: Sequence[str], most: int = 6) -> str:
    """A list in one line, of which only the first items are written out.

    Example:
        >>> abridged(["a", "b", "c", "d"], most=2)
        'a, b and 2 more'
    """
    more = len(items) - most
    return ", ".join(items) if more <= 0 else f"{', '.join(items[:most])} and {more} more"


def grouped(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Patterns for names that differ in numbers alone, each with its names.

    Example:
        >>> grouped([f"layers.{n}.norm.weight" for n in range(12)] + ["fc1.bias", "fc2.bias"])
        ... # doctest: +ELLIPSIS
        [('layers.0-11.norm.weight', [...]), ('fc1.bias', ['fc1.bias']), ('fc2.bias', ['fc2.bias'])]
    """
    found: list[tuple[str, list[str]]] = []
    for words, alike in group_by(names, lambda name: tuple(re.split(r"\d+", name))).items():
        if len(alike) < _FEWEST:
            found.extend((name, [name]) for name in alike)
            continue
        numbers = zip(*(map(int, re.findall(r"\d+", name)) for name in alike), strict=True)
        ranges = (_range(sorted({*column})) for column in numbers)
        pattern = "".join(chain.from_iterable(zip_longest(words, ranges, fillvalue="")))
        found.append((pattern, alike))
    return found


def _range(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first}-{last}" if first < last else f"{first}"
