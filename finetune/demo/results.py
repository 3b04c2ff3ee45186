"""Before and after, from the gate's own decision: the table with 95 % intervals, and the targets it is held to.

The gate asks the held-out third of base and candidate alike, greedily and unconstrained, so its opponent column is
"before" and its candidate column "after". Several runs are told as mean and range. Not here: judging (finetune/gate),
drawing (picture.py).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.gate.decision import Decision
from finetune.gate.intervals import Estimate
from finetune.gate.metrics import ALL, BALANCED, NO_CALL, SEEN, UNSEEN

GROUPS = {ALL: "all", SEEN: "tools seen", UNSEEN: "tools unseen"}
METRICS = {
    "exactly_right": "exactly right",
    "right_tool": "right tool",
    "well_formed": "well-formed",
    NO_CALL: "no call where none fits",
    BALANCED: "balanced accuracy",
}
TARGETS = {"exactly_right": 0.70, "right_tool": 0.97, NO_CALL: 0.85}
"""Of the loop, on all of the untouched third (issue "The learner", "The demonstration")."""


@dataclass(frozen=True, slots=True)
class Row:
    group: str
    metric: str
    before: Estimate
    after: Estimate
    plain: Estimate | None
    """The plain recipe's, where it was tried."""


def rows_of(decision: Decision, plain: Decision | None) -> list[Row]:
    of_plain = {} if plain is None else {(row.group, row.metric): row.candidate for row in plain.scores}
    return [
        Row(row.group, row.metric, row.opponent, row.candidate, of_plain.get((row.group, row.metric)))
        for row in decision.scores
        if row.group in GROUPS and row.metric in METRICS
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| questions | | n | before | plain recipe | after |", "|---|---|---|---|---|---|"]
    for row in rows:
        plain = "–" if row.plain is None else _percent(row.plain)
        cells = (GROUPS[row.group], METRICS[row.metric], str(row.after.num_traces))
        lines.append("| " + " | ".join([*cells, _percent(row.before), plain, f"**{_percent(row.after)}**"]) + " |")
    return "\n".join(lines) + "\n"


def missed(rows: Sequence[Row]) -> list[str]:
    """Targets that the point estimates do not reach."""
    values = {row.metric: row.after.value for row in rows if row.group == ALL}
    return [
        f"{METRICS[metric]} is {'not measured' if (value := values.get(metric)) is None else f'{value:.1%}'}, "
        f"the target is {target:.0%}"
        for metric, target in TARGETS.items()
        if (values.get(metric) or 0.0) < target
    ]


def regression(decision: Decision) -> tuple[str, list[str]]:
    """(a sentence, what was not kept): general prompts, by the gate's own margins."""
    ours, theirs, limits = decision.regression_candidate, decision.regression_opponent, decision.settings
    if ours is None or theirs is None:
        return "The general prompts were not measured.", ["the general prompts were not measured"]
    rise, drop = ours.perplexity / theirs.perplexity - 1, theirs.format_share - ours.format_share
    told = (
        f"{ours.num_prompts} general prompts: perplexity of the base's answers {theirs.perplexity:.3f} before, "
        f"{ours.perplexity:.3f} after ({rise:+.1%}); asked-for form kept {theirs.format_share:.1%} before, "
        f"{ours.format_share:.1%} after."
    )
    lost = [f"perplexity rose by {rise:.1%}, the limit is {limits.max_perplexity_rise:.0%}"]
    lost = lost if rise > limits.max_perplexity_rise else []
    if drop > limits.max_format_drop:
        lost.append(f"the form of answers fell by {drop:.1%}, the limit is {limits.max_format_drop:.0%}")
    return told, lost


def mean_of_runs(runs: Sequence[Sequence[Row]]) -> str:
    """Markdown: mean over the runs (lowest to highest), for the recorded long run."""
    lines = ["| questions | | before | plain recipe | after |", "|---|---|---|---|---|"]
    by_name = [{(row.group, row.metric): row for row in run} for run in runs]
    for group, metric in by_name[0]:
        same = [run[group, metric] for run in by_name if (group, metric) in run]
        cells = [
            _spread([row.before for row in same]),
            _spread([row.plain for row in same if row.plain is not None]),
            f"**{_spread([row.after for row in same])}**",
        ]
        lines.append("| " + " | ".join([GROUPS[group], METRICS[metric], *cells]) + " |")
    return "\n".join(lines) + "\n"


def _spread(estimates: Sequence[Estimate]) -> str:
    values = [one.value for one in estimates if one.value is not None]
    if not values:
        return "–"
    return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def _percent(estimate: Estimate) -> str:
    if estimate.value is None:
        return "–"
    if estimate.lower is None or estimate.upper is None:
        return f"{estimate.value:.1%}"
    return f"{estimate.value:.1%} [{estimate.lower:.1%}, {estimate.upper:.1%}]"
