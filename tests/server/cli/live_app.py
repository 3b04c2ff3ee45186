"""The scripted application behind a real socket, for commands that talk to a running server."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from tests.patience import PATIENCE_SECONDS
from tests.server.openai.harness import Harness, serving


@dataclass
class LiveApp:
    url: str
    harness: Harness
    """Its records, to look behind the scenes. The event loop is another thread's."""


@contextmanager
def live_app(**options: Any) -> Iterator[LiveApp]:
    """Serves on a free port of 127.0.0.1 until the block ends. `options`: of the harness's `serving`."""
    listener = socket.create_server(("127.0.0.1", 0))
    ready, found, stop = threading.Event(), [], asyncio.Event()

    async def main() -> None:
        async with serving(**options) as h:
            config = uvicorn.Config(h.app, lifespan="off", log_config=None, ws="none", timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            serve = asyncio.create_task(server._serve(sockets=[listener]))  # not `serve`, which takes the signals
            found.append((h, asyncio.get_running_loop()))
            ready.set()
            await stop.wait()
            server.should_exit = True
            await serve

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert ready.wait(PATIENCE_SECONDS)
        harness, loop = found[0]
        try:
            yield LiveApp(f"http://127.0.0.1:{listener.getsockname()[1]}", harness)
        finally:
            loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join(PATIENCE_SECONDS)
        listener.close()
