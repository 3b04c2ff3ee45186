"""The ASGI application: built in order, torn down in reverse, with no state outside itself.

It listens while the model loads (503 with the reason), serves, and on shutdown closes the runtime after uvicorn has
let running requests finish. What it serves with comes from `open_runtime` (server/runtime.py for the real engine), so
tests pass a scripted one.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.backends.base import Backend
from server.engine.stats import EngineStats
from server.errors import SternaError
from server.metrics import Metrics
from server.openai import openapi
from server.openai.boundary import Boundary
from server.openai.errors import wire_error
from server.openai.routes import build_router
from server.openai.service import ServedModel, Service

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a loaded model gives the application."""

    backend: Backend
    models: tuple[ServedModel, ...]
    engine_stats: Callable[[], EngineStats]
    description: str = ""
    """For the line that says the server is ready: instruction set, threads, what the KV cache holds."""


OpenRuntime = Callable[[Metrics], AbstractAsyncContextManager[Runtime]]


def create_app(open_runtime: OpenRuntime, *, on_failure: Callable[[Exception], None] | None = None) -> FastAPI:
    """`app.state.service` is the Service. `on_failure` hears of a model that cannot be loaded (once, on the loop)."""
    metrics = Metrics()
    service = Service(metrics)

    async def hold_runtime() -> None:
        try:
            async with open_runtime(metrics) as runtime:
                metrics.watch_engine(runtime.engine_stats)
                service.open(runtime.backend, *runtime.models)
                await service.closing.wait()
                service.refuse("it is shutting down")
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
