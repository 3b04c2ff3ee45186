"""An application over the scripted engine, and the official client against it, in one event loop."""

import asyncio
import functools
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from openai import AsyncOpenAI

from server.adapters.engine_loader import EngineLoader
from server.adapters.files import open_files
from server.adapters.registry import Registry
from server.adapters.residency import Residency
from server.adapters.service import AdapterService
from server.adapters.store import Base, VersionStore
from server.app import Runtime, create_app
from server.backends.base import Identity
from server.backends.chat_plan import ChatPlanner
from server.backends.native import NativeBackend
from server.config import Settings
from server.engine.stats import EngineStats
from server.metrics import Metrics
from server.openai.service import ServedModel
from server.records import Records, open_records, open_store
from server.text.chat_template import ChatTemplate
from server.tools.constraint import ConstraintFactory
from tests.server.engine.test_lora_files import MODEL as MODEL_CONFIG
from tests.server.openai.scripted import CHATML, DIGEST, Answer, Script, ScriptedEngine, byte_tokenizer
from tests.server.openai.validator import check_response
from tests.server.postgres import migrated_file

MODEL = "tiny"
MAX_MODEL_LEN = 2048


@dataclass
class Harness:
    app: FastAPI
    engine: ScriptedEngine
    backend: NativeBackend
    records: Records
    http: httpx.AsyncClient
    client: AsyncOpenAI

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)


def say(answer: Answer | str) -> Script:
    """A script that always answers the same."""
    fixed = Answer(answer) if isinstance(answer, str) else answer
    return lambda token_ids, params: fixed


def no_stats() -> EngineStats:
    fields = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
    return EngineStats(**{**fields, "num_blocks_total": 8, "batch_size_counts": (0,) * 10})  # type: ignore[arg-type]


def build_backend(
    engine: ScriptedEngine, *, template: str | None = CHATML, max_model_len: int = MAX_MODEL_LEN
) -> NativeBackend:
    tokenizer = engine.tokenizer
    chat = None if template is None else ChatTemplate(template, bos_token="", eos_token="<|im_end|>")
    constraints = ConstraintFactory(tokenizer, mask_words=-(-tokenizer.vocab_size // 32))
    return NativeBackend(
        engine,
        tokenizer,
        ChatPlanner(tokenizer, chat, constraints, template_text=template),
        identity=Identity(MODEL, DIGEST, "sha256:template", "sha256:tokenizer"),
        max_model_len=max_model_len,
        max_choices=256,
    )


@asynccontextmanager
async def scripted_runtime(
    engine: ScriptedEngine, metrics: Metrics, *, template: str | None = CHATML, **settings: Any
) -> AsyncIterator[Runtime]:
    """A runtime over real records in a folder of its own: only the engine is scripted. `settings`: of Settings."""
    with tempfile.TemporaryDirectory(prefix="sterna-harness-") as folder:
        shutil.copy(migrated_file(), Path(folder) / "sterna.db")
        chosen = Settings(data_dir=Path(folder), **settings)
        async with open_records(chosen, open_store(chosen, metrics, MODEL)) as records:
            versions = VersionStore(
                Registry(records.database),
                open_files(chosen.adapter_store_url, Path(folder) / "copies"),
                Base(DIGEST, MODEL_CONFIG, frozenset({MODEL})),  # type: ignore[arg-type]
            )
            residency = Residency(EngineLoader(versions, engine), max_versions=8, max_bytes=1 << 30)
            adapters = AdapterService(versions.registry, residency, base_names=[MODEL], on_swap=metrics.count_swap)
            await adapters.start()
            yield Runtime(
                build_backend(engine, template=template),
                replace(records, adapters=adapters, versions=versions),
                (ServedModel(MODEL, MAX_MODEL_LEN, root=MODEL),),
                no_stats,
                adapters.stop,
            )


@asynccontextmanager
async def serving(
    answer: Script | Answer | str = "Hello!",
    *,
    template: str | None = CHATML,
    is_loopback: bool = True,
    **settings: Any,
) -> AsyncIterator[Harness]:
    """The application with its model loaded, and clients for it (without retries, which would hide a 429)."""
    script = answer if callable(answer) else say(answer)
    engine = ScriptedEngine(byte_tokenizer(template), script)
    app = create_app(
        lambda metrics: scripted_runtime(engine, metrics, template=template, **settings), is_loopback=is_loopback
    )
    async with app.router.lifespan_context(app), asgi_client(app) as http:
        while not app.state.service.is_open:  # noqa: ASYNC110 - loading is a task; it needs a turn or two
            await asyncio.sleep(0.001)
        client = AsyncOpenAI(api_key="unused", base_url="http://test/v1", http_client=http, max_retries=0)
        parts = app.state.service.parts()
        yield Harness(app, engine, parts.backend, parts.records, http, client)


def asgi_client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=ValidatingTransport(app), base_url="http://test")


class ValidatingTransport(httpx.AsyncBaseTransport):
    """Every response of every test is checked against the wire's rules before the test sees it."""

    def __init__(self, app: FastAPI) -> None:
        self._inner = httpx.ASGITransport(app=app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        body = await response.aread()
        check_response(request.url.path, response.status_code, response.headers.get("content-type", ""), body)
        return httpx.Response(response.status_code, headers=response.headers, content=body)


def async_test(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(function(*args, **kwargs))

    return run
