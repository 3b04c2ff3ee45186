"""What is known of one request when it has ended, and what of it belongs to an episode.

Plain values, made by the routes on the event loop; nothing here touches the database. A record is handed to
`TraceLog` once and never changed.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Endpoint = Literal["chat", "completions", "import"]
Purpose = Literal["user", "evaluation"]
Status = Literal["ok", "cancelled", "failed"]
Side = Literal["train", "held_out"]


def new_trace_id() -> str:
    return "trace-" + uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice: the assistant message as it was sent (content, tool_calls, reasoning_content), perhaps cut short."""

    message: Mapping[str, Any]
    finish_reason: str | None
    """None: it was cut off by a cancellation or failure."""
    token_ids: Sequence[int] | None = None
    """None where the backend does not tell."""


@dataclass(frozen=True, slots=True)
class EpisodeRef:
    """The episode a request belongs to, as `Episodes.resolve` found it when the request arrived."""

    id: str
    group: bytes
    """Digest of the first user message and the tools; the side is drawn from it."""
    context: bytes
    """Digest of the conversation before the answer."""
    name: str | None = None
    """What the client called it in X-Sterna-Episode."""
    others: tuple[str, ...] = ()
    """Episodes whose turns the request holds too: merged in, or with a `name` only put on one side."""
    tool_results: tuple[tuple[str, bool], ...] = ()
    """(tool_call_id, is an error) of every result in the request."""
    is_stitched: bool = True
    """False: evaluation traffic, which neither joins nor can be joined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRecord:
    id: str
    response_id: str | None
    created_at: datetime
    """When the request arrived, UTC."""
    endpoint: Endpoint
    requested_model: str
    messages: Sequence[Mapping[str, Any]] | None = None
    """Chat: as the client sent them. One of `messages` and `prompt` is set."""
    prompt: Any = None
    """Completions: a string, token ids, or a list of either."""
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: Any = None
    response_format: Any = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """The request's sampling fields that were given, and `parallel_tool_calls`."""
    was_constrained: bool = False
    """A grammar restricted the tokens."""
    answers: Sequence[Answer] = ()
    status: Status = "ok"
    error: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    """None where the backend does not tell, and for completions of several prompts."""
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    ttft_seconds: float | None = None
    duration_seconds: float | None = None
    model: str
    """The base model that computed."""
    model_digest: str | None = None
    template_digest: str | None = None
    tokenizer_digest: str | None = None
    adapter: str | None = None
    """The line of adapters that the request named, also while the base answers for it."""
    version: str | None = None
    version_digest: str | None = None
    key_id: str = ""
    user_id: str | None = None
    """The client's `user` or `safety_identifier`."""
    session_id: str | None = None
    metadata: Mapping[str, str] | None = None
    purpose: Purpose = "user"
    num_request_bytes: int = 0
    """Of the body as it came: about what the record takes in memory, besides token ids."""
    episode: EpisodeRef
