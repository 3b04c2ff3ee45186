"""The default model behind the real backend: requests with drafts, asked together, are answered as without, to the bit.

Tool calls under a grammar, chats, stop strings, log-probabilities, penalties, several choices; greedy and seeded.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speculation_requests import CHATS, TOOL_CALLS
from server.backends.base import Call
from server.config import Settings
from server.engine.stats import EngineStats
from server.metrics import Metrics
from server.openai.protocol.chat import ChatRequest
from server.runtime import load_model

pytestmark = pytest.mark.real_model

JSON = {"type": "json_object"}
REQUESTS: list[dict[str, Any]] = [
    {**TOOL_CALLS[0], "temperature": 0},
    {**TOOL_CALLS[2], "temperature": 0, "logprobs": True, "top_logprobs": 3},
    {**TOOL_CALLS[4], "seed": 3, "frequency_penalty": 0.4},
    {**TOOL_CALLS[7], "seed": 4, "temperature": 0.7, "n": 2},
    {**TOOL_CALLS[9], "seed": 5, "parallel_tool_calls": True},
    {**TOOL_CALLS[12], "temperature": 0, "max_tokens": 21},
    {**CHATS[3], "temperature": 0},
    {**CHATS[4], "temperature": 0.5, "seed": 6, "n": 3, "stop": ["\n\n", "len("]},
    {**CHATS[0], "temperature": 0, "logprobs": True, "repetition_penalty": 1.1},
    {**CHATS[5], "seed": 8, "top_p": 0.9, "response_format": JSON, "logit_bias": {"28": 2}},
]


def answers(*, speculation: bool) -> tuple[list[list[Any]], list[list[Any]], EngineStats]:
    """Per request its message without the random ids, and the tokens of its choices."""
    loaded = load_model(Settings(threads=2, max_num_seqs=16))

    async def ask(body: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        call = Call(Metrics().start_request("chat", "m"))
        fields = {"model": "", "max_tokens": 60, **body, "speculation": speculation}
        usage = None
        async for chunk in loaded.backend.chat(ChatRequest.model_validate(fields), call):
            usage = chunk.get("usage") or usage
        return [usage["completion_tokens"] if usage else None], [list(ids) for ids in call.completion_token_ids]

    async def run() -> list[tuple[list[Any], list[Any]]]:
        loaded.engine.start(asyncio.get_running_loop())
        return await asyncio.gather(*(ask(body) for body in REQUESTS))

    try:
        found = asyncio.run(run())
        return [usage for usage, _ in found], [tokens for _, tokens in found], loaded.engine.stats()
    finally:
        loaded.close()


def test_drafts_change_no_answer(default_model: Path) -> None:
    usage, tokens, stats = answers(speculation=True)
    plain_usage, plain_tokens, plain_stats = answers(speculation=False)
    assert tokens == plain_tokens
    assert usage == plain_usage
    assert plain_stats.draft_tokens == plain_stats.forced_tokens == 0
    assert stats.forced_tokens > 30
