"""Record mode's backend: requests go to another OpenAI-compatible server, whose answers are logged as ours would be.

The upstream is always asked to stream and to count (unless it refuses to count), whatever our client wants, so that a
client that leaves frees the upstream's work, and both kinds of answer are put together in one way. Requests go on as
the client gave them: nothing is added, nulls (which mean "not given" here) are left out, and tool call ids are the
upstream's own again. Not here: token ids, templates and grammars, which only the upstream knows; adapters.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from server.backends.base import Call, Health, Identity
from server.backends.generation import measured
from server.backends.upstream_calls import restore_ids
from server.backends.upstream_chunks import ChatAnswer, CompletionAnswer, UpstreamAnswer
from server.backends.upstream_events import DONE, read_objects
from server.backends.upstream_http import UpstreamHttp
from server.errors import ServerUnavailableError, SternaError, UpstreamError
from server.metrics import RequestOutcome
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.chunks import Body, ChatChunk, CompletionChunk
from server.openai.protocol.completions import CompletionRequest
from server.openai.protocol.tokens import DetokenizeRequest, TokenizeRequest

PROBE_SECONDS = 5.0
"""Between two looks whether the upstream is there, made only when somebody asks for our health."""
PROBE_TIMEOUT_SECONDS = 5.0
_USAGE_ONLY = -1
"""To the meter, the choice of tokens that no output brought: their number is known at the end only."""


@dataclass(frozen=True, slots=True)
class UpstreamModel:
    """What the upstream lists."""

    name: str
    max_model_len: int | None = None


class UpstreamBackend:
    """`url` and `api_key` as the settings. Raises ConfigError."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._http = UpstreamHttp(url, api_key)
        self._asks_usage = True
        self._fault: str | None = None
        self._probed_at = -PROBE_SECONDS
        self._probe: asyncio.Task[None] | None = None
        self.identity = Identity(model="upstream")

    @property
    def name(self) -> str:
        """The upstream's host and port."""
        return self._http.name

    @property
    def secrets(self) -> tuple[str, ...]:
        """For the redactor of the trace log."""
        return self._http.secrets

    async def chat(self, request: ChatRequest, call: Call) -> AsyncGenerator[ChatChunk, None]:
        body = _body(request)
        body["messages"] = restore_ids(body["messages"])
        async with aclosing(self._chunks("/chat/completions", body, ChatAnswer(request.model), call)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def complete(self, request: CompletionRequest, call: Call) -> AsyncGenerator[CompletionChunk, None]:
        body = _body(request)
        answer = CompletionAnswer(request.model)
        # The best of several is known when all have ended: servers refuse to stream it.
        streams = (request.best_of or 1) <= (request.n or 1)
        async with aclosing(self._chunks("/completions", body, answer, call, streams=streams)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def tokenize(self, request: TokenizeRequest) -> Body:
        body = _body(request)
        if "messages" in body:
            body["messages"] = restore_ids(body["messages"])
        return await self._http.ask("POST", "/tokenize", body, at_root=True)

    async def detokenize(self, request: DetokenizeRequest) -> Body:
        return await self._http.ask("POST", "/detokenize", _body(request), at_root=True)

    async def models(self) -> list[UpstreamModel]:
        """Raises UpstreamError, ServerUnavailableError."""
        listed = (await self._http.ask("GET", "/models")).get("data")
        if not isinstance(listed, list):
            raise ServerUnavailableError("The upstream's list of models cannot be read.")
        models = []
        for one in listed:
            if isinstance(one, dict) and isinstance(one.get("id"), str):
                length = one.get("max_model_len")
                models.append(UpstreamModel(one["id"], length if isinstance(length, int) else None))
        return models

    def health(self) -> Health:
        """As the last request or look found it; starts the next look, which nobody waits for."""
        now = time.monotonic()
        if now - self._probed_at >= PROBE_SECONDS and (self._probe is None or self._probe.done()):
            self._probed_at = now
            self._probe = asyncio.get_running_loop().create_task(self.probe())
        reason = self._http.fault or self._fault
        return Health(is_ready=reason is None, reason=reason and f"the upstream does not answer: {reason}")

    async def probe(self) -> None:
        """Look whether the upstream is there and takes our key. A server without a list of models is there."""
        fault = None
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                await self.models()
        except TimeoutError:
            fault = f"{self._http.name} lists no models within {PROBE_TIMEOUT_SECONDS:g} s"
        except UpstreamError as error:
            fault = None if error.status < 500 else str(error)
        except SternaError as error:
            fault = str(error)
        self._fault = fault

    async def end_answers(self) -> None:
        """What is under way ends with an error that its client sees."""
        self._http.end()

    async def aclose(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        await self._http.aclose()

    async def _chunks(
        self, path: str, body: dict[str, Any], answer: UpstreamAnswer, call: Call, *, streams: bool = True
    ) -> AsyncGenerator[Any, None]:
        """The one way of every answer. `call.meter` counts outputs as they come and their tokens at the end."""
        stem, is_done = answer.stem, False
        outcome: RequestOutcome = "stop"
        call.model = body["model"]
        with measured(call):
            async with aclosing(self._objects(path, body, streams=streams)) as values:
                async for value in values:
                    if value is DONE:
                        is_done = True
                        break
                    for choice in answer.push(value):
                        call.meter.on_output(0, choice["index"])
                        yield {**answer.head, "choices": [choice]}
                    call.model = stem.model or call.model
                    if stem.usage is not None:
                        call.num_prompt_tokens = stem.usage["prompt_tokens"]
            stem.end(is_done=is_done)
            if stem.usage is not None:
                call.meter.on_output(stem.usage["completion_tokens"], _USAGE_ONLY)
            for choice in answer.finish():
                outcome = "stop" if choice["finish_reason"] == "content_filter" else choice["finish_reason"]
                yield {**answer.head, "choices": [choice]}
            call.meter.finish(outcome, num_prompt_tokens=call.num_prompt_tokens)
        yield {**answer.head, "choices": [], "usage": stem.usage}

    async def _objects(self, path: str, body: dict[str, Any], *, streams: bool) -> AsyncGenerator[Any, None]:
        """The upstream's objects. Where it refuses to count, it is asked again without, now and from now on."""
        while True:
            asks_usage = streams and self._asks_usage
            has_begun = False
            try:
                async with (
                    aclosing(self._http.stream(path, _streaming(body, asks_usage) if streams else body)) as parts,
                    aclosing(read_objects(parts, secrets=self.secrets)) as values,
                ):
                    async for value in values:
                        has_begun = True
                        yield value
                return
            except UpstreamError as error:
                if has_begun or not asks_usage or not _is_about_usage(error):
                    raise
                self._asks_usage = False


def _streaming(body: Mapping[str, Any], asks_usage: bool) -> dict[str, Any]:
    streaming = {**body, "stream": True}
    streaming.pop("stream_options", None)
    if asks_usage:
        streaming["stream_options"] = {**body.get("stream_options", {}), "include_usage": True}
    return streaming


def _is_about_usage(error: UpstreamError) -> bool:
    """A server that does not know the field names it, in one shape or another."""
    return error.status in (400, 422) and "stream_options" in f"{error} {error.param}"


def _body(request: ChatRequest | CompletionRequest | TokenizeRequest | DetokenizeRequest) -> dict[str, Any]:
    """As the client wrote it, without `stream` and top-level nulls."""
    body = request.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {name: value for name, value in body.items() if value is not None and name != "stream"}
