"""What answers an OpenAI request. One implementation a module: `native` (our engine), later `vllm` (over HTTP).

A backend speaks OpenAI wire objects, not tokens, because vLLM keeps its own templates and parsers. It yields the
chunks of a streamed answer even when the caller wants one body: the routes put them together, so a streamed and an
unstreamed answer cannot differ. Not here: HTTP, routing by model name, API keys.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.chunks import Body, ChatChunk, CompletionChunk
from server.openai.protocol.completions import CompletionRequest
from server.openai.protocol.tokens import DetokenizeRequest, TokenizeRequest


@dataclass(frozen=True, slots=True)
class Health:
    """Whether requests are taken now; `reason` says why not."""

    is_ready: bool
    reason: str | None = None


class Backend(Protocol):
    """`version` is an adapter version (`tools@7`) or None for the base model.

    `complete` and `chat` are generators that end with a usage chunk; closing one (or cancelling the task that awaits
    it) frees its work at once. What is wrong with the request, or a full queue, is raised before the first chunk:
    InvalidRequestError, QueueFullError, ServerUnavailableError.
    """

    def complete(self, request: CompletionRequest, version: str | None) -> AsyncGenerator[CompletionChunk, None]: ...

    def chat(self, request: ChatRequest, version: str | None) -> AsyncGenerator[ChatChunk, None]: ...

    async def tokenize(self, request: TokenizeRequest) -> Body: ...

    async def detokenize(self, request: DetokenizeRequest) -> Body: ...

    async def load(self, version: str) -> None: ...

    async def unload(self, version: str) -> None: ...

    def loaded(self) -> frozenset[str]: ...

    def health(self) -> Health: ...
