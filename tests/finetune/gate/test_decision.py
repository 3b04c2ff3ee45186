"""The decision: what is promoted, rejected or left open, how the history binds it, and that nothing is lost in JSON."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from finetune.gate.decision import Decision, Outcome, decide, evidence_of
from finetune.gate.metrics import ALL, BALANCED, NO_CALL, SEEN, TOKEN_LOSS, UNSEEN, compare
from finetune.gate.report import report
from finetune.gate.results import Judged, Label, PairedTrace, RegressionScore
from finetune.gate.settings import GateSettings
from finetune.gate.spending import History, history_of
from tests.finetune.gate.make import KEPT, judged, pair, pairs_table

BETTER = pairs_table((40, 40, 2, 18), (45, 4, 1, 0))
EQUAL = pairs_table((60, 8, 8, 24), (45, 2, 2, 1))


def gate(
    traces: list[PairedTrace],
    *,
    has_live: bool = True,
    history: History | None = None,
    regression: tuple[RegressionScore, RegressionScore] | None = KEPT,
    settings: GateSettings | None = None,
) -> Decision:
    return decide(
        traces,
        adapter="tools",
        candidate="tools@2",
        opponent="tools@1",
        has_live=has_live,
        history=history or History(),
        regression=regression,
        settings=settings,
    )


def silenced(traces: list[PairedTrace]) -> list[PairedTrace]:
    """A candidate that never calls."""
    never = {True: Judged(False, False, False, False), False: judged(True, expects_call=False)}
    return [replace(trace, candidate=never[trace.expects_call]) for trace in traces]


def talkative(traces: list[PairedTrace]) -> list[PairedTrace]:
    """A candidate that always calls, and rightly wherever a call is right."""
    return [replace(t, candidate=judged(t.expects_call, expects_call=t.expects_call)) for t in traces]


def test_a_better_candidate_is_promoted_and_an_equal_one_is_not() -> None:
    decision = gate(BETTER)
    assert decision.outcome is Outcome.PROMOTE
    assert decision.primary is not None
    assert decision.second is None  # only if the primary test fails
    assert gate(EQUAL).outcome is Outcome.REJECT


@pytest.mark.parametrize("has_live", [True, False])
def test_always_calling_and_never_calling_both_fail(has_live: bool) -> None:
    for broken in (silenced(EQUAL), talkative(EQUAL)):
        rows = {row.metric: row for row in compare(broken) if row.group == ALL}
        assert rows[BALANCED].candidate.value == 0.5
        assert gate(broken, has_live=has_live).outcome is Outcome.REJECT


def test_the_plain_recipe_is_rejected_for_what_it_broke() -> None:
    # The base answers nothing in the right form and never calls; the candidate gets all calls right and calls always.
    base = pairs_table((0, 90, 0, 10), (50, 0, 0, 0))
    decision = gate(talkative(base), has_live=False, regression=None)
    assert decision.outcome is Outcome.REJECT
    assert any(reason.startswith("no_call is 0.0 %, limit 80.0 %") for reason in decision.reasons)
    assert gate(base, has_live=False, regression=None).outcome is Outcome.PROMOTE


def test_the_denominator_is_what_was_expected() -> None:
    rows = {row.metric: row for row in compare(silenced(EQUAL)) if row.group == ALL}
    assert rows["well_formed"].candidate.value == 0.0
    assert rows["well_formed"].candidate.num_traces == 100
    assert rows["right_tool"].candidate.value == 0.0
    assert rows[NO_CALL].candidate.value == 1.0
    assert rows[NO_CALL].candidate.num_traces == 50


def test_under_a_hundred_clusters_nothing_is_looked_at() -> None:
    decision = gate(BETTER[:79] + BETTER[-20:])
    assert decision.outcome is Outcome.NOT_ENOUGH_EVIDENCE
    assert decision.reasons == (
        "99 fresh labelled episode clusters, 100 are needed",
        "20 of them with a trace that expects none, 25 are needed",
    )
    assert decision.scores == ()
    assert decision.primary is None
    history = History(num_unpromoted=2)
    assert history.after(decision) is history
    # Many traces of few episodes are few.
    few = [replace(trace, cluster=f"c{i % 60}") for i, trace in enumerate(BETTER)]
    assert gate(few).num_clusters == 60
    assert gate(few).outcome is Outcome.NOT_ENOUGH_EVIDENCE


def test_only_gold_decides_the_rest_is_reported_apart() -> None:
    thumbs = [replace(trace, label=Label.THUMBS) for trace in BETTER]
    assert gate(thumbs).outcome is Outcome.NOT_ENOUGH_EVIDENCE
    moved = [replace(t, cluster=f"o{t.cluster}", label=Label.CORRECTION) for t in BETTER]
    decision = gate([*EQUAL, *moved])
    assert decision.outcome is Outcome.REJECT
    assert decision.primary == gate(EQUAL).primary
    assert decision.num_other_traces == len(moved)
    groups = {row.group: row for row in decision.scores if row.metric == BALANCED}
    assert set(groups) == {ALL, SEEN, "not gold: correction"}
    assert groups["not gold: correction"].difference.value == gate(BETTER).primary.difference  # type: ignore[union-attr]


def test_seen_and_unseen_tools_are_told_apart() -> None:
    traces = [replace(trace, is_seen=i % 2 == 0) for i, trace in enumerate(BETTER)]
    counts = {row.group: row.candidate.num_traces for row in compare(traces) if row.metric == BALANCED}
    assert counts[SEEN] + counts[UNSEEN] == counts[ALL] == 150


def test_floors_bind_without_a_live_version_margins_with_one() -> None:
    # 38 of 50 no-calls: under the floor of 80 %, but no worse than the live version's 38.
    traces = pairs_table((40, 40, 2, 18), (38, 0, 0, 12))
    assert gate(traces, has_live=False).outcome is Outcome.REJECT
    assert gate(traces, has_live=True).outcome is Outcome.PROMOTE
    # 44 of 50 after 48: over the floor, but 8 points down.
    traces = pairs_table((40, 40, 2, 18), (44, 0, 4, 2))
    assert gate(traces, has_live=False).outcome is Outcome.PROMOTE
    decision = gate(traces, has_live=True)
    assert decision.outcome is Outcome.REJECT
    assert any("no_call, change is -8.0 %, limit -5.0 %" in reason for reason in decision.reasons)


def test_a_margin_is_kept_to_the_last_trace() -> None:
    settings = GateSettings(max_no_call_drop=0.08)
    assert gate(pairs_table((40, 40, 2, 18), (44, 0, 4, 2)), settings=settings).outcome is Outcome.PROMOTE


def test_the_regression_set_binds_from_the_second_version_on() -> None:
    worse = (RegressionScore(11.0, 0.9, 50), RegressionScore(10.0, 0.9, 50))
    assert gate(BETTER, regression=worse).outcome is Outcome.REJECT
    assert gate(BETTER, regression=worse, has_live=False).outcome is Outcome.PROMOTE
    untidy = (RegressionScore(10.0, 0.8, 50), RegressionScore(10.0, 0.9, 50))
    assert gate(BETTER, regression=untidy).outcome is Outcome.REJECT
    missing = gate(BETTER, regression=None)
    assert missing.outcome is Outcome.REJECT
    assert "regression set was not measured, limit 0.0 %" in missing.reasons


def with_losses(traces: list[PairedTrace], gain: float) -> list[PairedTrace]:
    rng = np.random.default_rng(1)
    return [
        replace(
            trace,
            candidate=replace(trace.candidate, token_loss=1 - gain + noise),
            opponent=replace(trace.opponent, token_loss=1.0),
        )
        for trace, noise in zip(traces, rng.normal(0, 0.3, len(traces)), strict=True)
    ]


def test_the_second_route_needs_lower_loss_and_accuracy_that_is_not_lower() -> None:
    equal = pairs_table((270, 6, 6, 118), (195, 2, 2, 1))
    decision = gate(with_losses(equal, 0.2))
    assert decision.outcome is Outcome.PROMOTE
    assert decision.second is not None
    assert decision.second.is_passed
    assert decision.second.lower < decision.second.lower_95 < 0
    assert not gate(with_losses(equal, 0.0)).second.is_passed  # type: ignore[union-attr]
    worse = pairs_table((260, 6, 46, 88), (195, 2, 2, 1))
    decision = gate(with_losses(worse, 0.2))
    assert decision.outcome is Outcome.REJECT
    assert decision.second is not None
    assert decision.second.loss.p_value < 0.001
    assert decision.second.lower < -0.05
    assert gate(equal).second.loss.p_value == 1.0  # type: ignore[union-attr]
    assert {row.metric for row in gate(equal).scores} >= {TOKEN_LOSS}


def test_levels_fall_with_each_decision_that_does_not_promote_and_add_up_to_the_budget() -> None:
    first = gate(EQUAL)
    assert first.level is not None
    assert first.level.primary == pytest.approx(0.025 * 6 / math.pi**2)
    history = History().after(first)
    assert history.num_unpromoted == 1
    later = [replace(trace, cluster=f"b{i}", position=1000 + i) for i, trace in enumerate(BETTER)]
    second = gate(later, history=history)
    assert second.level is not None
    assert second.level.primary == pytest.approx(first.level.primary / 4)
    assert second.outcome is Outcome.PROMOTE
    assert history_of([first, second]).num_unpromoted == 1
    spent = sum(History(num_unpromoted=k).share_of_budget for k in range(100_000))
    assert spent == pytest.approx(1, abs=1e-5)
    assert spent < 1


def test_what_a_decision_has_used_is_stale_for_the_next() -> None:
    first = gate(EQUAL)
    history = History().after(first)
    assert gate(BETTER, history=history).num_stale_traces == len(BETTER)
    # Newer traces of questions that were used, and older traces of new ones.
    repeated = [replace(trace, position=1000 + trace.position) for trace in BETTER]
    assert gate(repeated, history=history).outcome is Outcome.NOT_ENOUGH_EVIDENCE
    older = [replace(trace, cluster=f"new-{trace.cluster}") for trace in BETTER]
    assert gate(older, history=history).outcome is Outcome.NOT_ENOUGH_EVIDENCE
    fresh = [replace(trace, position=1000 + trace.position) for trace in older]
    assert gate(fresh, history=history).outcome is Outcome.PROMOTE
    # One old trace makes its whole cluster stale.
    mixed = [*fresh, replace(fresh[0], trace_id="old", position=0)]
    assert len(evidence_of(mixed, history).traces) == len(fresh) - 1


def test_what_was_looked_at_without_gold_is_stale_once_a_label_comes() -> None:
    corrected = [replace(trace, label=Label.CORRECTION, cluster=f"corrected-{trace.cluster}") for trace in BETTER]
    history = History().after(gate([*EQUAL, *corrected]))
    labelled = [replace(trace, label=Label.KNOWN_ANSWER, position=1000 + trace.position) for trace in corrected]
    assert history.fresh(labelled) == []


def test_decisions_survive_json() -> None:
    for decision in (gate(BETTER), gate(with_losses(EQUAL, 0.1)), gate(BETTER[:10])):
        text = decision.to_json()
        assert Decision.from_json(text) == decision
        assert json.loads(text)["outcome"] == decision.outcome
        assert "NaN" not in text
    with pytest.raises(ValidationError):
        Decision.from_json("{}")


def test_the_report_names_everything_that_decided() -> None:
    text = report(gate(with_losses(EQUAL, 0.1)))
    assert "## tools@2 against tools@1: reject" in text
    for part in ("second route: token loss", "no_call, change", "| gold | exactly right | 100 | 68.0 [", "perplexity"):
        assert part in text
    assert "(the base: no version is live)" in report(gate(BETTER, has_live=False))
    few = report(gate(BETTER[:10]))
    assert "not enough evidence" in few
    assert "| test |" not in few


def test_pairs_of_nothing_are_not_enough() -> None:
    assert gate([]).outcome is Outcome.NOT_ENOUGH_EVIDENCE
    assert pair(1, True, False).is_gold
