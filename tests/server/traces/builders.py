"""Makes records as the routes will make them, and plays agents whose requests are answered and logged."""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select

from server.traces.digests import read_conversation
from server.traces.episodes import Episodes
from server.traces.record import Answer, EpisodeRef, Purpose, TraceRecord, new_trace_id
from server.traces.store import TraceStore
from server.traces.tables import episodes, traces

START = datetime(2026, 1, 1, tzinfo=UTC)
Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def assistant(text: str | None, *calls: Message) -> Message:
    return {"role": "assistant", "content": text} | ({"tool_calls": list(calls)} if calls else {})


def call(name: str, arguments: str = "{}", call_id: str | None = None) -> Message:
    call_id = call_id or f"call_{uuid.uuid4().hex}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, content: str) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def make_record(
    messages: Sequence[Message] | None = (user("hello"),), answer: Message | None = None, **changes: Any
) -> TraceRecord:
    """A chat trace in an episode of its own."""
    conversation = read_conversation(changes.get("key_id", ""), messages or (), changes.get("tools"))
    episode = EpisodeRef("ep-" + uuid.uuid4().hex, conversation.group, conversation.context)
    record = TraceRecord(
        id=new_trace_id(),
        response_id="chatcmpl-" + uuid.uuid4().hex,
        created_at=START,
        endpoint="chat",
        requested_model="base",
        messages=messages,
        answers=(Answer(answer or assistant("hi"), "stop", [5, 6, 7]),),
        prompt_token_ids=[1, 2, 3, 4],
        num_prompt_tokens=4,
        num_completion_tokens=3,
        ttft_seconds=0.01,
        duration_seconds=0.5,
        model="base",
        episode=episode,
    )
    return replace(record, **changes)


@dataclass
class Client:
    """Sends requests of one key through `Episodes.resolve` and writes them; `forget` is a restart of the server."""

    store: TraceStore
    key_id: str = ""
    episodes: Episodes = field(init=False)
    num_requests: int = 0

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.episodes = Episodes(self.store.database)

    def ask(
        self,
        messages: Sequence[Message],
        answer: Message,
        *,
        episode: str | None = None,
        key_id: str | None = None,
        purpose: Purpose = "user",
        **changes: Any,
    ) -> TraceRecord:
        key_id = self.key_id if key_id is None else key_id
        conversation = read_conversation(key_id, messages, changes.get("tools"))
        ref = asyncio.run(self.episodes.resolve(key_id, conversation, name=episode, purpose=purpose))
        self.num_requests += 1
        time = START + timedelta(seconds=self.num_requests)
        record = make_record(
            messages, answer, key_id=key_id, episode=ref, purpose=purpose, **({"created_at": time} | changes)
        )
        self.episodes.remember(record)
        self.store.write([record])
        return record

    def episode_of(self, record: TraceRecord) -> str:
        return self.rows()[record.id][0]

    def side_of(self, record: TraceRecord) -> str:
        return self.rows()[record.id][1]

    def rows(self) -> dict[str, tuple[str, str]]:
        """Episode id and side by trace id."""
        query = select(traces.c.id, episodes.c.id, episodes.c.side).select_from(traces.join(episodes))
        with self.store.database.read() as connection:
            return {row[0]: (row[1], row[2]) for row in connection.execute(query)}
