"""A table that is shown in a terminal and on a page."""

from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

__all__ = ["Sheet"]


@dataclass(frozen=True)
class Sheet:
    """A table with a title and a sentence on how to read it.

    Args:
        title: Its title.
        note: The sentence.
        head: Names of the columns; numbers are in all but the first.
        rows: Its cells.
    """

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def table(self) -> Table:
        """As it is printed in a terminal."""
        table = Table(title=self.title, caption=self.note, title_justify="left")
        for number, name in enumerate(self.head):
            table.add_column(escape(name), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table
