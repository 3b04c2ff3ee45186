"""From settings to a server in front of another one: database, upstream, backend, closed in reverse.

`sterna serve --backend openai --upstream URL` (through server/runtime.py). No model is loaded and no adapter can be;
the upstream need not be there yet. Not here: the upstream's wire (server/backends/upstream.py).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from server.app import OpenRuntime, Runtime
from server.backends.upstream import UpstreamBackend
from server.config import Settings
from server.metrics import Metrics
from server.openai.service import ServedModel
from server.records import open_records, open_store

NAME = "upstream"
"""Of the one model in metrics: clients may ask for any name, and labels are bounded."""


def open_record_mode(settings: Settings) -> OpenRuntime:
    """What create_app takes. Entering it raises ConfigError and DatabaseUnavailableError."""
    assert settings.upstream is not None, "the settings see to it"
    url = settings.upstream
    key = settings.upstream_api_key

    @asynccontextmanager
    async def opened(metrics: Metrics) -> AsyncIterator[Runtime]:
        async with AsyncExitStack() as stack:
            backend = UpstreamBackend(url, key.get_secret_value() if key is not None else None)
            stack.push_async_callback(backend.aclose)
            store = await asyncio.to_thread(open_store, settings, metrics, NAME)
            records = await stack.enter_async_context(open_records(settings, store))
            metrics.watch_log(records.log.stats)
            stack.push_async_callback(backend.end_answers)
            backend.health()  # starts the first look

            async def list_models() -> list[ServedModel]:
                return [ServedModel(model.name, model.max_model_len, model.name) for model in await backend.models()]

            yield Runtime(
                backend,
                records,
                (ServedModel(NAME, None, root=NAME),),
                engine_stats=None,
                end_answers=backend.end_answers,
                description=f"record mode: {backend.name} answers",
                list_models=list_models,
            )

    return opened
