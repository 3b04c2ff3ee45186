"""Judged answers and pairs of them, for the gate's tests."""

from collections.abc import Iterable

import numpy as np

from finetune.gate.results import Judged, Label, PairedTrace, RegressionScore
from finetune.gate.statistics import Pairs

KEPT = (RegressionScore(10.0, 0.9, 50), RegressionScore(10.0, 0.9, 50))


def judged(is_right: bool, *, expects_call: bool = True, loss: float | None = None) -> Judged:
    """A wrong answer to a call is well-formed with the right tool; where none was expected it is a call."""
    return Judged(is_right if not expects_call else True, is_right, True, is_right or expects_call, loss)


def pair(
    number: int,
    candidate: bool,
    opponent: bool,
    *,
    expects_call: bool = True,
    cluster: str | None = None,
    label: Label = Label.KNOWN_ANSWER,
    losses: tuple[float, float] | None = None,
    is_seen: bool = True,
) -> PairedTrace:
    ours, theirs = losses or (None, None)
    return PairedTrace(
        trace_id=f"trace-{number}",
        cluster=cluster or f"cluster-{number}",
        position=number,
        label=label,
        expects_call=expects_call,
        is_seen=is_seen,
        candidate=judged(candidate, expects_call=expects_call, loss=ours),
        opponent=judged(opponent, expects_call=expects_call, loss=theirs),
    )


def pairs_table(
    calls: tuple[int, int, int, int], none: tuple[int, int, int, int] = (0, 0, 0, 0), *, start: int = 0
) -> list[PairedTrace]:
    """Counts of (both right, candidate only, opponent only, neither), one trace a cluster."""
    made: list[PairedTrace] = []
    for expects_call, counts in ((True, calls), (False, none)):
        for count, (ours, theirs) in zip(
            counts, ((True, True), (True, False), (False, True), (False,) * 2), strict=True
        ):
            made += [pair(start + len(made) + i, ours, theirs, expects_call=expects_call) for i in range(count)]
    return made


def arrays(right: Iterable[int], expects_call: Iterable[bool], clusters: Iterable[int] | None = None) -> Pairs:
    values = np.array(list(right))
    numbers = np.arange(len(values)) if clusters is None else np.array(list(clusters))
    return Pairs(numbers, np.array(list(expects_call), bool), values, np.full(len(values), np.nan))
