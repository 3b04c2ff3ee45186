"""The gate of a round: held-out traces asked of the candidate and of what answers now, judged, decided.

Who the opponent is (the live version, or the base) is written down before the first question, so that a resumed gate
goes on against the same one. What a feedback's `comment` says as `{"accepted": [...]}` (the accepted values of every
call, as in the Berkeley Function Calling Leaderboard) counts as the label; without it the right answer's message does.
Not here: how answers are compared and decided on (finetune/gate), what comes of the decision (promotion.py).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.dataset.render import chat_request
from finetune.dataset.rows import HeldOutRow
from finetune.dataset.shares import MAX_SHARE, MIN_COUNT, key_limit, newest_of_each, scan_limit
from finetune.dataset.snapshot import Snapshot
from finetune.gate.decision import Decision, decide, evidence_of
from finetune.gate.expected import BadLabelError, Expected, expected_from_bfcl, expected_from_message
from finetune.gate.results import Judged, PairedTrace, RegressionScore, judge
from finetune.gate.settings import GateSettings
from finetune.gate.spending import History, history_of
from finetune.rounds.asking import REFUSED, Answer, Answers, Question, ask_all
from finetune.rounds.engine import Done, Task
from finetune.rounds.round import DECISIONS, Round
from finetune.serving.api import ServerApi

ANSWERS = "answers.jsonl"
Regression = Callable[[Task, ServerApi, tuple[str, str]], tuple[RegressionScore, RegressionScore]]
"""Both versions on the general prompts (regression.py)."""


def run_gate(
    task: Task,
    api: ServerApi,
    snapshot: Snapshot,
    earlier: Iterable[Round],
    *,
    settings: GateSettings,
    max_tokens: int,
    max_traces: int,
    concurrency: int,
    regression: Regression | None = None,
) -> Done:
    """Raises RefusedError and ServerDownError."""
    candidate = task.round.version_ref
    assert candidate is not None
    opponent, has_live = _opponent(task, api)
    models, history = (str(candidate), opponent), decided(earlier)  # this round's own earlier attempts among them
    with_tools = [row for row in snapshot.held_out() if row.kind != "chat"]
    labelled = [one for row in with_tools if (one := _labelled(row)) is not None]
    # Of a stale trace no answer would count.
    fresh = _newest(_within_shares(history.fresh(labelled), max_traces), max_traces)
    scores = None
    if evidence_of(fresh, history).missing(settings):  # nothing is asked: the traces stay fresh
        pairs = [_pair(one, _UNANSWERED, _UNANSWERED, ()) for one in fresh]
    else:
        answers = Answers(task.folder / ANSWERS)
        questions = [_question(one.row, max_tokens) for one in fresh]
        ask_all(api, answers, questions, models, concurrency=concurrency, check=task.check, progress=task.progress)
        if regression is not None:
            scores = regression(task, api, models)
        pairs = []
        for one in fresh:
            given = [answers.of(model, one.row.id) for model in models]
            if not any(answer.finish_reason == REFUSED for answer in given):
                ours, theirs = (_judged(one, answer) for answer in given)
                pairs.append(_pair(one, ours, theirs, snapshot.manifest.tools))
    decision = decide(
        pairs,
        adapter=task.round.ref.adapter,
        candidate=str(candidate),
        opponent=opponent,
        has_live=has_live,
        history=history,
        regression=scores,
        settings=settings,
    )
    facts = {
        "outcome": str(decision.outcome),
        "num_traces": len(fresh),
        "num_left_out": len(labelled) - len(fresh),
        "num_bad_labels": len(with_tools) - len(labelled),
        "num_refused": len(fresh) - len(pairs),
    }
    return Done(facts, {"decision": json.loads(decision.to_json())})


def decided(earlier: Iterable[Round]) -> History:
    """What the adapter's rounds have spent, oldest first."""
    found = []
    for one in sorted(earlier, key=lambda one: one.ref.number):
        found += one.facts["begin"].get(DECISIONS, [])
        found += [] if one.decision is None else [one.decision]
    return history_of(map(_decision, found))


def decision_of(round: Round) -> Decision:
    return _decision(round.decision)


