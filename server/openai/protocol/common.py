"""What completion and chat requests share: strictness, sampling fields, `stop`, `logit_bias`, `stream_options`.

Strict means: no coercion ("5" is not 5, true is not 1), no unknown fields, no NaN or infinity. Every field of
OpenAI's that we do not implement is listed, either as *accepted* (it cannot change the answer) or as *refused*
(it would, so silence would be a lie). Limits that need the model (vocabulary, context) are checked in the backend.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_STOP_STRINGS = 4
"""OpenAI's limit."""
MAX_STOP_LENGTH = 1024
"""A held-back tail is never longer than this; OpenAI documents no limit, 1,024 characters is far above use."""
MAX_CHOICES = 128
"""OpenAI's limit on `n`."""
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def invalid(message: str, code: str = "invalid_value", *, param: str | None = None) -> PydanticCustomError:
    """A validation failure whose message and code are sent to the caller as they stand.

    `param` names the field when the failure is found above it (rules between fields).
    """
    return PydanticCustomError(code, "{text}", {"text": message, "param": param})


class WireModel(BaseModel):
    """Strict JSON object. (The one place where wire models share a base class: pydantic keeps its config there.)"""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


def _check_stop(value: Any) -> Any:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("expected a string or a list of strings", "invalid_type")
    if len(stops) > MAX_STOP_STRINGS:
        raise invalid(
            f"at most {MAX_STOP_STRINGS} stop strings are accepted, got {len(stops)}", "array_above_max_length"
        )
    for stop in stops:
        if not stop:
            raise invalid("a stop string must not be empty", "string_below_min_length")
        if len(stop) > MAX_STOP_LENGTH:
            raise invalid(f"a stop string may have at most {MAX_STOP_LENGTH} characters", "string_above_max_length")
    return value


def _check_logit_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    for key, bias in (value or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(f"keys are token ids written as decimal numbers, got {key[:40]!r}")
        if not -100 <= bias <= 100:
            raise invalid(f"values lie between -100 and 100, got {bias:g} for token {key}")
    return value


Stop = Annotated[str | list[str] | None, BeforeValidator(_check_stop)]
LogitBias = Annotated[dict[str, float] | None, AfterValidator(_check_logit_bias)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(WireModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted; no padding is ever added."""


class SamplingFields(WireModel):
    """Fields with one meaning on both endpoints. None is "not given" everywhere, as OpenAI clients send nulls."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias = None
    stop: Stop = None
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)
    # Extensions that vLLM clients know.
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1 keep every token")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=128)
    # An extension of our own.
    speculation: bool | None = Field(None, description="false: every token is computed after the one before it")
    # Accepted: they cannot change the answer of a server that keeps nothing and has one tier.
    user: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise invalid("'stream_options' is only allowed with 'stream': true", param="stream_options")
        return self

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def refuse(data: Any, reasons: dict[str, str]) -> Any:
    """Fail on the first field of `reasons` that is present; null is the same as absent."""
    if not isinstance(data, dict):
        return data
    for name, reason in reasons.items():
        if data.get(name) is not None:
            raise invalid(f"'{name}' is not supported: {reason}", "unsupported_parameter", param=name)
    return {name: value for name, value in data.items() if name not in reasons}
