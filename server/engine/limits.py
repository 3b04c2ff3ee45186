"""The engine's limits, resolved against what the core was built for."""

from dataclasses import dataclass

from server.engine.core_api import Core
from server.errors import ConfigError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """`max_model_len`: prompt and output together, at most what the whole KV pool holds."""

    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_mixed_prefill_tokens: int
    max_model_len: int
    kv_note: str
    """For the error of a prompt that is too long: set when it is the KV pool that limits."""

    @classmethod
    def resolve(
        cls,
        core: Core,
        *,
        num_blocks: int | None,
        max_num_seqs: int | None,
        max_num_batched_tokens: int | None,
        max_mixed_prefill_tokens: int,
        max_model_len: int,
    ) -> "EngineLimits":
        """None takes the core's own limit. Raises ConfigError."""
        num_blocks = _within("num_blocks", num_blocks, core.num_blocks)
        max_num_seqs = _within("max_num_seqs", max_num_seqs, min(core.max_num_seqs, core.max_logit_rows))
        max_tokens = _within("max_num_batched_tokens", max_num_batched_tokens, core.max_batch_tokens)
        if max_tokens < max_num_seqs:
            raise ConfigError(f"max_num_batched_tokens {max_tokens} is less than max_num_seqs {max_num_seqs}")
        if max_mixed_prefill_tokens < 1:
            raise ConfigError(f"max_mixed_prefill_tokens {max_mixed_prefill_tokens} must be at least 1")
        if max_model_len < 2:
            raise ConfigError(f"max_model_len {max_model_len} must be at least 2")
        capacity = num_blocks * core.block_size
        note = f" (the KV pool holds {num_blocks} blocks of {core.block_size} tokens; raise --kv-memory for more)"
        return cls(
            num_blocks,
            max_num_seqs,
            max_tokens,
            max_mixed_prefill_tokens,
            min(max_model_len, capacity),
            note if capacity < max_model_len else "",
        )

    def check_prompt(self, num_tokens: int) -> None:
        """A prompt must leave room for one token of answer. Raises InvalidRequestError."""
        if num_tokens >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens; at most {self.max_model_len - 1} fit{self.kv_note}",
                param="prompt",
                code="context_length_exceeded",
            )


def _within(name: str, value: int | None, limit: int) -> int:
    if value is None:
        return limit
    if not 1 <= value <= limit:
        raise ConfigError(f"{name} {value} is out of range: the core was built for 1 to {limit}")
    return value
