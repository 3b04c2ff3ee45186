"""`POST /v1/completions`: the request. A prompt is a string or token ids; a list of those makes several answers."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from server.openai.protocol.common import SamplingFields, TokenId, invalid, refuse

MAX_PROMPTS = 2048
MAX_BEST_OF = 20
"""OpenAI's limit."""
DEFAULT_MAX_TOKENS = 16
"""OpenAI's default."""

_REFUSED = {
    "suffix": "the served models are not trained to fill in text",
}


def _check_prompt(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid("expected a string, a list of strings, a list of token ids or a list of those", "invalid_type")
    if not value:
        raise invalid("must not be empty", "empty_array")
    kinds = {type(item) for item in value}
    if kinds == {str} or kinds == {list}:
        if len(value) > MAX_PROMPTS:
            raise invalid(f"at most {MAX_PROMPTS} prompts are accepted in one request, got {len(value)}")
        if kinds == {list}:
            for index, item in enumerate(value):
                if not item:
                    raise invalid(f"prompt {index} has no token ids", "empty_array")
    elif kinds == {int}:
        for index, item in enumerate(value):
            if not 0 <= item < 2**31:
                raise invalid(f"{item} at index {index} is not a token id")
    else:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise invalid(f"a list must hold only strings, only token ids or only lists of token ids, got: {names}")
    return value


# One error is enough: or every token id of a long prompt would be reported as no string.
_FIRST_ERROR = Field(fail_fast=True)
Prompt = Annotated[
    str
    | Annotated[list[str], _FIRST_ERROR]
    | Annotated[list[TokenId], _FIRST_ERROR]
    | Annotated[list[Annotated[list[TokenId], _FIRST_ERROR]], _FIRST_ERROR],
    BeforeValidator(_check_prompt),
]


class CompletionRequest(SamplingFields):
    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    best_of: int | None = Field(None, ge=1, le=MAX_BEST_OF)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        return refuse(data, _REFUSED)

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise invalid(
                "'max_tokens' must be at least 1 (0 is allowed only with 'echo', to score a prompt)", param="max_tokens"
            )
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise invalid(f"'best_of' must be at least 'n' ({self.n or 1}), got {self.best_of}", param="best_of")
            if self.stream and self.best_of > (self.n or 1):
                raise invalid("'best_of' greater than 'n' cannot be combined with 'stream'", param="best_of")
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise invalid(
                f"'min_tokens' ({self.min_tokens}) must not exceed 'max_tokens' ({self.max_tokens})", param="min_tokens"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a string or a list of token ids."""
        prompt: Any = self.prompt
        return prompt if self.has_many_prompts else [prompt]

    @property
    def has_many_prompts(self) -> bool:
        return not isinstance(self.prompt, str) and not isinstance(self.prompt[0], int)
