"""A table of a report, for a terminal, a document and a page."""

import re
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

__all__ = ["ReportTable", "escape_markdown"]


@dataclass(frozen=True)
class ReportTable:
    """A table with a title and a note on how to read it.

    Args:
        title: Its title.
        note: One or more sentences.
        head: Names of the columns. All but the first have numbers.
        rows: Cells of each row.
    """

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def to_rich(self) -> Table:
        """The table for a terminal."""
        title, caption = escape(self.title), escape(self.note)
        table = Table(title=title, caption=caption, title_justify="left")
        for number, name in enumerate(self.head):
            table.add_column(escape(name), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def to_markdown(self) -> str:
        """The table as a section of a Markdown document.

        Example:
            >>> table = ReportTable("Sizes", "In bytes.", ["file", "bytes"], [["a|b", "3"]])
            >>> print(table.to_markdown())
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
        title, note = escape_markdown(self.title), escape_markdown(self.note)
        return "\n".join([f"### {title}", "", note, "", *lines, ""])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def escape_markdown(text: str) -> str:
    """The text as it is, where Markdown would take it for markup, HTML or mathematics.

    Example:
        >>> print(escape_markdown("a|b <img> $x$"))
        a\\|b \\<img> \\$x\\$
    """
    return re.sub(r"([\\`*\[<|$])", r"\\\1", text)
