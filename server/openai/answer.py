"""One request's answer: found its episode and version, generated, and in the trace log before its last byte is sent.

The chunks come from the backend. Those that end a choice, and the usage, are held back until the record is committed;
so in durable mode an answer that a client has seen whole is in the log, and one that could not be logged has no end.
What the client left, and what failed (here or upstream), is logged as such. Refused requests are no traces.

Not here: the wire's bytes (respond.py), faults of the log (server/traces/log.py), shares and states (server/adapters).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from server.adapters.router import Arm, Route
from server.adapters.service import Routed
from server.adapters.version import Version
from server.backends.base import Backend, Call
from server.metrics import Metrics
from server.openai.access import Caller
from server.openai.assemble import Draft, chat_draft, completion_draft
from server.openai.errors import wire_error
from server.openai.notes import Notes
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.chunks import ChatChunk, CompletionChunk
from server.openai.protocol.completions import CompletionRequest
from server.records import Records
from server.storage.clock import utc_now
from server.tools.well_formed import judge_calls
from server.traces.digests import Conversation, read_conversation, read_prompt
from server.traces.policy import unlogged_reason
from server.traces.record import Answer as AnsweredChoice
from server.traces.record import Endpoint, EpisodeRef, Status, TraceRecord, new_trace_id

Chunk = TypeVar("Chunk", ChatChunk, CompletionChunk)

LONG_HISTORY = 64
"""Messages from which the history is read on a thread: about a millisecond of digests."""

_SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "stop", "seed", "top_k",
    "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids", "max_tokens", "max_completion_tokens",
    "logprobs", "top_logprobs", "parallel_tool_calls", "reasoning_effort", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message", "echo", "best_of",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """What every answer of one server is made with."""

    backend: Backend
    records: Records
    metrics: Metrics
    base_name: str
    """What the base model is called in metrics."""
    offer_shadow: "Callable[[Asked, Version, str], None] | None" = None
    """Takes a request whose answer (the trace with this id) is complete, to run it on a shadow version too."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it came: checked, as the client wrote it, from whom, and with which headers."""

    request: ChatRequest | CompletionRequest
    raw: Mapping[str, Any]
    num_bytes: int
    """Of the body."""
    caller: Caller
    notes: Notes


