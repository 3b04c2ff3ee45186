"""`sterna serve` as a process of its own on a tiny model, with data that outlives it, and what its clients see.

Clients are plain http.client: what counts is which bytes arrived before the server died.
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[3]
MODEL = "tiny"


@dataclass(frozen=True, slots=True)
class Reply:
    """What one client got. `status` 0: nothing."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    is_whole: bool
    """The connection did not break before the end."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream, those that arrived whole, without [DONE]."""
        lines = [line.removeprefix(b"data: ") for line in self.body.split(b"\n\n")[:-1]]
        return [json.loads(line) for line in lines if line != b"[DONE]"]

    @property
    def is_done(self) -> bool:
        """A stream's last byte arrived."""
        return self.body.endswith(b"data: [DONE]\n\n")

    @property
    def trace_id(self) -> str:
        return self.headers["x-sterna-trace-id"]


def chat_body(
    content: str,
    *,
    model: str = MODEL,
    history: list[dict[str, Any]] | None = None,
    stream: bool = False,
    num_tokens: int = 8,
) -> dict[str, Any]:
    messages = [*(history or []), {"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": num_tokens, "ignore_eos": True, "stream": stream}


def _read(response: http.client.HTTPResponse, start: bytes = b"") -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    parts, is_whole = [start], True
    try:
        while part := response.read1():
            parts.append(part)
    except TimeoutError:
        raise
    except (OSError, http.client.HTTPException):
        is_whole = False
    body = b"".join(parts)
    is_whole = is_whole and len(body) == int(headers.get("content-length", len(body)))
    return Reply(response.status, headers, body, is_whole)


class Server:
    """Ready when it exists. `folder` holds what servers share and what this one says."""

    def __init__(self, model: Path, folder: Path, database_url: str, *flags: str, name: str = "server") -> None:
        command = [sys.executable, "-m", "server.cli", "serve", "--model", str(model), "--served-model-name", MODEL]
        command += ["--port", "0", "--threads", "1", "--kv-memory", "64MiB", "--database", database_url]
        command += ["--data-dir", str(folder / "data"), "--adapter-store", str(folder / "adapters"), *flags]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("STERNA_")}
        self.errors = folder / f"{name}.log"
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.process.stdout.readline())
        if found is None:
            self.kill()
            raise AssertionError(f"the server did not start:\n{self.errors.read_text()}")
        self.port = int(found[1])

    def request(
        self, method: str, path: str, body: bytes | Mapping[str, Any] | None = None, headers: Mapping[str, str] = {}
    ) -> Reply:
        """Never raises for what a dying server does to a connection."""
        sent = {"Connection": "close", "Content-Type": "application/json"} | dict(headers)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        try:
            connection.request(method, path, data, sent)
            return _read(connection.getresponse())
        except TimeoutError:
            raise  # hanging is no way to die
        except (OSError, http.client.HTTPException):
            return Reply(0, {}, b"", is_whole=False)
        finally:
            connection.close()

    @contextmanager
    def under_way(self, num_tokens: int) -> Iterator[Callable[[], Reply]]:
        """A stream of which the beginning has arrived; what it gives lets it go on and reads the rest.

        Until then the whole server is halted (SIGSTOP), so that nothing depends on how long the stream lasts.
        """
        body = chat_body("Say much.", stream=True, num_tokens=num_tokens)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        headers = {"Connection": "close", "Content-Type": "application/json"}

        def go_on() -> Reply:
            self.process.send_signal(signal.SIGCONT)
            return _read(response, start)

        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            start = response.read1()
            self.process.send_signal(signal.SIGSTOP)
            yield go_on
        finally:
            self.process.send_signal(signal.SIGCONT)
            connection.close()

    def chat(
        self,
        content: str,
        *,
        headers: Mapping[str, str] = {},
        model: str = MODEL,
        history: list[dict[str, Any]] | None = None,
        stream: bool = False,
        num_tokens: int = 8,
    ) -> Reply:
        """An answer of exactly so many tokens."""
        body = chat_body(content, model=model, history=history, stream=stream, num_tokens=num_tokens)
        return self.request("POST", "/v1/chat/completions", body, headers)

    def metric(self, name: str) -> float:
        """One without labels."""
        text = self.request("GET", "/metrics").body.decode()
        found = re.search(rf"^sterna_{name} (\S+)$", text, re.MULTILINE)
        assert found, f"sterna_{name} is not exposed"
        return float(found[1])

    def kill(self) -> None:
        """As the machine's end would: no handler runs. Again does nothing."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self) -> int:
        """Drained; returns the exit code."""
        self.process.terminate()
        code = self.process.wait(timeout=PATIENCE_SECONDS)
        self.kill()
        return code
