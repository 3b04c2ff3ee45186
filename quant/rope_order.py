"""The two row orders of Q and K: half-split (Hugging Face, PEFT, the engine) and interleaved (llama's GGUF files).

Rotary embedding turns pairs of rows. Half-split keeps pair i of a head at rows i and i + rope_dim/2, interleaved at
2i and 2i + 1. Biases have the same order as the rows. Qwen's GGUF files are half-split like their sources.
"""

import numpy as np

from quant.model_types import ModelConfig
from quant.tensor_rules import is_query_or_key, layer_kind


def half_split_rows(config: ModelConfig, num_heads: int) -> np.ndarray:
    """For each row in half-split order the row of an interleaved Q or K weight that holds it: int32 (rows,)."""
    assert config.rope_dim % 2 == 0, config.rope_dim
    head = np.arange(config.head_dim)
    rotary = head[: config.rope_dim].copy()
    head[: config.rope_dim] = np.concatenate([rotary[0::2], rotary[1::2]])
    return (np.arange(num_heads)[:, None] * config.head_dim + head).reshape(-1).astype(np.int32)


def interleaved_rows(config: ModelConfig, num_heads: int) -> np.ndarray:
    """For each row in interleaved order the half-split row that belongs there: the inverse of the other."""
    return np.argsort(half_split_rows(config, num_heads)).astype(np.int32)


def file_rows(config: ModelConfig, tensor: str) -> np.ndarray | None:
    """For each row of a tensor in the model's GGUF file the half-split row that belongs there; None for all as is."""
    if config.architecture != "llama" or not is_query_or_key(tensor):
        return None
    is_query = (layer_kind(tensor) or "").startswith("attn_q.")
    return interleaved_rows(config, config.num_heads if is_query else config.num_kv_heads)
