"""Networks beside the plain llama over HTTP: BitNet, and two residual streams, each from a tiny random file."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from quant.formats import GGMLType
from tests.server.openai.harness import async_test
from tests.server.openai.test_openai_runtime import serving
from tests.tiny_models import write_tiny_gguf, write_tiny_hf

TERNARY: dict[str, Any] = {
    "hidden": 256,
    "ffn": 256,
    "linear_type": GGMLType.TQ2_0,
    "embedding_type": GGMLType.Q8_0,
    "context_length": 1024,
}
FILES: dict[str, dict[str, Any]] = {
    "bitnet": {"architecture": "bitnet", "metadata": {"bitnet.hidden_activation": "relu2"}, **TERNARY},
    "bitnet-b1.58": {"architecture": "bitnet-b1.58", **TERNARY},
    "streams": {"residual_streams": 2, **TERNARY},
    "both": {"architecture": "bitnet-b1.58", "residual_streams": 2, **TERNARY},
}


async def answers_alone_and_among_others(path: Path, model: str) -> None:
    body = {"model": model, "prompt": "some words", "max_tokens": 20, "seed": 7, "logprobs": 2, "ignore_eos": True}
    async with serving(path) as http:
        alone = (await http.post("/v1/completions", json=body)).json()
        others = [{**body, "seed": seed, "prompt": "another one" * (seed % 3 + 1)} for seed in range(6)]
        together = await asyncio.gather(*(http.post("/v1/completions", json=one) for one in [*others, body]))
    assert [response.status_code for response in together] == [200] * 7
    assert together[-1].json()["choices"] == alone["choices"]
    assert alone["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("name", FILES)
@async_test
async def test_a_gguf_file_is_served(name: str, tmp_path: Path) -> None:
    await answers_alone_and_among_others(write_tiny_gguf(tmp_path / "tiny.gguf", **FILES[name]), "tiny")


@async_test
async def test_a_hugging_face_directory_is_served(tmp_path: Path) -> None:
    path = write_tiny_hf(tmp_path / "tiny", architecture="bitnet", context_length=1024, dtype="bfloat16")
    await answers_alone_and_among_others(path, "tiny")
