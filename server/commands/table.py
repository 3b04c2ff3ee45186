"""Columns for people: as wide as their widest cell, two spaces apart."""

from collections.abc import Sequence
from typing import Any


def print_table(header: Sequence[str] | None, rows: Sequence[Sequence[Any]]) -> None:
    """Nothing is printed for no rows and no header. What does not print (a newline in a text) is shown escaped."""
    lines = [[printable(str(cell)) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """A control character of somebody's text must not reach the terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]