class Answer(Generic[Chunk]):
    """`headers` are complete when the first chunk comes."""

    def __init__(
        self,
        parts: Parts,
        asked: Asked,
        endpoint: Endpoint,
        draft: Draft,
        generate: Callable[[Call], AsyncGenerator[Chunk, None]],
    ) -> None:
        self.draft = draft
        self.headers: dict[str, str] = {}
        self._parts = parts
        self._asked = asked
        self._endpoint: Endpoint = endpoint
        self._generate: Callable[[Call], AsyncGenerator[Chunk, None]] = generate
        self._trace_id = new_trace_id()
        self._created_at = utc_now()
        self._start = time.perf_counter()
        self._first_chunk: float | None = None
        self._unlogged = unlogged_reason(
            is_enabled=parts.records.is_logging, key_policy=asked.caller.trace_policy, header=asked.notes.log
        )
        self._is_logged = self._unlogged is None

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Raises before the first chunk what the backend, the router or a broken log has against the request."""
        records, notes = self._parts.records, self._asked.notes
        if self._is_logged:
            records.log.check()
        conversation = await self._conversation()
        episode = await records.episodes.resolve(
            self._asked.caller.key_id, conversation, name=notes.episode, purpose=notes.purpose
        )
        async with self._routed(episode.id) as routed:
            call = self._call(routed)
            self.headers = self._headers(routed, episode)
            held: list[Chunk] = []
            try:
                async with aclosing(self._generate(call)) as chunks:
                    async for chunk in chunks:
                        self._add(chunk)
                        if self._is_logged and _is_end(chunk):
                            held.append(chunk)
                        else:
                            yield chunk
            except (GeneratorExit, asyncio.CancelledError):
                self._log_unfinished(routed, call, episode, "cancelled", None)
                raise
            except Exception as error:  # whatever it is: our fault and what has begun are logged; somebody handles it
                has_begun = self._first_chunk is not None or bool(call.completion_token_ids)
                if has_begun or wire_error(error).status >= 500:
                    self._log_unfinished(routed, call, episode, "failed", f"{type(error).__name__}: {error}")
                raise
            if self._is_logged:
                await records.log.append(self._record(routed.route, call, episode, "ok"))
            self._count_calls(routed.route)
            for chunk in held:
                yield chunk
        self._offer_shadow(routed.route)

    def _offer_shadow(self, route: Route) -> None:
        """Whoever wants no trace has no shadow: it would be nothing but one."""
        offer, is_live = self._parts.offer_shadow, self._is_logged and self._asked.notes.purpose == "user"
        if offer is not None and is_live and route.shadow is not None:
            offer(self._asked, route.shadow, self._trace_id)

    async def _conversation(self) -> Conversation:
        raw, key_id = self._asked.raw, self._asked.caller.key_id
        if self._endpoint != "chat":
            return read_prompt(raw["prompt"])
        messages = raw["messages"]
        if len(messages) < LONG_HISTORY:
            return read_conversation(key_id, messages, raw.get("tools"))
        return await asyncio.to_thread(read_conversation, key_id, messages, raw.get("tools"))

    @asynccontextmanager
    async def _routed(self, episode_id: str) -> AsyncIterator[Routed[Any]]:
        adapters = self._parts.records.adapters
        if adapters is None:
            yield Routed(Route(None, None, Arm.BASE), None)
            return
        model = self._asked.request.model
        async with adapters.route(model, episode_id=episode_id, request_id=self._trace_id) as routed:
            yield routed

    def _call(self, routed: Routed[Any]) -> Call:
        metrics, purpose = self._parts.metrics, self._asked.notes.purpose
        label = self._label(routed.route)
        if purpose == "user":
            metrics.count_route(label, routed.route.arm)
            if self._unlogged is not None:
                metrics.count_unlogged(self._unlogged)
        kind: Literal["chat", "completions"] = "chat" if self._endpoint == "chat" else "completions"
        return Call(
            meter=metrics.start_request(kind, label, now=self._start, purpose=purpose),
            handle=routed.handle,
            fingerprint=routed.fingerprint,
            cache_salt=self._asked.caller.cache_salt,
        )

    def _label(self, route: Route) -> str:
        """In metrics."""
        return self._parts.base_name if route.version is None else str(route.version.ref)

    def _count_calls(self, route: Route) -> None:
        raw = self._asked.raw
        if self._asked.notes.purpose == "user" and raw.get("tools") and raw.get("tool_choice") != "none":
            for message, _ in self.draft.messages():
                form = judge_calls(message, raw["tools"])
                self._parts.metrics.count_answer(self._label(route), True, form.num_calls, form.num_malformed)

    def _headers(self, routed: Routed[Any], episode: EpisodeRef) -> dict[str, str]:
        headers = dict(routed.headers)
        if self._is_logged:
            headers |= {"X-Sterna-Trace-Id": self._trace_id, "X-Sterna-Episode": episode.id}
        return headers

    def _add(self, chunk: Chunk) -> None:
        if self._first_chunk is None:
            self._first_chunk = time.perf_counter()
        self.draft.add(chunk)

    def _log_unfinished(
        self, routed: Routed[Any], call: Call, episode: EpisodeRef, status: Status, error: str | None
    ) -> None:
        if self._is_logged:
            self._parts.records.log.submit(self._record(routed.route, call, episode, status, error))

    def _record(
        self, route: Route, call: Call, episode: EpisodeRef, status: Status, error: str | None = None
    ) -> TraceRecord:
        raw, caller, usage = self._asked.raw, self._asked.caller, self.draft.usage
        identity = self._parts.backend.identity
        answers = [
            AnsweredChoice(message, reason, _at(call.completion_token_ids, index))
            for index, (message, reason) in enumerate(self.draft.messages())
        ]
        metadata = raw.get("metadata")
        num_generated = sum(len(ids) for ids in call.completion_token_ids)
        return TraceRecord(
            id=self._trace_id,
            response_id=self.draft.id,
            created_at=self._created_at,
            endpoint=self._endpoint,
            requested_model=self._asked.request.model,
            messages=raw.get("messages"),
            prompt=raw.get("prompt"),
            tools=raw.get("tools") or None,
            tool_choice=raw.get("tool_choice"),
            response_format=raw.get("response_format"),
            sampling={name: raw[name] for name in _SAMPLING_FIELDS if raw.get(name) is not None},
            was_constrained=call.was_constrained,
            answers=answers,
            status=status,
            error=error,
            prompt_token_ids=call.prompt_token_ids,
            num_prompt_tokens=usage["prompt_tokens"] if usage else call.num_prompt_tokens,
            num_completion_tokens=usage["completion_tokens"] if usage else num_generated,
            num_cached_tokens=usage["prompt_tokens_details"]["cached_tokens"] if usage else 0,
            ttft_seconds=None if self._first_chunk is None else self._first_chunk - self._start,
            duration_seconds=time.perf_counter() - self._start,
            model=call.model or identity.model,
            model_digest=identity.model_digest,
            template_digest=identity.template_digest if self._endpoint == "chat" else None,
            tokenizer_digest=identity.tokenizer_digest,
            adapter=route.adapter,
            version=None if route.version is None else str(route.version.ref),
            version_digest=route.digest,
            key_id=caller.key_id,
            user_id=raw.get("safety_identifier") or raw.get("user"),
            session_id=metadata.get("session_id") if metadata else None,
            metadata=metadata,
            purpose=self._asked.notes.purpose,
            num_request_bytes=self._asked.num_bytes,
            episode=episode,
        )


def answer_chat(parts: Parts, asked: Asked) -> Answer[ChatChunk]:
    request = asked.request
    assert isinstance(request, ChatRequest)
    return Answer(parts, asked, "chat", chat_draft(), lambda call: parts.backend.chat(request, call))


def answer_completion(parts: Parts, asked: Asked) -> Answer[CompletionChunk]:
    request = asked.request
    assert isinstance(request, CompletionRequest)
    return Answer(parts, asked, "completions", completion_draft(), lambda call: parts.backend.complete(request, call))


def _is_end(chunk: ChatChunk | CompletionChunk) -> bool:
    """Ends a choice, or is the usage."""
    choices = chunk["choices"]
    return not choices or any(choice["finish_reason"] is not None for choice in choices)


def _at(token_ids: list[Any], index: int) -> Any:
    return token_ids[index] if index < len(token_ids) else None
