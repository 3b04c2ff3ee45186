"""How many KV blocks fit: from `--kv-memory`, or from the free memory, with a clear message when it is too little.

The arithmetic only; the core allocates. KV entries are 16 bits with one float a token and head for their scale; a block
holds 16 tokens of every layer.
"""

from dataclasses import dataclass

from quant.model_types import ModelConfig
from server.errors import ConfigError
from server.units import format_bytes

BLOCK_TOKENS = 16
_ELEMENT_BYTES = 2
_SCALE_BYTES = 4

# A default run on a small model stays small: 1 GiB is 45,000 tokens of the default model, 64 users with 700 each.
DEFAULT_KV_BYTES = 1 << 30


@dataclass(frozen=True)
class KVBudget:
    """What the KV cache holds. `max_model_len` is the longest prompt and answer together that one request may have."""

    num_blocks: int
    block_bytes: int
    max_model_len: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * BLOCK_TOKENS

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def __str__(self) -> str:
        return (
            f"KV cache {format_bytes(self.num_bytes)} for {self.num_tokens} tokens, "
            f"{self.max_model_len} at most in one request"
        )


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Of keys and values, in all layers."""
    padded_dim = -(-config.head_dim // 16) * 16  # the core's cache holds whole vectors of 16
    return config.num_layers * 2 * config.num_kv_heads * (padded_dim * _ELEMENT_BYTES + _SCALE_BYTES)


def plan_kv_budget(
    config: ModelConfig, *, kv_memory: int | None, max_model_len: int | None, available_bytes: int
) -> KVBudget:
    """`kv_memory` bytes, or None: half of the free memory, at most 1 GiB or what one full sequence needs.

    A `max_model_len` that was asked for must fit; one that was not is lowered to what fits. Raises ConfigError.
    """
    block_bytes = BLOCK_TOKENS * kv_bytes_per_token(config)
    if max_model_len is not None and max_model_len > config.context_length:
        raise ConfigError(
            f"max_model_len {max_model_len} is more than the {config.context_length} tokens {config.name} was made for"
        )
    wanted_len = max_model_len or config.context_length
    wanted_bytes = -(-wanted_len // BLOCK_TOKENS) * block_bytes
    if kv_memory is None:
        num_bytes = min(available_bytes // 2, max(DEFAULT_KV_BYTES, wanted_bytes))
    elif kv_memory > available_bytes:
        raise ConfigError(f"kv_memory {format_bytes(kv_memory)} is more than the free {format_bytes(available_bytes)}")
    else:
        num_bytes = kv_memory
    num_blocks = num_bytes // block_bytes
    num_tokens = num_blocks * BLOCK_TOKENS
    if num_blocks == 0 or (max_model_len is not None and num_tokens < max_model_len):
        raise ConfigError(
            f"a KV cache of {format_bytes(num_bytes)} holds {num_tokens} tokens of {config.name}; "
            f"{wanted_len} tokens need {format_bytes(wanted_bytes)} (--kv-memory, --max-model-len)"
        )
    return KVBudget(num_blocks, block_bytes, min(wanted_len, num_tokens))
