"""Which rows of a packed micro-batch carry loss, as the cross-entropy wants them, and the part that KL terms need.

Plain index work on the arrays of `finetune.packed`; nothing here computes a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.ops.attention_tiles import SegmentLike
from finetune.packed import Packed, Segment

ROWS = 32
"""Of what is computed its number is a multiple, and so is that of the rows with loss. Every new number of rows makes
oneDNN compile kernels for each product (0.3 MB and 0.8 ms each, kept), and the heap take blocks of new sizes, so that
memory grows from step to step."""


@dataclass(frozen=True, eq=False)
class RowTerms:
    """Loss terms sorted by row. U rows carry loss."""

    rows: np.ndarray
    """int64 (U,): rows of the packed sequence, ascending"""
    order: np.ndarray
    """int64 (N,): term i of the sorted ones is term order[i] of the packed ones"""
    term_rows: np.ndarray
    """int64 (N,): index into `rows`"""


def sort_terms(packed: Packed) -> RowTerms:
    order = np.argsort(packed.loss_rows, kind="stable")
    rows, term_rows = np.unique(packed.loss_rows[order], return_inverse=True)
    return RowTerms(rows.astype(np.int64), order, term_rows.astype(np.int64))


@dataclass(frozen=True, eq=False)
class Part:
    """Some segments of a packed sequence as a sequence of their own."""

    token_ids: np.ndarray
    positions: np.ndarray
    segments: tuple[Segment, ...]
    rows: np.ndarray
    """int64: where the wanted rows went"""


def part_with_rows(packed: Packed, rows: np.ndarray) -> Part:
    """The segments of `rows` and all their ancestors."""
    segments, wanted = packed.segments, set()
    starts = np.array([segment.start for segment in segments])
    by_start = np.argsort(starts)
    for index in by_start[np.searchsorted(starts[by_start], np.unique(rows), side="right") - 1].tolist():
        while index >= 0 and index not in wanted:
            wanted.add(index)
            index = segments[index].parent
    new_index, new_row = {-1: -1}, np.full(len(packed.token_ids), -1, np.int64)
    kept: list[Segment] = []
    at = 0
    for index, segment in enumerate(segments):
        if index in wanted:
            size = segment.end - segment.start
            new_index[index] = len(kept)
            new_row[segment.start : segment.end] = np.arange(at, at + size)
            kept.append(Segment(at, at + size, new_index[segment.parent]))
            at += size
    source = np.concatenate([np.arange(segments[i].start, segments[i].end) for i in sorted(wanted)])
    return Part(packed.token_ids[source], packed.positions[source], tuple(kept), new_row[rows])


def with_filler(
    token_ids: np.ndarray, positions: np.ndarray, segments: Sequence[SegmentLike]
) -> tuple[np.ndarray, np.ndarray, Sequence[SegmentLike]]:
    """Rows of no use up to a multiple of ROWS, in a segment that no other sees."""
    length = len(token_ids)
    filler = np.zeros(-length % ROWS, np.int64)
    if not len(filler):
        return token_ids, positions, segments
    more = Segment(length, length + len(filler), -1)
    return np.append(token_ids, filler), np.append(positions, np.arange(len(filler))), (*segments, more)


def filled_up(rows: np.ndarray, multiple: int) -> np.ndarray:
    """`rows`, the last of them again up to a multiple. No term reads the copies, so they have no gradient."""
    return np.append(rows, np.repeat(rows[-1:], -len(rows) % multiple))
