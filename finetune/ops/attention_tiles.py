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
QUERY_STEP, KEY_STEP = 32, 64
"""Of what is computed there are multiples of these; what is too many is masked. oneDNN compiles and keeps kernels for
every new size (0.9 MB, 1 ms): segments of dialogues make 1,385 sizes of tiles exactly, and 29 like this, for a quarter
more scores."""


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
    """Queries [start, end), keys in `runs` of rows in order; the last end - start keys are the queries' own rows.

    Computed are `num_queries` from `start` on, with `computed_runs` of keys, of which the first `num_before` are
    masked: rows before 0 (down to -KEY_STEP) and behind the last one (up to QUERY_STEP) have to exist.
    """

    start: int
    end: int
    runs: tuple[tuple[int, int], ...]
    num_queries: int
    num_before: int
    computed_runs: tuple[tuple[int, int], ...]

    @property
    def num_keys(self) -> int:
        """Computed."""
        return sum(end - start for start, end in self.computed_runs)


def make_tiles(segments: Sequence[SegmentLike], num_heads: int) -> tuple[Tile, ...]:
    """Tiles in row order of the segments; together their queries are all rows of all segments, once."""
    tiles = []
    for segment in segments:
        chain = _ancestors(segments, segment)
        start = segment.start
        while start < segment.end:
            seen = sum(run[1] - run[0] for run in chain) + start - segment.start
            fits = MAX_SCORES // (num_heads * (seen + MAX_QUERIES + KEY_STEP))
            step = QUERY_STEP if fits >= QUERY_STEP else 1
            end = min(segment.end, start + max(1, min(MAX_QUERIES, fits // step * step)))
            tiles.append(_tile(start, end, _joined([*chain, (segment.start, end)]), step))
            start = end
    return tuple(tiles)


def _tile(start: int, end: int, runs: tuple[tuple[int, int], ...], step: int) -> Tile:
    more = -(end - start) % step
    num_before = -(sum(last - first for first, last in runs) + more) % KEY_STEP
    wider = [list(run) for run in runs]
    wider[0][0] -= num_before
    wider[-1][1] += more
    return Tile(start, end, runs, end - start + more, num_before, tuple((first, last) for first, last in wider))


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
