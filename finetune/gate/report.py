"""A decision as a page of Markdown: outcome and reasons first, then the tests, the guards and all scores.

For people; machines read `Decision.to_json`. Percentages with 95 % intervals; "–" is no trace.
"""

from collections.abc import Sequence

from finetune.gate.decision import Decision
from finetune.gate.intervals import Estimate
from finetune.gate.metrics import TOKEN_LOSS, Compared


def report(decision: Decision) -> str:
    against = decision.opponent + ("" if decision.has_live else " (the base: no version is live)")
    lines = [
        f"## {decision.candidate} against {against}: {decision.outcome.replace('_', ' ')}",
        "",
        *(f"- {reason}" for reason in decision.reasons),
        "",
        f"{decision.num_clusters} fresh labelled clusters, {decision.num_call_clusters} of them with a trace that "
        f"expects a call, {decision.num_none_clusters} with one that expects none; {decision.num_traces} traces. "
        f"Left out: {decision.num_stale_traces} known to an earlier decision. "
        f"Reported apart: {decision.num_other_traces} not gold.",
        "",
    ]
    if decision.is_tested:
        lines += [*_tests(decision), "", *_guards(decision), "", *_scores(decision.scores)]
    return "\n".join(lines).rstrip() + "\n"


def _tests(decision: Decision) -> list[str]:
    assert decision.primary is not None
    first, second = decision.primary, decision.second
    rows = [
        ("test", "estimate", "lower bound", "p", "level", "passed"),
        (
            f"balanced accuracy ({first.num_better} clusters better, {first.num_worse} worse)",
            _points(first.difference),
            _points(first.lower),
            f"{first.p_value:.3g}",
            f"{first.level:.3g}",
            _yes(first.is_passed),
        ),
    ]
    if second is not None:
        assert decision.level is not None
        lower = f"{_points(second.lower)} (at 95 %: {_points(second.lower_95)})"
        loss = f"{-second.loss.mean:+.4f}"
        level = f"{decision.level.second:.3g}"
        rows += [
            ("second route: token loss", loss, "", f"{second.loss.p_value:.3g}", level, _yes(second.is_passed)),
            ("second route: accuracy not lower", _points(second.accuracy_difference), lower, "", "", ""),
        ]
    return _table(rows)


def _guards(decision: Decision) -> list[str]:
    rows = [("guard", "value", "limit", "binds", "kept")]
    for guard in decision.guards:
        value = "not measured" if guard.value is None else f"{100 * guard.value:.1f} %"
        limit = f"{'at most' if guard.is_upper else 'at least'} {100 * guard.limit:.1f} %"
        rows.append((guard.name, value, limit, _yes(guard.is_binding), _yes(guard.is_kept)))
    return _table(rows)


def _scores(scores: Sequence[Compared]) -> list[str]:
    rows = [("traces", "metric", "n", "candidate", "opponent", "difference")]
    for row in scores:
        show = _nats if row.metric == TOKEN_LOSS else _percent
        count = str(row.candidate.num_traces)
        sides = (show(row.candidate), show(row.opponent), show(row.difference, is_signed=True))
        rows.append((row.group, row.metric.replace("_", " "), count, *sides))
    return _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _percent(estimate: Estimate, *, is_signed: bool = False) -> str:
    return _interval(estimate, 100.0, "+.1f" if is_signed else ".1f")


def _nats(estimate: Estimate, *, is_signed: bool = False) -> str:
    return _interval(estimate, 1.0, "+.4f" if is_signed else ".4f")


def _interval(estimate: Estimate, scale: float, form: str) -> str:
    if estimate.value is None:
        return "–"
    if estimate.lower is None or estimate.upper is None:
        return f"{scale * estimate.value:{form}}"
    return f"{scale * estimate.value:{form}} [{scale * estimate.lower:{form}}, {scale * estimate.upper:{form}}]"


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
