"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes. `/tokenize` takes a prompt or messages."""

from typing import Any

from pydantic import Field, model_validator

from server.openai.protocol.common import TokenId, WireModel, invalid
from server.openai.protocol.messages import Messages, template_message
from server.openai.protocol.tools import Tools


class TokenizeRequest(WireModel):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = Field(None, description="default: true for a prompt, false for messages")
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_input(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise invalid("give either 'prompt' or 'messages'", param="prompt")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "'continue_final_message' and 'add_generation_prompt' exclude each other",
                param="continue_final_message",
            )
        return self

    @property
    def template_messages(self) -> list[dict[str, Any]]:
        return [template_message(message) for message in self.messages or []]


class DetokenizeRequest(WireModel):
    model: str | None = None
    tokens: list[TokenId]
