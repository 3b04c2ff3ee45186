"""The KV budget: what is asked for is kept or refused with what fits, what is not asked for is chosen to fit."""

import pytest

from quant.model_types import ModelConfig
from server.errors import ConfigError
from server.kv_budget import KVBudget, plan_kv_budget
from server.units import format_bytes

GIB, MIB = 1 << 30, 1 << 20

SMOL = ModelConfig(
    architecture="llama",
    name="smol",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    context_length=8192,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    rope_dim=64,
    rope_freq_factors=None,
    qkv_bias=False,
    qk_norm=False,
    tie_embeddings=True,
)
BLOCK = 16 * 30 * 2 * 3 * (64 * 2 + 4)
FULL = 8192 // 16 * BLOCK


def plan(kv_memory: int | None = None, max_model_len: int | None = None, available: int = 20 * GIB) -> KVBudget:
    return plan_kv_budget(SMOL, kv_memory=kv_memory, max_model_len=max_model_len, available_bytes=available)


def test_a_default_run_stays_small() -> None:
    budget = plan()
    assert budget.block_bytes == BLOCK
    assert GIB - BLOCK < budget.num_bytes <= GIB
    assert budget.max_model_len == 8192


def test_a_model_with_a_long_context_gets_one_full_sequence_if_there_is_memory() -> None:
    long = ModelConfig(**{**vars(SMOL), "context_length": 131072})
    budget = plan_kv_budget(long, kv_memory=None, max_model_len=None, available_bytes=20 * GIB)
    assert budget.num_tokens == budget.max_model_len == 131072


def test_half_of_a_small_memory_and_a_shorter_context() -> None:
    budget = plan(available=200 * MIB)
    assert budget.num_bytes <= 100 * MIB
    assert budget.max_model_len == budget.num_tokens == 100 * MIB // BLOCK * 16 < 8192


def test_what_was_asked_for_is_kept() -> None:
    budget = plan(kv_memory=300 * MIB, max_model_len=1000)
    assert budget.num_blocks == 300 * MIB // BLOCK
    assert budget.max_model_len == 1000
    assert str(budget) == f"KV cache 300 MiB for {budget.num_tokens} tokens, 1000 at most in one request"


def test_exactly_one_full_sequence_fits() -> None:
    assert plan(kv_memory=FULL, max_model_len=8192).max_model_len == 8192
    with pytest.raises(ConfigError, match=r"holds 8176 tokens of smol; 8192 tokens need 186 MiB \(--kv-memory"):
        plan(kv_memory=FULL - 1, max_model_len=8192)


@pytest.mark.parametrize(
    ("kv_memory", "max_model_len", "available", "message"),
    [
        (None, 8193, GIB, "max_model_len 8193 is more than the 8192 tokens smol was made for"),
        (2 * GIB, None, GIB, "kv_memory 2 GiB is more than the free 1 GiB"),
        (BLOCK - 1, None, GIB, "a KV cache of 371 KiB holds 0 tokens of smol; 8192 tokens need 186 MiB"),
        (None, None, 0, "a KV cache of 0 B holds 0 tokens of smol"),
    ],
)
def test_what_cannot_be_is_refused_with_what_fits(
    kv_memory: int | None, max_model_len: int | None, available: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(kv_memory, max_model_len, available)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (98362432, "93.8 MiB"), (GIB, "1 GiB"), (5000 * GIB, "5000 GiB")],
)
def test_sizes_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
