"""Which rows of a packed sequence attend to which: tiles of queries with the runs of keys that they see.

A segment sees its ancestors whole and itself causally. No mask over the sequence exists anywhere; a tile's own
triangle is the only one. Plain data, without torch; `attention.py` computes with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_QUERIES = 128
"""Of a tile: at 256 rows a segment half of the triangle would be computed for nothing, at 64 the products get small."""
MAX_SCORES = 1 << 22
"""Queries times keys times heads of a tile: 16 MB of float32, half of the L3 cache that they should stay in."""


class SegmentLike(Protocol):
    """`finetune.packed.Segment`."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def parent(self) -> int: ...


@dataclass(frozen=True)
class Tile:
    """Queries [start, end), keys in `runs` of rows in order; the last end - start keys are the queries' own rows."""

    start: int
    end: int
    runs: tuple[tuple[int, int], ...]

    @property
    def num_keys(self) -> int:
        return sum(end - start for start, end in self.runs)


def make_tiles(segments: Sequence[SegmentLike], num_heads: int) -> tuple[Tile, ...]:
    """Tiles in row order of the segments; together their queries are all rows of all segments, once."""
    tiles = []
    for segment in segments:
        chain = _ancestors(segments, segment)
        start = segment.start
        while start < segment.end:
            seen = sum(run[1] - run[0] for run in chain) + start - segment.start
            fits = MAX_SCORES // (num_heads * (seen + MAX_QUERIES))
            end = min(segment.end, start + max(1, min(MAX_QUERIES, fits)))
            tiles.append(Tile(start, end, _joined([*chain, (segment.start, end)])))
            start = end
    return tuple(tiles)


def _ancestors(segments: Sequence[SegmentLike], segment: SegmentLike) -> list[tuple[int, int]]:
    """Rows of the ancestors, the root's first."""
    chain: list[tuple[int, int]] = []
    while segment.parent >= 0:
        segment = segments[segment.parent]
        chain.append((segment.start, segment.end))
    return chain[::-1]


def _joined(runs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Runs that touch made one: then keys are a view of the rows, not a copy."""
    joined: list[tuple[int, int]] = []
    for start, end in runs:
        if start == end:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
