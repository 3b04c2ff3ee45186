"""Error over an adapter's history: which level a decision tests at, and which held-out clusters are fresh.

A decision's level is the budget times 6 / (pi^2 j^2), j - 1 being the number of earlier decisions that tested and did
not promote. The terms add up to the budget, and each is spent by a decision that did not promote at most once, so the
chance of any false promotion ever is within the budget (the argument is in docs/loop.md); a promotion gives its level
back. That needs each p-value to be valid whatever happened before: a decision therefore uses only clusters that are
newer than the last one and whose questions no earlier decision has used, as far as the log still has the traces that it
used: nothing is kept of what was deleted to compare newer questions with. Candidates tuned on the answers or reports of
earlier gates gain nothing by it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from finetune.gate.results import HeldOut

BUDGET_PER_ROUTE = 0.025
"""Of the primary test, and again of the second route: 5 % in all, over the whole history."""


Trace = TypeVar("Trace", bound=HeldOut)


class PastDecision(Protocol):
    """What the history needs of a decision that looked at its traces."""

    @property
    def is_tested(self) -> bool: ...
    @property
    def is_promoted(self) -> bool: ...
    @property
    def newest_position(self) -> int: ...
    @property
    def clusters(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class History:
    """Of one adapter, in the order of its decisions."""

    num_unpromoted: int = 0
    newest_position: int = -1
    """Of any trace that a decision has looked at."""
    used_clusters: frozenset[str] = frozenset()

    def after(self, decision: PastDecision) -> "History":
        """A decision that did not look (not enough evidence) changes nothing: its traces stay fresh."""
        if not decision.is_tested:
            return self
        return History(
            self.num_unpromoted + (not decision.is_promoted),
            max(self.newest_position, decision.newest_position),
            self.used_clusters | frozenset(decision.clusters),
        )

    @property
    def share_of_budget(self) -> float:
        """That the next decision may spend."""
        return 6 / (math.pi * (self.num_unpromoted + 1)) ** 2

    def fresh(self, traces: Iterable[Trace]) -> list[Trace]:
        """Without the clusters that have a trace as old as the last decision, or that one has used."""
        traces = list(traces)
        stale = {trace.cluster for trace in traces if trace.position <= self.newest_position} | self.used_clusters
        return [trace for trace in traces if trace.cluster not in stale]


def history_of(decisions: Iterable[PastDecision]) -> History:
    history = History()
    for decision in decisions:
        history = history.after(decision)
    return history
