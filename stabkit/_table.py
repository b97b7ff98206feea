"""A small table of text that prints itself and that HTML is made from."""

import math
from dataclasses import dataclass
from typing import Any

NAMED_LAYERS = 3  # of those that share a setting
NAMED_FACTORS = 6  # of a schedule


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


def number(value: float | None) -> str:
    """A number for reading: three significant digits.

    Args:
        value: The number; None where there is none.

    Returns:
        Text.
    """
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.3g}"


def setting(value: object) -> str:
    """A setting for reading: long schedules by their range, layers by their factor.

    Args:
        value: The setting.

    Returns:
        Text.
    """
    if isinstance(value, list | tuple) and len(value) > NAMED_FACTORS:
        return f"{len(value)} factors, {number(min(value))} to {number(max(value))}"
    if not isinstance(value, dict):
        return number(value) if isinstance(value, float) else str(value)
    by_factor: dict[float, list[str]] = {}
    for name, factor in value.items():
        by_factor.setdefault(factor, []).append(name)
    parts = []
    for factor, names in sorted(by_factor.items()):
        more = f" and {len(names) - NAMED_LAYERS} more" if len(names) > NAMED_LAYERS else ""
        parts.append(f"{number(factor)} of {', '.join(names[:NAMED_LAYERS])}{more}")
    return "; ".join(parts)
