"""Sets of words that must stay apart: finds, exactly and quickly, whether a new one is too near to one that is kept.

Two sets with a Jaccard index of at least t have one of their first few members in common, in any fixed order of all
members (prefix filtering: Chaudhuri et al. 2006, Bayardo et al. 2007): of n members the first n - ceil(t n) + 1.
Long words come first here, because they are rare. Only sets that share such a member are compared.
"""

import math
from collections import defaultdict
from collections.abc import Set

import numpy as np

_BLOCK = 256
"""Rows compared with all others at once: 4 MiB for 4,000 sets."""


class DistinctSets:
    """Non-empty sets whose Jaccard index stays below `threshold`."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._sets: list[frozenset[str]] = []
        self._by_member: defaultdict[str, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._sets)

    def near(self, one: frozenset[str]) -> int | None:
        """The number of a kept set that is too near; None: there is none."""
        seen: set[int] = set()
        for member in self._prefix(one):
            for number in self._by_member[member]:
                if number in seen:
                    continue
                seen.add(number)
                if jaccard(one, self._sets[number]) >= self._threshold:
                    return number
        return None

    def add(self, one: frozenset[str]) -> bool:
        """False, and nothing is kept, if it is too near to one that is."""
        if self.near(one) is not None:
            return False
        for member in self._prefix(one):
            self._by_member[member].append(len(self._sets))
        self._sets.append(one)
        return True

    def _prefix(self, one: frozenset[str]) -> list[str]:
        ordered = sorted(one, key=lambda member: (-len(member), member))
        return ordered[: len(one) - math.ceil(self._threshold * len(one)) + 1]


def jaccard(a: Set[str], b: Set[str]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def nearest_pair(sets: list[frozenset[str]]) -> tuple[float, int, int]:
    """The largest Jaccard index of two sets and their numbers, by comparing all pairs: the slow, obvious twin."""
    columns = {member: place for place, member in enumerate(sorted(set().union(*sets)))}
    table = np.zeros((len(sets), len(columns)), np.float32)
    for row, one in enumerate(sets):
        table[row, [columns[member] for member in one]] = 1
    sizes = table.sum(axis=1)
    best = (0.0, 0, 0)
    for start in range(0, len(sets), _BLOCK):
        rows = slice(start, start + _BLOCK)
        common = table[rows] @ table.T
        index = common / (sizes[rows, None] + sizes[None, :] - common)
        index[np.arange(len(sets))[None, :] >= start + np.arange(len(index))[:, None]] = -1  # each pair once
        row, column = divmod(int(index.argmax()), len(sets))
        best = max(best, (float(index[row, column]), column, start + row))
    return best
