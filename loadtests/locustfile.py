"""Users of a chat assistant and of completions, streamed; time to first token and token gaps as rows of their own.

Locust's own rows time whole answers. The rows `TTFT` and `ITL` of type `SSE` are what a person at the other end feels.
Gaps are taken between chunks, so they hold for one process of up to some hundred users; beyond that, or to compare
rates, use sse_client.py, which costs far less for each token.

To Sterna the load is no traffic (purpose evaluation), which needs a key of scopes inference and train in STERNA_API_KEY
once keys exist.

needs: pip install 'sterna[loadtest]'
usage: locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 --headless -u 16 -r 4 -t 60s
"""

import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

from locust import HttpUser, between, events, task

API_KEY = os.environ.get("STERNA_API_KEY")
QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Explain what a hash table is to a child.",
    "Give me three names for a grey cat.",
)
BEGINNINGS = ("The history of Rome begins with", "def fibonacci(n):", "Once upon a time there was")


class StreamingUser(HttpUser):
    """Asks, reads the whole stream, thinks for a moment and asks again."""

    wait_time = between(0.5, 2.0)

    def on_start(self) -> None:
        self.client.headers["X-Sterna-Purpose"] = "evaluation"
        if API_KEY:
            self.client.headers["Authorization"] = f"Bearer {API_KEY}"
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    @task(3)
    def chat(self) -> None:
        messages = [{"role": "user", "content": random.choice(QUESTIONS)}]
        self._stream("/v1/chat/completions", {"messages": messages, "max_tokens": 96})

    @task(1)
    def complete(self) -> None:
        self._stream("/v1/completions", {"prompt": random.choice(BEGINNINGS), "max_tokens": 48})

    def _stream(self, path: str, body: dict[str, Any]) -> None:
        body |= {"model": self.model, "stream": True}
        start = last = time.perf_counter()
        is_first = True
        with self.client.post(path, json=body, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"{response.status_code}: {response.text[:200]}")
                return
            for chunk in _chunks(response.iter_lines()):
                if "error" in chunk:
                    response.failure(chunk["error"]["message"])
                    return
                if not _text(chunk):
                    continue
                now = time.perf_counter()
                _measure("TTFT" if is_first else "ITL", now - (start if is_first else last))
                is_first, last = False, now
            if is_first:
                response.failure("no text came")


def _chunks(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event up to [DONE]."""
    for line in lines:
        data = line.removeprefix(b"data: ")
        if data == b"[DONE]":
            return
        if data != line:
            yield json.loads(data)


def _text(chunk: dict[str, Any]) -> str:
    parts = [choice.get("text") or (choice.get("delta") or {}).get("content") for choice in chunk["choices"]]
    return "".join(part for part in parts if part)


def _measure(name: str, seconds: float) -> None:
    events.request.fire(
        request_type="SSE", name=name, response_time=seconds * 1e3, response_length=0, exception=None, context={}
    )
