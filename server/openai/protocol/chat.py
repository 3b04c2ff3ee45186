"""`POST /v1/chat/completions`: the request, and the rules that tie its fields together."""

from typing import Any, Literal

from pydantic import Field, model_validator

from server.openai.protocol.common import SamplingFields, invalid, refuse
from server.openai.protocol.messages import Messages, template_message
from server.openai.protocol.tools import NamedToolChoice, ResponseFormat, ToolChoice, Tools

_REFUSED = {
    "audio": "the served models read and write text only",
    "functions": "deprecated by OpenAI; use 'tools'",
    "function_call": "deprecated by OpenAI; use 'tool_choice'",
    "prediction": "predicted outputs are not implemented",
    "web_search_options": "this server does not search the web",
    "moderation": "this server does not moderate",
}


class ChatRequest(SamplingFields):
    messages: Messages
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    # Extensions that vLLM clients know.
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # Accepted: they cannot change the answer of a server that keeps nothing and has one tier.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """Passed to the chat template as `reasoning_effort`, which may ignore it."""
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        return refuse(data, _REFUSED)

    @model_validator(mode="after")
    def _check_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise invalid("'max_tokens' and 'max_completion_tokens' differ; give one of them", param="max_tokens")
        limit = self.token_limit
        if limit is not None and (self.min_tokens or 0) > limit:
            raise invalid(
                f"'min_tokens' ({self.min_tokens}) must not exceed 'max_completion_tokens' ({limit})",
                param="min_tokens",
            )
        self._check_continuation()
        self._check_tools()
        return self

    def _check_continuation(self) -> None:
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise invalid(
                    "'continue_final_message' and 'add_generation_prompt' exclude each other",
                    param="continue_final_message",
                )
            last = self.messages[-1]
            if last.role != "assistant" or not last.content:
                raise invalid(
                    "'continue_final_message' needs an assistant message with content at the end of 'messages'",
                    param="messages",
                )

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or []]
        for name in names:
            if names.count(name) > 1:
                raise invalid(f"'tools' defines the function {name!r} more than once", param="tools")
        choice = self.tool_choice
        if isinstance(choice, NamedToolChoice):
            if choice.function.name not in names:
                raise invalid(
                    f"'tool_choice' names the function {choice.function.name!r}, which is not among 'tools'",
                    param="tool_choice",
                )
        elif choice == "required" and not names:
            raise invalid("'tool_choice' is 'required' but 'tools' is empty", param="tools")

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def template_messages(self) -> list[dict[str, Any]]:
        return [template_message(message) for message in self.messages]
