"""Response objects of the OpenAI wire, as TypedDicts: what a backend yields and the routes encode.

A chunk is built for every token of every stream, so it is a plain dict (about 1 us) and not a model (about 25 us);
tests validate every one against the `openai` package's models. Beyond OpenAI there is `reasoning_content` only.
A backend always ends with one chunk that has no choices and carries `usage`; the routes drop it when not asked for.
Only upstreams have content filters and refusals, give no fingerprint, or no usage (null then).
"""

from typing import Any, Literal, NotRequired, TypedDict


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"] | None


class CompletionHead(TypedDict):
    """What all chunks of one answer share."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None


class CompletionChunk(CompletionHead):
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class FunctionDelta(TypedDict, total=False):
    name: str
    arguments: str


class ToolCallDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChatChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"] | None


class ChatHead(TypedDict):
    """What all chunks of one answer share."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None


class ChatChunk(ChatHead):
    choices: list[ChatChoice]
    usage: NotRequired[Usage | None]


Body = dict[str, Any]
"""An unstreamed response, ready for json.dumps."""
