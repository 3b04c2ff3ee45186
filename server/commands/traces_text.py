"""A trace as people read it: a row of the list, a transcript, totals. Times are this machine's.

What was said is somebody else's text: control characters and changes of direction are shown escaped, so that none can
play tricks on the terminal.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from server.traces.feedback import StoredFeedback
from server.traces.queries import FullTrace, TraceSummary
from server.units import format_bytes

LIST_HEADER = ("time", "trace", "answered by", "ended", "tokens", "notes")
_TRICKS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Lines and tabs stay."""
    return _TRICKS.sub(lambda found: ascii(found[0])[1:-1], text)


def local_time(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def list_row(trace: TraceSummary) -> tuple[str, ...]:
    """At most 120 columns with the gaps between them."""
    tokens = f"{trace.num_prompt_tokens}+{trace.num_completion_tokens}"
    ended = trace.finish_reason or "" if trace.status == "ok" else trace.status
    notes = [
        *(["tool error"] if trace.has_tool_error else []),
        *(["rated"] if trace.has_feedback else []),
        *(["audit"] if trace.is_audit else []),
        *([trace.purpose] if trace.purpose != "user" else []),
        *([trace.endpoint] if trace.endpoint != "chat" else []),
    ]
    return (
        local_time(trace.created_at), trace.id, _cut(_answered_by(trace), 15), _cut(ended, 10), _cut(tokens, 11),
        _cut(", ".join(notes), 17),
    )  # fmt: skip


def transcript(trace: FullTrace) -> str:
    """Facts, what was asked, every answer, and feedback."""
    return visible("\n".join([*_facts(trace), *_asked(trace), *_answered(trace), *_feedback(trace.feedback)]))


def _facts(trace: FullTrace) -> Iterator[str]:
    summary, details, request = trace.summary, trace.details, trace.request
    marks = [
        text
        for text, holds in (
            (f"purpose {summary.purpose}", summary.purpose != "user"),
            ("constrained", summary.was_constrained),
            ("redacted", summary.is_redacted),
            ("audit sample", summary.is_audit),
        )
        if holds
    ]
    callers = {"key": summary.key_id, "user": summary.user_id, "session": summary.session_id}
    times = {"to the first token": summary.ttft_seconds, "in all": summary.duration_seconds}
    facts = {
        "trace": f"{summary.id}  {local_time(summary.created_at)}  {summary.endpoint}",
        "response": summary.response_id,
        "status": ": ".join(filter(None, (summary.status, details.get("error")))),
        "model": f"{_answered_by(summary)}, asked for as {summary.requested_model}, base {details.get('model')}",
        "episode": f"{summary.episode_id} ({summary.side.replace('_', ' ')})",
        "caller": ", ".join(f"{name} {value}" for name, value in callers.items() if value),
        "tokens": f"{summary.num_prompt_tokens} prompt ({summary.num_cached_tokens} cached), "
        f"{summary.num_completion_tokens} completion",
        "time": ", ".join(f"{value:.3f} s {what}" for what, value in times.items() if value is not None),
        "marks": ", ".join(marks),
        "sampling": _json(request.get("sampling")),
        "tools": ", ".join(tool.get("function", {}).get("name", "?") for tool in request.get("tools", ())),
        "choice": _json(request.get("tool_choice")),
        "format": _json(request.get("response_format")),
        "metadata": _json(details.get("metadata")),
    }
    for name, text in facts.items():
        if text:
            yield f"{name:<9} {text}"


def _asked(trace: FullTrace) -> Iterator[str]:
    for message in trace.request.get("messages", ()):
        yield from _message(message, {})
    if "prompt" in trace.request:
        yield "\n[prompt]"
        prompt = trace.request["prompt"]
        yield prompt if isinstance(prompt, str) else _json(prompt)


def _answered(trace: FullTrace) -> Iterator[str]:
    outcomes = {call.call_id: call.outcome or "no result" for call in trace.tool_calls}
    for index, answer in enumerate(trace.answers):
        number = f" {index}" if len(trace.answers) > 1 else ""
        yield f"\n=== answer{number} ({answer.get('finish_reason') or 'cut short'})"
        yield from _message(answer["message"], outcomes)


def _message(message: Mapping[str, Any], outcomes: Mapping[str, str]) -> Iterator[str]:
    """`outcomes` of tool calls, by id."""
    names = (message.get("role"), message.get("name"), message.get("tool_call_id"))
    yield f"\n[{' '.join(name for name in names if name)}]"
    if message.get("reasoning_content"):
        yield f"(thinks) {message['reasoning_content']}"
    for part in (message.get("content"), message.get("refusal")):
        if part is not None:
            yield part if isinstance(part, str) else "".join(one.get("text", one.get("refusal", "")) for one in part)
    for call in message.get("tool_calls") or ():
        outcome = outcomes.get(call["id"])
        told = f"  {outcome}" if outcome else ""
        yield f"-> {call['function']['name']}({call['function']['arguments']})  {call['id']}{told}"


def _feedback(given: Sequence[StoredFeedback]) -> Iterator[str]:
    if given:
        yield "\n=== feedback"
    for stored in given:
        said = stored.feedback
        words = [f"{local_time(stored.created_at)}  {said.source}", "" if stored.trace_id else "on the episode"]
        words += [f"score {said.score:g}" if said.score is not None else "", said.label or "", said.comment or ""]
        yield "  ".join(word for word in words if word)
        if said.correction is not None:
            yield from _message(said.correction, {})


def total_rows(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value; counts by something are spelled out, the largest first."""
    rows = []
    for name, value in totals.items():
        if isinstance(value, dict):
            counts = sorted(value.items(), key=lambda item: -item[1])
            text = ", ".join(f"{key} {count}" for key, count in counts)
        elif isinstance(value, datetime):
            text = local_time(value)
        elif name == "num_bytes":
            text = format_bytes(value)
        else:
            text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        rows.append((name.removeprefix("num_").replace("_", " "), text))
    return rows


def _answered_by(trace: TraceSummary) -> str:
    return trace.version or ("import" if trace.endpoint == "import" else "base")


def _json(value: Any) -> str:
    """Empty for nothing."""
    return "" if value in (None, {}, []) else json.dumps(value, ensure_ascii=False)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
