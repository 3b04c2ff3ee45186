"""Tool calls of one upstream choice: which call a delta belongs to, and ids that are unique in the world.

Servers differ in how they send a call in pieces: without index, with the same index for every call (Gemini), with the
id repeated or a new one in each piece (old vLLM), with the name late, with the arguments in one piece or as an object.

Ids. Stitching episodes takes a tool call id for a proof, so an id that a server counts (`call_0`) or that has little
chance in it is sent to the client as `call_<24 random>.<upstream's id>`; when the client sends it back, the upstream
gets its own again (some insist: Mistral on 9 characters, Kimi on `functions.name:0`). That needs no memory and outlives
restarts. Ids that look random are kept.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import ServerUnavailableError
from server.openai.protocol.chunks import ToolCallDelta
from server.tools.parser import new_call_id

# Letter next to digit, or lower before upper case: names have few of those, even in camel case, and 24 random
# characters about ten. Missing the mark is harmless: the id is wrapped, or two calls of one key would have to meet.
_CHANGE = re.compile(r"(?<=[A-Za-z])[0-9]|(?<=[0-9])[A-Za-z]|(?<=[a-z])[A-Z]")
_MIN_CHANGES = 6
_WRAPPED = re.compile(r"call_[A-Za-z0-9_-]{24}\.(.+)", re.DOTALL)


def client_id(upstream_id: str | None) -> str:
    """What the client is told."""
    if not upstream_id:
        return new_call_id()
    if len(_CHANGE.findall(upstream_id)) >= _MIN_CHANGES and not _WRAPPED.fullmatch(upstream_id):
        return upstream_id
    return f"{new_call_id()}.{upstream_id}"


def upstream_id(client_id: str) -> str:
    """The inverse, for ids that come back in a history."""
    wrapped = _WRAPPED.fullmatch(client_id)
    return wrapped[1] if wrapped else client_id


def restore_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the upstream's own ids."""
    restored = []
    for message in messages:
        changed = dict(message)
        if changed.get("tool_call_id"):
            changed["tool_call_id"] = upstream_id(changed["tool_call_id"])
        if changed.get("tool_calls"):
            changed["tool_calls"] = [{**call, "id": upstream_id(call["id"])} for call in changed["tool_calls"]]
        restored.append(changed)
    return restored


@dataclass(slots=True, eq=False)
class _Call:
    index: int | None = None
    """As the client is told, from the moment it is: when the name is known."""
    id: str | None = None
    name: str = ""
    arguments: str = ""
    """All of them so far; held back until then."""

    def is_over(self, other_id: str | None, arguments: str) -> bool:
        """Whether a delta with a name and this call's index is another call's: it has another id, or, without one,
        more arguments than fit into one JSON text."""
        if not self.name:
            return False
        if other_id is not None:
            return self.id is not None
        return bool(arguments) and _is_json(self.arguments)


class ToolCalls:
    """The calls of one choice."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        """By the upstream's index, the latest one."""
        self._by_id: dict[str, _Call] = {}
        self._num_told = 0

    def push(self, deltas: Any) -> list[ToolCallDelta]:
        """What the client is told of the upstream's `tool_calls`. Raises ServerUnavailableError for what is none."""
        if deltas is None:
            return []
        if not isinstance(deltas, list) or not all(isinstance(delta, dict) for delta in deltas):
            raise ServerUnavailableError("The upstream sent tool calls that are no list of objects.")
        told = [self._push(delta) for delta in deltas]
        return [delta for delta in told if delta is not None]

    def finish(self) -> None:
        """Raises ServerUnavailableError for a call that never got a name."""
        if self._num_told < len(self._calls):
            raise ServerUnavailableError("The upstream sent a tool call without the name of its function.")

    def _push(self, delta: Mapping[str, Any]) -> ToolCallDelta | None:
        function = delta.get("function")
        function = function if isinstance(function, dict) else {}
        name, arguments = function.get("name"), _arguments(function.get("arguments"))
        name = name if isinstance(name, str) else ""
        call = self._find(delta.get("index"), delta.get("id"), name, arguments)
        call.name = call.name or name
        call.arguments += arguments
        if not call.name:
            return None
        if call.index is None:
            call.index = self._num_told
            self._num_told += 1
            return {
                "index": call.index,
                "id": client_id(call.id),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
        return {"index": call.index, "function": {"arguments": arguments}} if arguments else None

    def _find(self, index: Any, given_id: Any, name: str, arguments: str) -> _Call:
        """The call that a delta goes on with, or a new one."""
        index = index if isinstance(index, int) else None
        given_id = given_id if isinstance(given_id, str) and given_id else None
        by_index = self._by_index.get(index) if index is not None else None
        by_id = self._by_id.get(given_id) if given_id is not None else None
        if index is not None and by_index is None:
            found = None
        elif by_id is not None:
            found = by_id
        elif by_index is not None:
            found = None if name and by_index.is_over(given_id, arguments) else by_index
        elif given_id is not None or name or not self._calls:
            found = None
        else:
            found = self._calls[-1]
        if found is None:
            found = _Call(id=given_id)
            self._calls.append(found)
        found.id = found.id or given_id
        if index is not None:
            self._by_index[index] = found
        if given_id is not None:
            self._by_id[given_id] = found
        return found


def _arguments(value: Any) -> str:
    """JSON text; a server that sends the object itself means its text."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
