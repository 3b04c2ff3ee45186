"""What a conversation shows of its past: digests by which a later request is known as the continuation of a trace.

An *anchor* is the digest of one of three things: a tool call id that we made up (unique in the world, so a proof); an
assistant turn (its text and calls) in its *context*, everything before it but system messages, which agents rewrite at
every turn (the date, retrieved notes): a proof too; and the turn alone, for histories that were trimmed or edited: a
hint, and only when the turn is long enough not to be a common phrase.

Digests cover the API key, so that keys never meet. White space, the order of JSON arguments, reasoning and call ids do
not count in a turn: clients do not keep them. Not here: looking anchors up (episodes.py).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.traces.tool_results import is_error_result

DIGEST_BYTES = 16
MIN_TELLING_LENGTH = 40
"""Characters of a turn that is recognized out of its context. "Hello! How can I help you today?" has 32."""

_EMPTY = b"\0" * DIGEST_BYTES
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Anchor:
    digest: bytes
    kind: Literal["call", "turn", "hint"]
    """A call is one trace's alone; agents with equal pasts (greedy decoding) share their turns; hints prove nothing."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One request's messages, read once."""

    anchors: tuple[Anchor, ...]
    """What the request shows, in order."""
    context: bytes
    """Of the answer to come."""
    group: bytes
    """The first user message and the tools, whatever the key: from it the side is drawn."""
    tool_results: tuple[tuple[str, bool], ...]
    """(tool_call_id, is an error)."""


def read_conversation(
    key_id: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> Conversation:
    anchors: list[Anchor] = []
    results: list[tuple[str, bool]] = []
    context = _EMPTY
    first_user: str | None = None
    for message in messages:
        role = message["role"]
        if role in _SYSTEM:
            continue
        content = normalize_text(message.get("content"))
        if role == "assistant":
            anchors += anchors_of_turn(key_id, message, context)
        elif role == "tool":
            call_id = str(message["tool_call_id"])
            anchors.append(_call_anchor(key_id, call_id))
            results.append((call_id, is_error_result(message)))
        elif role == "user" and first_user is None:
            first_user = content
        context = _digest("message", context, role, content, _normalize_calls(message))
    group = _digest("group", first_user or "", _canonical(tools or []))
    return Conversation(tuple(dict.fromkeys(anchors)), context, group, tuple(results))


def read_prompt(prompt: Any) -> Conversation:
    """A completion's: it shows nothing, for text does not say who wrote which part of it."""
    text = prompt if isinstance(prompt, str) else _canonical(prompt)
    group = _digest("prompt", " ".join(text.split()))
    return Conversation((), group, group, ())


def anchors_of_turn(key_id: str, message: Mapping[str, Any], context: bytes) -> Iterator[Anchor]:
    """The anchors of one assistant message: the same when it is sent back to us as when we answered with it."""
    text = normalize_text(message.get("content")) or normalize_text(message.get("refusal"))
    calls = _normalize_calls(message)
    if text or calls:
        yield Anchor(_digest("turn", key_id, context, text, calls), "turn")
        if len(text) + len(calls) >= MIN_TELLING_LENGTH:
            yield Anchor(_digest("hint", key_id, text, calls), "hint")
    for call in message.get("tool_calls") or ():
        yield _call_anchor(key_id, str(call["id"]))


def normalize_text(content: Any) -> str:
    """A string or a list of text parts as one string with single spaces."""
    if content is None:
        return ""
    if not isinstance(content, str):
        content = "".join(str(part.get("text") or part.get("refusal") or "") for part in content)
    return " ".join(content.split())


def _normalize_calls(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    if not calls:
        return ""
    return _canonical([[call["function"]["name"], _arguments(call["function"].get("arguments"))] for call in calls])


def _arguments(arguments: Any) -> Any:
    """The value that the JSON text stands for; text that is none (a call cut short) as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except ValueError:
        return arguments


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _call_anchor(key_id: str, call_id: str) -> Anchor:
    return Anchor(_digest("call", key_id, call_id), "call")


def _digest(kind: str, *parts: str | bytes) -> bytes:
    """Length-prefixed, so that no two lists of parts run together. Lone surrogates cannot come (body.py refuses)."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=kind.encode())
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
