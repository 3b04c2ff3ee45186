"""The whole stack over HTTP on a tiny random model: settings, file, tokenizer, core, engine, backend, wire."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from quant.errors import ModelFileError
from server.app import create_app
from server.config import Settings
from server.errors import ConfigError
from server.metrics import Metrics
from server.runtime import open_runtime
from tests.server.openai.harness import asgi_client, async_test
from tests.server.openai.validator import events
from tests.tiny_models import write_tiny_gguf

CONTEXT = 1024
USER = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", context_length=CONTEXT)


def settings(model: Path, **fields: Any) -> Settings:
    return Settings(**{"model": str(model), "threads": 1, "kv_memory": 2**20, "max_num_seqs": 8, **fields})


@asynccontextmanager
async def serving(model: Path, **fields: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(open_runtime(settings(model, **fields)), is_loopback=True)
    async with app.router.lifespan_context(app), asgi_client(app) as http:
        while not app.state.service.is_open:  # noqa: ASYNC110 - the model loads on a thread
            await asyncio.sleep(0.001)
        yield http


def client(http: httpx.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="unused", base_url="http://test/v1", http_client=http, max_retries=0)


@async_test
async def test_streamed_equals_unstreamed_and_the_digest_is_in_the_fingerprint(model: Path) -> None:
    body = {"model": "tiny", "messages": USER, "max_tokens": 24, "seed": 3, "logprobs": True, "ignore_eos": True}
    async with serving(model) as http:
        whole = (await http.post("/v1/chat/completions", json=body)).json()
        stream = events((await http.post("/v1/chat/completions", json={**body, "stream": True})).content)
    choice = whole["choices"][0]
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream[:-1]]
    assert "".join(deltas) == choice["message"]["content"]
    assert whole["usage"]["completion_tokens"] == 24
    assert len(choice["logprobs"]["content"]) == 24
    assert whole["system_fingerprint"].startswith("fp_")
    assert stream[0]["system_fingerprint"] == whole["system_fingerprint"]


@async_test
async def test_alone_and_among_others_a_seeded_answer_is_the_same(model: Path) -> None:
    body = {"model": "tiny", "prompt": "some words", "max_tokens": 20, "seed": 7, "temperature": 0.9}
    async with serving(model) as http:
        alone = (await http.post("/v1/completions", json=body)).json()
        others = [{**body, "seed": seed, "prompt": "another one" * (seed % 3 + 1)} for seed in range(12)]
        together = await asyncio.gather(*(http.post("/v1/completions", json=one) for one in [*others, body]))
    assert [response.status_code for response in together] == [200] * 13
    assert together[-1].json()["choices"] == alone["choices"]


@async_test
async def test_schema_and_forced_tool_call_hold_on_a_random_model(model: Path) -> None:
    async with serving(model) as http:
        api = client(http)
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
        answer = await api.chat.completions.create(model="tiny", messages=USER, response_format=form, seed=1)
        called = await api.chat.completions.create(
            model="tiny",
            messages=USER,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "f"}},
            seed=2,
        )
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content or "")
    assert value["a"] in (1, 2)
    assert isinstance(value["b"], bool)
    assert called.choices[0].finish_reason == "tool_calls"
    [call] = called.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments).keys() == {"a", "b"}


@async_test
async def test_a_token_scores_in_a_prompt_what_it_scored_when_generated(model: Path) -> None:
    body = {"model": "tiny", "temperature": 0, "logprobs": 0, "ignore_eos": True}
    async with serving(model) as http:
        ids = (await http.post("/tokenize", json={"prompt": "abc def"})).json()["tokens"]
        generated = await http.post("/v1/completions", json={**body, "prompt": ids, "max_tokens": 1})
        [logprob] = generated.json()["choices"][0]["logprobs"]["token_logprobs"]
        scores: list[float] = []
        for first in range(0, 384, 128):
            candidates = [[*ids, token_id] for token_id in range(first, first + 128)]
            fields = {**body, "prompt": candidates, "echo": True, "max_tokens": 0}
            choices = (await http.post("/v1/completions", json=fields)).json()["choices"]
            scores += [choice["logprobs"]["token_logprobs"][-1] for choice in choices]
    assert max(scores) == logprob  # greedy took the likeliest, to the bit
    assert math.fsum(math.exp(score) for score in scores) == pytest.approx(1.0, abs=1e-5)


@async_test
async def test_second_request_hits_the_prefix_cache(model: Path) -> None:
    body = {"model": "tiny", "prompt": "x" * 100, "max_tokens": 2}
    async with serving(model) as http:
        usages = [(await http.post("/v1/completions", json=body)).json()["usage"] for _ in range(2)]
        metrics = (await http.get("/metrics")).text
    assert usages[0]["prompt_tokens_details"]["cached_tokens"] == 0
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] >= 16
    assert "sterna_prefix_cache_hits_total" in metrics


@async_test
async def test_settings_reach_the_wire(model: Path) -> None:
    async with serving(model, served_model_name="mine", max_model_len=64) as http:
        [listed] = (await http.get("/v1/models")).json()["data"]
        too_long = await http.post("/v1/completions", json={"model": "mine", "prompt": "x" * 400})
    assert (listed["id"], listed["root"], listed["max_model_len"]) == ("mine", "tiny", 64)
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


@async_test
async def test_the_folder_of_a_file_serves_under_its_name(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my-nano"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(model)
    async with serving(folder) as http:
        [listed] = (await http.get("/v1/models")).json()["data"]
        answer = await http.post("/v1/completions", json={"model": "my-nano", "prompt": "x", "max_tokens": 1})
    assert (listed["id"], answer.status_code) == ("my-nano", 200)


@async_test
async def test_a_chat_template_file_replaces_the_models(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}")
    async with serving(model, chat_template=template) as http:
        tokens = (await http.post("/tokenize", json={"messages": USER})).json()["tokens"]
        text = (await http.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    assert text == "[hi]"


@async_test
async def test_closing_ends_what_is_under_way_with_a_reason(model: Path) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1000, "ignore_eos": True, "n": 8}
    app = create_app(open_runtime(settings(model)), is_loopback=True)
    async with app.router.lifespan_context(app), asgi_client(app) as http:
        while not app.state.service.is_open:  # noqa: ASYNC110 - the model loads on a thread
            await asyncio.sleep(0.001)
        request = asyncio.create_task(http.post("/v1/completions", json=body))
        while not app.state.service.num_in_flight:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        app.state.service.closing.set()
        answer = await request
    assert answer.status_code == 503
    assert "shut" in answer.json()["error"]["message"]


@async_test
async def test_a_bad_tokenizer_is_refused_with_the_files_name(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "odd.gguf", pre="nonesuch")
    with pytest.raises(ConfigError, match=r"odd\.gguf: tokenizer\.ggml\.pre.*nonesuch"):
        async with open_runtime(settings(path))(Metrics()):
            pass


@pytest.mark.parametrize(("content", "error"), [(b"GGUF", ModelFileError), (b"", ModelFileError), (None, ConfigError)])
@async_test
async def test_what_cannot_be_served_is_refused(tmp_path: Path, content: bytes | None, error: type[Exception]) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=r"bad\.gguf"):
        async with open_runtime(settings(path))(Metrics()):
            pass
