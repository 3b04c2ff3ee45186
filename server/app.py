"""The ASGI application: built in order, torn down in reverse, with no state outside itself.

It listens while the model loads (503 with the reason), serves, and on shutdown closes the runtime after uvicorn has
let running requests finish. What it serves with comes from `open_runtime` (server/runtime.py for the real engine), so
tests pass a scripted one.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.admin.adapter_routes import build_adapter_router
from server.admin.feedback_routes import build_feedback_router
from server.admin.trace_routes import build_trace_router
from server.backends.base import Backend
from server.engine.stats import EngineStats
from server.errors import SternaError
from server.metrics import Metrics
from server.openai import openapi
from server.openai.boundary import Boundary
from server.openai.errors import wire_error
from server.openai.routes import build_router
from server.openai.service import ListModels, ServedModel, Service
from server.records import Records

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a loaded model gives the application."""

    backend: Backend
    records: Records
    models: tuple[ServedModel, ...]
    engine_stats: Callable[[], EngineStats] | None
    """None: no engine of ours answers."""
    end_answers: Callable[[], Awaitable[None]]
    """Ends what is still under way, before the records close: so that it is logged as it ended."""
    description: str = ""
    """For the line that says the server is ready: instruction set, threads, what the KV cache holds."""
    list_models: ListModels | None = None
    """None: `models` and the adapters are what there is to list."""

    def is_busy(self) -> bool:
        """Requests wait for a place."""
        return self.engine_stats is not None and self.engine_stats().num_waiting > 0


END_SECONDS = 2.0
"""For the last bytes of what was ended, and its traces."""

OpenRuntime = Callable[[Metrics], AbstractAsyncContextManager[Runtime]]


def create_app(
    open_runtime: OpenRuntime, *, is_loopback: bool, on_failure: Callable[[Exception], None] | None = None
) -> FastAPI:
    """`app.state.service` is the Service. `on_failure` hears of a model that cannot be loaded (once, on the loop).

    `is_loopback`: nobody from elsewhere can connect, so that no API key is needed while none exists.
    """
    metrics = Metrics()
    service = Service(metrics, is_loopback=is_loopback)

    async def hold_runtime() -> None:
        try:
            async with open_runtime(metrics) as runtime:
                if runtime.engine_stats is not None:
                    metrics.watch_engine(runtime.engine_stats)
                service.open(
                    runtime.backend,
                    runtime.records,
                    *runtime.models,
                    list_models=runtime.list_models,
                    is_busy=runtime.is_busy,
                )
                await service.closing.wait()
                service.refuse("it is shutting down")
                await service.end_shadows()
                await runtime.end_answers()
                with suppress(TimeoutError):  # a client that does not read cannot hold up the exit
                    async with asyncio.timeout(END_SECONDS):
                        await service.drained()
        except Exception as error:  # the top of the loading task: whatever it is, it must be heard of
            service.refuse(f"the model could not be loaded: {error}")
            if on_failure is None:
                logger.exception("the model could not be loaded")
            else:
                on_failure(error)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        holder = asyncio.create_task(hold_runtime())
        try:
            yield
        finally:
            service.closing.set()
            await holder

    app = FastAPI(title="Sterna", version=_version(), lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.state.service = service
    app.include_router(build_router(service))
    app.include_router(build_adapter_router(service))
    app.include_router(build_feedback_router(service))
    app.include_router(build_trace_router(service))
    openapi.install(app)
    app.add_middleware(Boundary, count_response=metrics.count_response)
    app.add_exception_handler(SternaError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    return wire_error(error).response()


def _version() -> str:
    try:
        return version("sterna")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0"
