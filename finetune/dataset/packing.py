"""Packs examples into micro-batches in which common beginnings are laid out once.

Examples of agents share long prompts (system message, tools, history). Sorted by their token ids they form a trie; a
common run of `MIN_SHARED` tokens or more becomes one segment that its branches attend to, and what it costs is computed
once. Bins of at most `max_tokens` rows are filled best-fit decreasing; a trie that does not fit is cut at its branches,
its prefix repeated in each bin. Deterministic: equal examples, seed and epoch give equal bins.

Exact: every example keeps its own (row, target, weight) entries, so packed and plain losses have the same terms. Not
here: attention over segments, the order of examples (order.py), what an optimizer step is.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from finetune.dataset.order import shuffled
from finetune.packed import Answers, Example, Packed, Segment

MIN_SHARED = 32
"""Tokens of a run that pay for a branch: below that, block-sparse attention loses more than the rows save."""


@dataclass(frozen=True)
class Placement:
    """Where one example lies: its rows in order, from which `unpack` and the tests rebuild it."""

    example: int  # index into the examples that were packed
    leaf: int  # its last segment's index
    first_loss: int  # its entries in the loss arrays are [first_loss, end_loss)
    end_loss: int


@dataclass(frozen=True)
class Bin:
    packed: Packed
    placements: tuple[Placement, ...]


@dataclass
class _Node:
    """A run of tokens [start, end) of the examples in `members`, below the node `parent` (-1: the root)."""

    start: int
    end: int
    parent: int
    example: int  # one that has these tokens
    members: list[int] = field(default_factory=list)  # examples that end here


@dataclass
class Item:
    """Examples that go into one bin together, and the rows they add below the node they hang from."""

    num_rows: int
    members: list[int]


def pack(
    examples: Sequence[Example], max_tokens: int, *, seed: int, epoch: int, window: int | None = None
) -> list[Packed]:
    """Micro-batches of at most `max_tokens` rows. See `pack_bins`."""
    return [one.packed for one in pack_bins(examples, max_tokens, seed=seed, epoch=epoch, window=window)]


def pack_bins(
    examples: Sequence[Example],
    max_tokens: int,
    *,
    seed: int,
    epoch: int,
    window: int | None = None,
    min_shared: int = MIN_SHARED,
) -> list[Bin]:
    """`window`: only so many consecutive examples are packed together, so that their order is roughly kept (a
    curriculum); None: all of them. The bins of a window come in an order drawn from (seed, epoch).

    Raises ValueError for an example that is longer than `max_tokens`.
    """
    for one in examples:
        if len(one.token_ids) > max_tokens:
            raise ValueError(f"example {one.id} has {len(one.token_ids)} tokens, a micro-batch at most {max_tokens}")
    size = window or max(len(examples), 1)
    bins: list[Bin] = []
    for first in range(0, len(examples), size):
        chosen = list(range(first, min(first + size, len(examples))))
        groups = _fill(examples, chosen, max_tokens, min_shared)
        order = shuffled([f"{first}:{number}" for number in range(len(groups))], seed=seed, epoch=epoch)
        bins += [lay_out(examples, groups[number], min_shared) for number in order]
    return bins


def unpack(one: Bin, examples: Sequence[Example]) -> list[Example]:
    """The examples of a bin, rebuilt from its rows and loss entries; of `examples` only names and flags are taken."""
    packed = one.packed
    found = []
    for place in one.placements:
        rows = chain_rows(packed.segments, place.leaf)
        token_ids = packed.token_ids[rows]
        weights = np.zeros(len(rows), np.float32)
        # A row predicts the token after it in this example; the position says which one that is.
        mine = slice(place.first_loss, place.end_loss)
        at = packed.positions[packed.loss_rows[mine]] + 1
        assert (packed.loss_targets[mine] == token_ids[at]).all()
        weights[at] = packed.loss_weights[mine]
        known = examples[place.example]
        found.append(replace(known, token_ids=token_ids, weights=weights))
    return found


def chain_rows(segments: Sequence[Segment], leaf: int) -> NDArray[np.int64]:
    """Rows of a segment and all its ancestors, first token first."""
    runs = []
    while leaf >= 0:
        runs.append(np.arange(segments[leaf].start, segments[leaf].end))
        leaf = segments[leaf].parent
    return np.concatenate(runs[::-1])


def _trie(examples: Sequence[Example], chosen: Sequence[int], min_shared: int) -> list[_Node]:
    """Nodes in depth-first order, parents first; an example that is the beginning of another ends at an inner node."""
    ranked = sorted(chosen, key=lambda i: (examples[i].token_ids.astype(">i4").tobytes(), i))
    shared = [0] + [_common_length(examples[a].token_ids, examples[b].token_ids) for a, b in itertools.pairwise(ranked)]
    nodes: list[_Node] = []
    todo = [(0, len(ranked), 0, -1)] if ranked else []  # a range of `ranked`, the depth it starts at, the parent
    while todo:
        low, high, depth, parent = todo.pop()
        first = ranked[low]
        if high - low == 1:
            if len(examples[first].token_ids) > depth:
                nodes.append(_Node(depth, len(examples[first].token_ids), parent, first, [first]))
            else:
                nodes[parent].members.append(first)
            continue
        common = min(shared[low + 1 : high])
        if common - depth >= min_shared:
            nodes.append(_Node(depth, common, parent, first))
            depth, parent = common, len(nodes) - 1
        cuts = [low, *(i for i in range(low + 1, high) if shared[i] == common), high]
        todo += [(a, b, depth, parent) for a, b in itertools.pairwise(cuts)][::-1]
    return nodes


def _common_length(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def _fill(examples: Sequence[Example], chosen: Sequence[int], max_tokens: int, min_shared: int) -> list[list[int]]:
    """The examples of each bin: from the leaves up, what hangs from a node is packed into what it leaves of a bin."""
    nodes = _trie(examples, chosen, min_shared)
    below: list[list[Item]] = [[] for _ in nodes]
    top: list[Item] = []
    for number in range(len(nodes) - 1, -1, -1):
        node = nodes[number]
        items = below[number]
        if node.members:  # they end here and add no rows
            items.append(Item(0, list(node.members)))
        packed = best_fit(items, max_tokens - node.end)
        run = node.end - node.start
        found = [Item(run + item.num_rows, item.members) for item in packed]
        (below[node.parent] if node.parent >= 0 else top).extend(found)
        below[number] = []
    return [sorted(item.members) for item in best_fit(top, max_tokens)]


def best_fit(items: Sequence[Item], capacity: int) -> list[Item]:
    """Best-fit decreasing: as full as first-fit, and the bin is found by bisection instead of a walk over all bins."""
    bins: list[Item] = []
    room: list[tuple[int, int]] = []  # (rows left, index into bins), sorted
    for item in sorted(items, key=lambda item: (-item.num_rows, item.members)):
        place = bisect.bisect_left(room, (item.num_rows, -1))
        if place == len(room):
            bins.append(Item(item.num_rows, list(item.members)))
            bisect.insort(room, (capacity - item.num_rows, len(bins) - 1))
            continue
        left, number = room.pop(place)
        bins[number].num_rows += item.num_rows
        bins[number].members += item.members
        bisect.insort(room, (left - item.num_rows, number))
    return bins


def lay_out(examples: Sequence[Example], chosen: Sequence[int], min_shared: int = MIN_SHARED) -> Bin:
    """`chosen` as one bin."""
    nodes = _trie(examples, chosen, min_shared)
    segments: list[Segment] = []
    leaf_of: dict[int, int] = {}
    num_rows = 0
    for number, node in enumerate(nodes):
        segments.append(Segment(num_rows, num_rows + node.end - node.start, node.parent))
        num_rows = segments[-1].end
        leaf_of |= dict.fromkeys(node.members, number)
    token_ids = np.concatenate([examples[node.example].token_ids[node.start : node.end] for node in nodes])
    positions = np.concatenate([np.arange(node.start, node.end) for node in nodes])
    rows, targets, weights, kl = [], [], [], []
    placements = []
    num_losses = 0
    for index in chosen:
        one = examples[index]
        at = np.flatnonzero(one.weights)
        assert not len(at) or at[0] > 0, f"example {one.id}: nothing predicts the first token"
        rows.append(chain_rows(segments, leaf_of[index])[at - 1])
        targets.append(one.token_ids[at])
        weights.append(one.weights[at])
        kl.append(np.full(len(at), one.kl))
        placements.append(Placement(index, leaf_of[index], num_losses, num_losses + len(at)))
        num_losses += len(at)
    packed = Packed(
        token_ids=token_ids.astype(np.int32),
        positions=positions.astype(np.int32),
        segments=tuple(segments),
        loss_rows=np.concatenate(rows).astype(np.int32),
        loss_targets=np.concatenate(targets).astype(np.int32),
        loss_weights=np.concatenate(weights).astype(np.float32),
        loss_kl=np.concatenate(kl).astype(np.bool_),
        num_examples=len(chosen),
        num_real_tokens=sum(len(examples[index].token_ids) for index in chosen),
        answers=_answers(examples, placements),
    )
    return Bin(packed, tuple(placements))


def _answers(examples: Sequence[Example], placements: Sequence[Placement]) -> Answers:
    mine = [examples[place.example] for place in placements]
    return Answers(
        spans=np.array([(place.first_loss, place.end_loss) for place in placements], np.int32),
        is_call=np.array([-1 if one.kl or one.is_call is None else one.is_call for one in mine], np.int8),
        doubts=np.array([one.doubt for one in mine], np.float32),
    )
