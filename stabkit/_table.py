"""A small table of text that prints itself and that HTML is made from."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table of text, for printing and for HTML.

    Attributes:
        title: Its heading.
        columns: Column names.
        rows: Cells.
        footer: A line below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: str = ""

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, text[0], "-" * len(text[0]), *text[1:], *([self.footer] if self.footer else [])])

    def _repr_html_(self) -> str:
        from stabkit.render import table_html

        return table_html(self)


class Shown:
    """What prints itself as text: in a plain prompt as `print` shows it, not as fields."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("..." if cycle else str(self))
