"""What of a trace may be learned from, or tested on; if nothing, for which reason.

A correction takes the place of the answer, whatever became of it. An answer that nobody judged teaches nothing by
default: a model trained on its own unjudged answers learns its own mistakes. A call that a tool choice forced, or a
silence that it forced, says nothing about when to call. Plain functions of one trace: duplicates, shares and budgets,
which look at several, are the snapshot's (snapshot.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from finetune.dataset.source import LoggedTrace
from server.tools.well_formed import judge_calls
from server.traces.digests import normalize_text
from server.traces.feedback import Feedback


class Drop(StrEnum):
    """Why a trace, or an example of it, is left out."""

    NOT_CHAT = "not_chat"
    REDACTED = "redacted"
    FORCED_TOOL_CHOICE = "forced_tool_choice"
    FORBIDDEN_TOOL_CHOICE = "forbidden_tool_choice"
    CONTINUATION = "continuation"  # the prompt ended inside the answer
    NOT_OK = "not_ok"
    SEVERAL_CHOICES = "several_choices"  # a judgement does not say of which
    TRUNCATED = "truncated"
    LOW_SCORE = "low_score"
    TOOL_ERROR = "tool_error"
    UNLABELLED = "unlabelled"
    UNWEIGHTED = "unweighted"  # imported with "weight": 0
    MALFORMED_CALL = "malformed_call"
    EMPTY = "empty"
    UNRENDERABLE = "unrenderable"
    TOO_LONG = "too_long"
    DUPLICATE = "duplicate"
    NEAR_HELD_OUT = "near_held_out"
    KEY_SHARE = "key_share"
    OVER_BUDGET = "over_budget"
    EXPIRING = "expiring"  # the log's age limit takes it soon: the round would have to begin anew without it
    # Of replayed examples only:
    HELD_OUT_NOW = "held_out_now"
    DELETED = "deleted"
    OTHER_TEMPLATE = "other_template"


RIGHT = 1.0
"""The score of an answer that others are measured against."""

Origin = Literal["served", "correction", "import"]


@dataclass(frozen=True, slots=True)
class Target:
    """One answer to learn, or to be measured against."""

    message: Mapping[str, Any]
    origin: Origin
    source: str
    """Of the feedback that says so (server/traces/feedback.py); "import", or "" where nobody did."""
    num_messages: int
    """Of the request's that come before it: fewer than all for the earlier turns of an import."""
    turn: int = 0


def train_targets(
    trace: LoggedTrace, *, min_score: float, keep_unlabelled: bool = False, all_import_turns: bool = False
) -> list[Target] | Drop:
    """The answers of one trace to learn."""
    reason = _unfit_request(trace)
    if reason is not None:
        return reason
    corrected = _correction(trace)
    if corrected is not None:
        return _checked(trace, [corrected])
    if trace.endpoint == "import":
        return _checked(trace, _imported(trace, all_turns=all_import_turns))
    reason = _unfit_answer(trace)
    if reason is not None:
        return reason
    judged = latest_score(trace)
    if judged is None:
        if trace.has_tool_error:
            return Drop.TOOL_ERROR
        if not keep_unlabelled:
            return Drop.UNLABELLED
    elif judged.score is not None and judged.score < min_score:
        return Drop.LOW_SCORE
    return _checked(trace, [_served(trace, "" if judged is None else judged.source)])


def held_out_target(trace: LoggedTrace) -> Target | Drop:
    """The right answer of one held-out trace: a correction, an import, or the answer where it was judged right.

    What was found independently of the answer comes before what its user thought of it.
    """
    independent = [one for one in trace.feedback if one.source in ("known_answer", "audit_sample")]
    if any(one.correction is not None or one.score is not None for one in independent):
        trace = replace(trace, feedback=independent)
    found = train_targets(trace, min_score=RIGHT)
    return found if isinstance(found, Drop) else found[0]


