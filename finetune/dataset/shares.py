"""How many examples one API key may give: a key that floods the log must not become the adapter's only teacher, nor, of
held-out labels, its only judge.

With one key there is nothing to share. With several, no key gives more than `max_share` of all that is kept, but every
key may give `min_count`: without that floor, a key with three traces would cut one with thousands down to three.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

One = TypeVar("One")

MAX_SHARE = 0.5
MIN_COUNT = 200


def scan_limit(num_keys: int, budget: int, *, max_share: float, min_count: int) -> int:
    """Of one key while the newest traces are collected, so that a flood does not use up the budget of `budget`."""
    return budget if num_keys < 2 else min(budget, max(min_count, int(max_share * budget)))


def key_limit(counts: Mapping[str, int], *, max_share: float, min_count: int) -> int:
    """The largest limit on every key with which none has more than its share of what all keep then."""
    limit = max(counts.values(), default=0)
    if len(counts) < 2:
        return limit
    while True:
        total = sum(min(count, limit) for count in counts.values())
        allowed = max(min_count, int(max_share * total))
        if allowed >= limit:
            return limit
        limit = allowed


def newest_of_each(newest_first: Sequence[One], key_of: Callable[[One], str], limit: int) -> list[One]:
    """At most `limit` of each key, in their order."""
    counts: Counter[str] = Counter()
    chosen = []
    for one in newest_first:
        counts[key_of(one)] += 1
        if counts[key_of(one)] <= limit:
            chosen.append(one)
    return chosen
