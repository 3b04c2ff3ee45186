"""What the engine itself must refuse: values that the core would index memory with.

The wire layer checks requests for sense and words its errors in the client's terms; these are the last line, cheap
enough to run always, and the only one for callers that are not HTTP (CLI, bench).
"""

import math
from array import array
from collections.abc import Sequence

import numpy as np

from server.engine.core_api import MAX_TOP_LOGPROBS
from server.engine.params import SamplingParams
from server.errors import InvalidRequestError


def to_token_array(token_ids: Sequence[int], vocab_size: int) -> "array[int]":
    """int32 tokens, each within the vocabulary."""
    try:
        tokens = np.asarray(token_ids)
    except (OverflowError, ValueError):
        raise InvalidRequestError("the prompt must be a list of token ids", param="prompt") from None
    if tokens.ndim != 1 or tokens.size == 0:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    if tokens.dtype.kind not in "iu":
        raise InvalidRequestError("the prompt must be a list of token ids", param="prompt")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise InvalidRequestError(f"token id {bad} is outside the vocabulary of {vocab_size}", param="prompt")
    result = array("i")
    assert result.itemsize == 4
    result.frombytes(tokens.astype(np.int32).tobytes())
    return result


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Ranges that protect the core; InvalidRequestError names the field."""
    _require(params.max_tokens >= 1, "max_tokens", params.max_tokens, "at least 1")
    _require(params.min_tokens >= 0, "min_tokens", params.min_tokens, "at least 0")
    _require(params.top_k >= 0, "top_k", params.top_k, "at least 0")
    _require(0.0 <= params.temperature < math.inf, "temperature", params.temperature, "finite and at least 0")
    _require(0.0 < params.top_p <= 1.0, "top_p", params.top_p, "in (0, 1]")
    _require(0.0 <= params.min_p <= 1.0, "min_p", params.min_p, "in [0, 1]")
    _require(
        0.0 < params.repetition_penalty < math.inf, "repetition_penalty", params.repetition_penalty, "finite and over 0"
    )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        _require(math.isfinite(value), name, value, "finite")
    _require(params.seed is None or 0 <= params.seed < 2**64, "seed", params.seed, "an unsigned 64-bit integer")
    _require(0 <= params.choice < 2**31, "n", params.choice, "at least 0")
    for name, count in (("logprobs", params.num_logprobs), ("prompt_logprobs", params.num_prompt_logprobs)):
        _require(count is None or 0 <= count <= MAX_TOP_LOGPROBS, name, count, f"in [0, {MAX_TOP_LOGPROBS}]")
    for token_id, bias in params.logit_bias.items():
        _require(0 <= token_id < vocab_size, "logit_bias", token_id, f"a token id below {vocab_size}")
        _require(math.isfinite(bias), "logit_bias", bias, "finite")
    for token_id in params.stop_token_ids:
        _require(0 <= token_id < vocab_size, "stop_token_ids", token_id, f"a token id below {vocab_size}")


def _require(is_good: bool, param: str, value: object, accepted: str) -> None:
    if not is_good:
        raise InvalidRequestError(f"{param} is {value}; it must be {accepted}", param=param)
