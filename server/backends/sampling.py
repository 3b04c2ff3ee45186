"""From a checked request to the engine's SamplingParams, with the checks that need the model: vocabulary, context."""

from collections.abc import Mapping

from server.engine.params import SamplingParams
from server.errors import InvalidRequestError
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.common import SamplingFields
from server.openai.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from server.text.tokenizer import Tokenizer

SMALLEST_TOP_P = 1e-9
"""`top_p` 0 keeps the most likely token, as at OpenAI; the engine wants a positive number."""


def refuse_hopeless(text: str, tokenizer: Tokenizer, max_model_len: int, *, param: str) -> None:
    """A text that cannot fit, before the seconds that tokenizing its megabytes would take."""
    if tokenizer.fewest_tokens(text) >= max_model_len:
        raise InvalidRequestError(
            f"This model's maximum context length is {max_model_len} tokens, but the {param} alone "
            f"{'have' if param == 'messages' else 'has'} {len(text)} characters. Shorten the {param}.",
            param=param,
            code="context_length_exceeded",
        )


def fit_context(prompt_length: int, max_tokens: int | None, max_model_len: int, *, param: str) -> int:
    """The number of tokens that may be generated; `max_tokens` None means the rest of the context."""
    if prompt_length >= max_model_len:
        raise InvalidRequestError(
            f"This model's maximum context length is {max_model_len} tokens, but the {param} alone "
            f"{'have' if param == 'messages' else 'has'} {prompt_length}. Shorten the {param}.",
            param=param,
            code="context_length_exceeded",
        )
    if max_tokens is None:
        return max_model_len - prompt_length
    if prompt_length + max_tokens > max_model_len:
        raise InvalidRequestError(
            f"This model's maximum context length is {max_model_len} tokens, but {prompt_length + max_tokens} were "
            f"requested ({prompt_length} in the {param}, {max_tokens} in the completion). Reduce either.",
            param=param,
            code="context_length_exceeded",
        )
    return max_tokens


def completion_params(request: CompletionRequest, max_tokens: int) -> SamplingParams:
    """For choice 0; `best_of` needs the chosen tokens' log-probabilities even when nobody asked to see them."""
    ranks = (request.best_of or 1) > (request.n or 1)
    num_logprobs = request.logprobs if request.logprobs is not None else (0 if ranks else None)
    return _params(
        request,
        max_tokens=max(max_tokens, 1),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=request.logprobs if request.echo else None,
    )


def chat_params(request: ChatRequest, max_tokens: int) -> SamplingParams:
    """For choice 0."""
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(request, max_tokens=max_tokens, num_logprobs=num_logprobs, num_prompt_logprobs=None)


def completion_limit(request: CompletionRequest) -> int:
    return DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens


def check_token_ids(request: SamplingFields, vocab_size: int) -> None:
    """`logit_bias` and `stop_token_ids` must name tokens of this vocabulary."""
    for key in request.logit_bias or {}:
        if int(key) >= vocab_size:
            raise InvalidRequestError(
                f"'logit_bias' names token {key}, but the vocabulary has {vocab_size} tokens.", param="logit_bias"
            )
    for token_id in request.stop_token_ids or []:
        if token_id >= vocab_size:
            raise InvalidRequestError(
                f"'stop_token_ids' names token {token_id}, but the vocabulary has {vocab_size} tokens.",
                param="stop_token_ids",
            )


def _params(
    request: SamplingFields, *, max_tokens: int, num_logprobs: int | None, num_prompt_logprobs: int | None
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(request.temperature, 1.0),
        top_k=max(request.top_k or 0, 0),
        top_p=max(_or(request.top_p, 1.0), SMALLEST_TOP_P),
        min_p=request.min_p or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_bias(request.logit_bias or {}),
        seed=None if request.seed is None else request.seed % 2**64,
        min_tokens=min(request.min_tokens or 0, max_tokens),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        speculation=request.speculation is not False,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _bias(bias: Mapping[str, float]) -> dict[int, float]:
    return {int(key): float(value) for key, value in bias.items()}
