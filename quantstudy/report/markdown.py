"""Markdown tables, and numbers as their cells show them."""

from collections.abc import Sequence

NOTHING = "–"  # noqa: RUF001 - an en dash, the typographic sign of an empty cell


def markdown_table(rows: Sequence[Sequence[str]], words: int) -> str:
    """Return a padded Markdown table, its header first; the columns after the first `words` are aligned right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = " | ".join("-" * width if column < words else "-" * (width - 1) + ":" for column, width in enumerate(widths))
    return "".join(f"| {line} |\n" for line in (lines[0], rule, *lines[1:]))


def p_value(p: float) -> str:
    """Return a p-value as the tables show it."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def signed(points: float) -> str:
    """Return percentage points with their sign, without a negative zero."""
    return f"{round(points, 2) + 0.0:+.2f}"


def number(value: float | None, decimals: int) -> str:
    """Return a number, or a dash for None."""
    return NOTHING if value is None else f"{value:.{decimals}f}"


def latency(milliseconds: float | None, busy: bool) -> str:
    """Return a latency, marked if the machine was busy."""
    return number(milliseconds, 2) + (" busy" if busy else "")
