"""`sterna serve`: the HTTP server around one model, from the bound port to the drained exit.

Says one line on standard output when it is ready. SIGTERM or Ctrl-C drains: new requests get 503 while those under
way finish, for at most `drain_seconds`; a second signal quits at once.
"""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from server.commands.arguments import Parser, add_model, add_settings, parse_with_settings
from server.config import Settings, limit_library_threads
from server.errors import ConfigError
from server.logs import configure_logging

if TYPE_CHECKING:  # they bring NumPy, which must not be imported before its threads are limited
    from server.app import OpenRuntime, Runtime
    from server.metrics import Metrics
    from server.openai.service import Service

logger = logging.getLogger(__name__)

# After the drain: what is left is sending its last bytes, or is cut off because the deadline has passed.
CLOSE_SECONDS = 2


def main(arguments: Sequence[str]) -> int:
    parser = Parser("serve", "Serve a model to OpenAI clients.", "sterna serve models/sterna-nano-tools --port 8000")
    add_model(parser)
    add_settings(parser)
    _, settings = parse_with_settings(parser, arguments)
    limit_library_threads()
    listener = _listen(settings.host, settings.port)
    configure_logging(settings.log_level, settings.log_format)
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, listener))


def _listen(host: str, port: int) -> socket.socket:
    """Bind before the model loads, so that a taken port is found in milliseconds."""
    with ExitStack() as on_failure:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = on_failure.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        on_failure.pop_all()
    return listener


async def _serve(settings: Settings, listener: socket.socket) -> int:
    from server.app import create_app
    from server.openai.access import is_loopback
    from server.runtime import open_runtime

    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    app = create_app(_announced(open_runtime(settings), url), is_loopback=is_loopback(settings.host), on_failure=fail)
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=settings.log_level == "debug",
        server_header=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    server = DrainingServer(config, app.state.service, settings.drain_seconds)
    await server.serve(sockets=[listener])
    if server.force_exit:  # uvicorn then leaves the application running
        await server.lifespan.shutdown()
    if failures:
        raise failures[0]
    return 128 + server.quit_signal if server.quit_signal else 0


class DrainingServer(uvicorn.Server):
    """uvicorn with another answer to signals; it offers no hook for that but this method.

    uvicorn's own closes the listener at once, so that a load balancer would see refused connections where it should
    read 503 and go elsewhere.
    """

    def __init__(self, config: uvicorn.Config, service: "Service", drain_seconds: float) -> None:
        super().__init__(config)
        self.quit_signal: int | None = None
        self._service = service
        self._drain_seconds = drain_seconds
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None
        self._is_signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs as a signal handler, between any two bytecodes of the main thread."""
        if self._is_signalled:
            self.quit_signal = sig
            self.force_exit = self.should_exit = True
        else:
            self._is_signalled = True
            self._loop.call_soon_threadsafe(self._start_drain, sig)

    def _start_drain(self, sig: int) -> None:
        self._draining = self._loop.create_task(self._drain(sig))

    async def _drain(self, sig: int) -> None:
        self._service.refuse("the server is shutting down")
        under_way = self._service.num_in_flight
        if under_way:
            logger.warning(
                "%s: waiting up to %g s for %d requests", signal.Signals(sig).name, self._drain_seconds, under_way
            )
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self._service.drained()
        except TimeoutError:
            logger.warning("%d requests are cut off", self._service.num_in_flight)
            self._service.closing.set()  # uvicorn alone would drop their connections without a word
        self.should_exit = True


def _announced(open_runtime: "OpenRuntime", url: str) -> "OpenRuntime":
    """Say that the server is ready, once it is."""

    @asynccontextmanager
    async def opened(metrics: "Metrics") -> "AsyncIterator[Runtime]":
        async with open_runtime(metrics) as runtime:
            # What loading left behind lives as long as the process: the collector need not look at it again, which
            # would be a pause of tens of milliseconds in the middle of some stream.
            gc.collect()
            gc.freeze()
            names = ", ".join(model.name for model in runtime.models)
            print(f"Sterna serves {names} on {url} ({runtime.description})", flush=True)
            try:
                yield runtime
            finally:
                gc.unfreeze()  # or the exit finds the core still referenced, and nanobind reports a leak

    return opened
