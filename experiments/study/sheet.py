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

    def markdown(self) -> str:
        """As it stands in a document.

        Example:
            >>> print(Sheet("Sizes", "In bytes.", ["file", "bytes"], [["a|b", "3"]]).markdown())
            ### Sizes
            <BLANKLINE>
            In bytes.
            <BLANKLINE>
            | file | bytes |
            |---|--:|
            | a\\|b | 3 |
            <BLANKLINE>
        """
        lines = [_row(self.head), "|---" + "|--:" * (len(self.head) - 1) + "|"]
        lines += map(_row, self.rows)
        return "\n".join([f"### {self.title}", "", self.note, "", *lines, ""])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