def _decision(kept: Mapping[str, Any] | None) -> Decision:
    return Decision.from_json(json.dumps(kept))


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A held-out trace, before anybody has answered it again."""

    row: HeldOutRow
    expected: Expected

    @property
    def cluster(self) -> str:
        return self.row.cluster

    @property
    def position(self) -> int:
        return self.row.seq

    @property
    def expects_call(self) -> bool:
        return bool(self.expected)

    @property
    def is_gold(self) -> bool:
        return self.row.is_gold

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return self.row.request.get("tools") or ()


def _within_shares(traces: Sequence[_Labelled], budget: int) -> list[_Labelled]:
    """In their order. No key gives more than its share of the gold that will be asked: who may say what is right of the
    own traces is not to be the only judge."""
    gold = [one for one in traces if one.is_gold]
    counts = Counter(one.row.key_id for one in gold)
    limit = min(
        key_limit(counts, max_share=MAX_SHARE, min_count=MIN_COUNT),
        scan_limit(len(counts), budget, max_share=MAX_SHARE, min_count=MIN_COUNT),
    )
    kept = newest_of_each(gold[::-1], lambda one: one.row.key_id, limit)
    return sorted([*kept, *(one for one in traces if not one.is_gold)], key=lambda one: one.position)


def _newest(traces: Sequence[_Labelled], limit: int) -> list[_Labelled]:
    """Gold first, which alone decides; in their order."""
    gold = [one for one in traces if one.is_gold][-limit:]
    others = [one for one in traces if not one.is_gold]
    room = limit - len(gold)
    return sorted([*gold, *others[max(len(others) - room, 0) :]], key=lambda one: one.position)


_UNANSWERED = Judged(False, False, False, False)
"""Stands for nothing: only which pairs there are may be looked at."""


def _labelled(row: HeldOutRow) -> _Labelled | None:
    """None: a label that nothing can be judged by."""
    try:
        return _Labelled(row, expected_of(row))
    except (BadLabelError, RecursionError):  # as deep as a client likes
        return None


def _question(row: HeldOutRow, max_tokens: int) -> Question:
    request = chat_request(row.request).model_dump(
        mode="json", exclude={"model"}, exclude_unset=True, exclude_none=True
    )
    return Question(row.id, request, max_tokens, [*row.prompt_ids, *row.answer_ids], len(row.answer_ids))


def _judged(one: _Labelled, answer: Answer) -> Judged:
    return judge(answer.message, one.expected, one.tools, token_loss=answer.token_loss)


def _pair(one: _Labelled, ours: Judged, theirs: Judged, known_tools: Iterable[str]) -> PairedTrace:
    about = {call.name for call in one.expected} or {tool["function"]["name"] for tool in one.tools}
    return PairedTrace(
        trace_id=one.row.id,
        cluster=one.cluster,
        position=one.position,
        label=one.row.label,
        expects_call=one.expects_call,
        is_seen=about <= frozenset(known_tools),
        candidate=ours,
        opponent=theirs,
    )


def expected_of(row: HeldOutRow) -> Expected:
    """Raises BadLabelError."""
    for given in reversed(row.feedback):
        if given["source"] != row.source:
            continue  # what an answer is judged by comes from whom its label comes from, not from any user's comment
        accepted = _accepted(given.get("comment"))
        if accepted is not None:
            return expected_from_bfcl(accepted)
        if given.get("correction") is not None:
            break  # a newer right answer than those whose accepted values come before it
    return expected_from_message(row.target)


def _accepted(comment: str | None) -> Any:
    """A comment that is no such object is a comment."""
    if not comment or not comment.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(comment)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, Mapping) or "accepted" not in value:
        return None
    accepted = value["accepted"]
    if not isinstance(accepted, list) or not all(isinstance(call, Mapping) for call in accepted):
        raise BadLabelError("'accepted' is a list of expected calls")
    return accepted


def _opponent(task: Task, api: ServerApi) -> tuple[str, bool]:
    """Its name, and whether it is a live version."""
    known = task.round.facts.get("gate", {})
    if "opponent" not in known:
        live = api.adapter(task.round.ref.adapter)["live"]
        known = task.note({"opponent": live or api.base_name(), "has_live": live is not None}).facts["gate"]
    return known["opponent"], known["has_live"]
