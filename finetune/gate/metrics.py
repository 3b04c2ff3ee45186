"""The numbers of a gate: each metric for candidate and opponent, with 95 % intervals, by kind of label and tool.

The denominator is what was expected, never what was done: exactly-right, well-formed and right-tool over the traces
that expected a call, no-call accuracy over those that expected none, balanced accuracy the mean of exactly-right and
no-call. So a version that always calls has 0 in one half, one that never calls in the other. Gold decides; traces with
other labels make groups of their own. Not here: tests (statistics.py) and thresholds (decision.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.gate.intervals import NOTHING, Estimate, balanced, mean_of, share_of
from finetune.gate.results import GOLD, Judged, Label, PairedTrace
from finetune.gate.statistics import balanced_weights, half_width

ONE_SIDED_95 = 0.975
"""The level of either end of a two-sided 95 % interval."""

BALANCED, NO_CALL, CALLED, TOKEN_LOSS = "balanced_accuracy", "no_call", "called", "token_loss"
CALL_METRICS: dict[str, Callable[[Judged], bool]] = {
    "exactly_right": lambda judged: judged.is_right,
    "well_formed": lambda judged: judged.is_well_formed,
    "right_tool": lambda judged: judged.is_right_tool,
    CALLED: lambda judged: judged.has_call,
}
"""Over the traces that expect a call."""

ALL, SEEN, UNSEEN = "gold", "gold, tools seen", "gold, tools unseen"


@dataclass(frozen=True, slots=True)
class Compared:
    """One metric over one group of traces."""

    group: str
    metric: str
    candidate: Estimate
    opponent: Estimate
    difference: Estimate
    """Candidate minus opponent, trace by trace."""


def compare(traces: Sequence[PairedTrace]) -> tuple[Compared, ...]:
    """All groups that have traces; gold first."""
    gold = [trace for trace in traces if trace.is_gold]
    groups = {
        ALL: gold,
        SEEN: [trace for trace in gold if trace.is_seen],
        UNSEEN: [trace for trace in gold if not trace.is_seen],
    }
    for label in Label:
        if label not in GOLD:
            groups[f"not gold: {label}"] = [trace for trace in traces if trace.label is label]
    return tuple(row for name, group in groups.items() if group for row in _compare_group(name, group))


def _compare_group(group: str, traces: Sequence[PairedTrace]) -> list[Compared]:
    calls = [trace for trace in traces if trace.expects_call]
    none = [trace for trace in traces if not trace.expects_call]
    rows = [_row(group, name, calls, of_judged) for name, of_judged in CALL_METRICS.items()]
    no_call = _row(group, NO_CALL, none, lambda judged: judged.is_right)
    both = Compared(
        group,
        BALANCED,
        balanced(rows[0].candidate, no_call.candidate),
        balanced(rows[0].opponent, no_call.opponent),
        _difference(traces, lambda judged: judged.is_right) if calls and none else NOTHING,
    )
    return [both, rows[0], no_call, *rows[1:], _loss_row(group, traces)]


def _row(group: str, metric: str, traces: Sequence[PairedTrace], of_judged: Callable[[Judged], bool]) -> Compared:
    if not traces:
        return Compared(group, metric, NOTHING, NOTHING, NOTHING)
    clusters = _clusters(traces)
    sides = [np.array([of_judged(judged) for judged in side]) for side in _sides(traces)]
    return Compared(
        group, metric, share_of(sides[0], clusters), share_of(sides[1], clusters), _difference(traces, of_judged)
    )


def _difference(traces: Sequence[PairedTrace], of_judged: Callable[[Judged], bool]) -> Estimate:
    """Balanced over the strata that there are."""
    clusters = _clusters(traces)
    ours, theirs = (np.array([of_judged(judged) for judged in side], float) for side in _sides(traces))
    expects_call = np.array([trace.expects_call for trace in traces])
    weights = balanced_weights(expects_call)
    mean = float(weights @ (ours - theirs))
    half = half_width(weights, clusters, ours - theirs, expects_call, ONE_SIDED_95)
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half), len(traces), int(clusters.max()) + 1)


def _loss_row(group: str, traces: Sequence[PairedTrace]) -> Compared:
    """Over the traces whose expected answer both versions scored."""
    scored = [t for t in traces if t.candidate.token_loss is not None and t.opponent.token_loss is not None]
    clusters = _clusters(scored)
    ours, theirs = (np.array([judged.token_loss for judged in side], float) for side in _sides(scored))
    return Compared(
        group, TOKEN_LOSS, mean_of(ours, clusters), mean_of(theirs, clusters), mean_of(ours - theirs, clusters)
    )


def _sides(traces: Sequence[PairedTrace]) -> tuple[list[Judged], list[Judged]]:
    return [trace.candidate for trace in traces], [trace.opponent for trace in traces]


def _clusters(traces: Sequence[PairedTrace]) -> np.ndarray:
    return np.unique([trace.cluster for trace in traces], return_inverse=True)[1].astype(np.int64)
