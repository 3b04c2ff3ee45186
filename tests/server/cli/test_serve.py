"""`sterna serve` as a process: says when it is ready, drains on SIGTERM, keeps to its deadline, quits on a second."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.config import DEFAULT_MODEL
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.real_model]


class Server:
    """A server on a free port, and what its standard output and error said."""

    def __init__(self, *flags: str, cwd: Path) -> None:
        command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--kv-memory", "256MiB", *flags]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STERNA_")}
        self.errors = cwd / "stderr"
        with self.errors.open("w") as errors:
            environment["PYTHONPATH"] = str(ROOT)
            self.process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.ready_line)
        if found is None:
            self.close()
            raise AssertionError(f"the server did not start:\n{self.errors.read_text()}")
        self.port = int(found[1])

    def request(self, method: str, path: str, body: dict[str, object] | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        return connection.getresponse()

    def stream(self, num_tokens: int) -> http.client.HTTPResponse:
        """A streamed completion of exactly so many tokens, of which the first chunk has been read."""
        body = {"model": DEFAULT_MODEL, "prompt": "Rome", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        response = self.request("POST", "/v1/completions", body)
        assert response.status == 200
        assert response.readline().startswith(b"data: {")
        return response

    def wait(self) -> int:
        return self.process.wait(timeout=PATIENCE_SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(Server(*flags, cwd=tmp_path))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_drain_finishes_what_runs_and_refuses_what_comes(start: Callable[..., Server]) -> None:
    server = start("--drain-seconds", "240")  # a slow machine finishes too
    assert re.fullmatch(
        rf"Sterna serves {DEFAULT_MODEL} on http://127\.0\.0\.1:\d+ "
        r"\((avx512|avx2|scalar), \d+ threads, KV cache 256 MiB for \d+ tokens, 8192 at most in one request\)\n",
        server.ready_line,
    )
    running = server.stream(num_tokens=600)  # seconds, in which two requests are refused
    server.process.send_signal(signal.SIGTERM)
    # The signal is handled between two steps; until then a request may still be taken.
    while (health := server.request("GET", "/health")).status == 200:
        health.read()
    assert health.status == 503
    assert b"shutting down" in health.read()
    refused = server.request("POST", "/v1/completions", {"model": DEFAULT_MODEL, "prompt": "x"})
    assert refused.status == 503
    assert json.loads(refused.read())["error"]["code"] == "service_unavailable"

    rest = running.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"length"' in rest
    assert server.wait() == 0
    assert "SIGTERM: waiting up to 240 s for 1 requests" in server.errors.read_text()
    assert "Traceback" not in server.errors.read_text()


def test_the_deadline_cuts_off(start: Callable[..., Server]) -> None:
    server = start("--drain-seconds", "0.1")
    running = server.stream(num_tokens=8000)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    rest = running.read()
    assert b"[DONE]" not in rest
    assert b'data: {"error":{"message":"the server shut down before the answer was complete"' in rest
    log = server.errors.read_text()
    assert "1 requests are cut off" in log
    assert "leaked" not in log
    assert "Traceback" not in log


def test_a_second_signal_quits(start: Callable[..., Server]) -> None:
    server = start()
    server.stream(num_tokens=8000)
    server.process.send_signal(signal.SIGINT)
    while server.request("GET", "/health").status == 200:
        pass
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 130
    assert "Traceback" not in server.errors.read_text()


def test_idle_it_stops_at_once(start: Callable[..., Server]) -> None:
    server = start("--log-format", "json", "--log-level", "debug")
    server.request("GET", "/health").read()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    lines = [json.loads(line) for line in server.errors.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    assert any(line["logger"] == "uvicorn.access" for line in lines)
