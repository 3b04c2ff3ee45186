"""What answers an OpenAI request. One implementation a module: `native` (our engine), later `vllm` (over HTTP).

A backend speaks OpenAI wire objects, not tokens, because vLLM keeps its own templates and parsers. It yields the
chunks of a streamed answer even when the caller wants one body: the routes put them together, so a streamed and an
unstreamed answer cannot differ. Not here: HTTP, routing by model name, API keys.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.metrics import RequestMetrics
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.chunks import Body, ChatChunk, CompletionChunk
from server.openai.protocol.completions import CompletionRequest
from server.openai.protocol.tokens import DetokenizeRequest, TokenizeRequest


@dataclass(frozen=True, slots=True)
class Health:
    """Whether requests are taken now; `reason` says why not."""

    is_ready: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """What computes the answers, for the traces. None: the backend cannot know."""

    model: str
    model_digest: str | None = None
    template_digest: str | None = None
    tokenizer_digest: str | None = None


@dataclass(slots=True)
class Call:
    """One request's way through a backend: what it is told besides the wire request, and what it tells the trace."""

    meter: RequestMetrics
    handle: Any = None
    """What the adapter loader made of the version that answers; None: the base model."""
    fingerprint: str = ""
    """Of that version, for the end of `system_fingerprint`."""
    cache_salt: bytes = b""
    """Requests with different salts share no prefix cache: one an API key."""
    # Told by the backend, as soon as it knows:
    model: str | None = None
    """What computes this answer, where that is not the same for all (`Identity.model`)."""
    num_prompt_tokens: int = 0
    prompt_token_ids: Sequence[int] | None = None
    """None for several prompts, and where the backend does not know."""
    completion_token_ids: list[Sequence[int]] = field(default_factory=list)
    """A list a choice, which grows while the choice is generated. Empty where the backend does not know."""
    was_constrained: bool = False
    """A grammar restricted the tokens."""


class Backend(Protocol):
    """`complete` and `chat` are generators that end with a usage chunk; closing one (or cancelling the task that awaits
    it) frees its work at once. What is wrong with the request, or a full queue, is raised before the first chunk:
    InvalidRequestError, QueueFullError, ServerUnavailableError.

    Adapter versions are moved in and out by the backend's Loader (server/adapters/residency.py).
    """

    @property
    def identity(self) -> Identity: ...

    def complete(self, request: CompletionRequest, call: Call) -> AsyncGenerator[CompletionChunk, None]: ...

    def chat(self, request: ChatRequest, call: Call) -> AsyncGenerator[ChatChunk, None]: ...

    async def tokenize(self, request: TokenizeRequest) -> Body: ...

    async def detokenize(self, request: DetokenizeRequest) -> Body: ...

    def health(self) -> Health: ...
