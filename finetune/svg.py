"""Rectangles, lines and text as SVG, written by hand: pictures for a browser, a README and an editor.

No plotting library. Plain functions from numbers to elements; what is drawn is the caller's business.
"""

from collections.abc import Sequence
from html import escape


def page(width: int, height: int, parts: Sequence[str]) -> str:
    """A whole picture on white."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def frame(x: float, y: float, width: float, height: float) -> list[str]:
    return [line([(x, y), (x, y + height), (x + width, y + height)], "#888", 1)]


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(height, 0):.1f}" fill="{colour}"/>'


def line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    if len(points) < 2:
        points = [*points, *points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