def rejected_answer(trace: LoggedTrace, target: Target) -> Mapping[str, Any] | None:
    """What was served where a correction says otherwise: the worse half of a preference pair."""
    if target.origin != "correction" or trace.endpoint != "chat" or _unfit_answer(trace) is not None:
        return None
    served: Mapping[str, Any] = trace.answers[0]["message"]
    return None if canonical_answer(served) == canonical_answer(target.message) else served


def latest_score(trace: LoggedTrace) -> Feedback | None:
    """The trace's own latest judgement; without one, its episode's."""
    for given in (trace.feedback, trace.episode_feedback):
        scored = [one for one in given if one.score is not None]
        if scored:
            return scored[-1]
    return None


def question_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What near-duplicates are compared by: all that users said. The rest of an agent's prompt is boilerplate."""
    return "\n".join(normalize_text(message.get("content")) for message in messages if message["role"] == "user")


def canonical_answer(message: Mapping[str, Any]) -> str:
    """Equal for answers that say the same: ids, order of arguments and white space around the text do not count."""
    calls = [
        [call["function"]["name"], _loaded(call["function"]["arguments"])] for call in message.get("tool_calls") or ()
    ]
    text = normalize_text(message.get("content")) or normalize_text(message.get("refusal"))
    return json.dumps([text, calls], sort_keys=True, separators=(",", ":"))


def _unfit_request(trace: LoggedTrace) -> Drop | None:
    request = trace.request
    if trace.endpoint not in ("chat", "import") or not request.get("messages"):
        return Drop.NOT_CHAT
    if trace.is_redacted:
        return Drop.REDACTED
    choice = request.get("tool_choice")
    if request.get("tools") and choice not in (None, "auto"):
        return Drop.FORBIDDEN_TOOL_CHOICE if choice == "none" else Drop.FORCED_TOOL_CHOICE
    sampling = request.get("sampling") or {}
    if sampling.get("continue_final_message") or sampling.get("add_generation_prompt") is False:
        return Drop.CONTINUATION
    return None


def _unfit_answer(trace: LoggedTrace) -> Drop | None:
    if trace.status != "ok":
        return Drop.NOT_OK
    if len(trace.answers) != 1:
        return Drop.SEVERAL_CHOICES
    if trace.answers[0].get("finish_reason") not in ("stop", "tool_calls"):
        return Drop.TRUNCATED
    return None


def _correction(trace: LoggedTrace) -> Target | None:
    given = [one for one in trace.feedback if one.correction is not None]
    if not given:
        return None
    assert given[-1].correction is not None
    return Target(given[-1].correction, "correction", given[-1].source, len(trace.request["messages"]))


def _served(trace: LoggedTrace, source: str) -> Target:
    return Target(trace.answers[0]["message"], "served", source, len(trace.request["messages"]))


def _imported(trace: LoggedTrace, *, all_turns: bool) -> list[Target]:
    """The line's last message; with `all_turns` every assistant message in it, each after what came before it."""
    messages = [*trace.request["messages"], trace.answers[0]["message"]]
    last = len(messages) - 1
    return [
        Target(message, "import", "import", place, place)
        for place, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight") != 0 and (place == last or (all_turns and place))
    ]


def _checked(trace: LoggedTrace, targets: Sequence[Target]) -> list[Target] | Drop:
    if not targets:
        return Drop.UNWEIGHTED
    tools = trace.request.get("tools") or ()
    for target in targets:
        message = target.message
        if not message.get("tool_calls") and not normalize_text(message.get("content") or message.get("refusal")):
            return Drop.EMPTY
        if judge_calls(_flat(message), tools).num_malformed:
            return Drop.MALFORMED_CALL
        if "[redacted" in json.dumps(message, ensure_ascii=False):
            return Drop.REDACTED  # feedback is redacted too, and does not say where
    return list(targets)


def _flat(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """`judge_calls` takes messages as they are served: their content is text."""
    return {**message, "content": normalize_text(message.get("content"))}


def _loaded(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments
