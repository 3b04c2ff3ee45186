"""`sterna generate` over a scripted backend: which request it makes of its arguments, and what it prints."""

import io
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server import cli, runtime
from server.backends.base import Call
from server.config import Settings
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.completions import CompletionRequest


class ScriptedBackend:
    """Answers every request with the same pieces and remembers the request."""

    def __init__(self) -> None:
        self.requests: list[ChatRequest | CompletionRequest] = []
        self.settings: Settings | None = None

    async def chat(self, request: ChatRequest, call: Call) -> AsyncIterator[dict[str, Any]]:
        self.requests.append(request)
        for delta in (
            {"role": "assistant", "content": ""},
            {"reasoning_content": "hm "},
            {"content": "Par"},
            {"content": "is"},
        ):
            yield {"choices": [{"index": 0, "delta": delta}]}
        yield {"choices": [], "usage": {}}

    async def complete(self, request: CompletionRequest, call: Call) -> AsyncIterator[dict[str, Any]]:
        self.requests.append(request)
        for text in ("in ", "Rome"):
            yield {"choices": [{"index": 0, "text": text}]}
        yield {"choices": [], "usage": {}}


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedBackend:
    backend = ScriptedBackend()

    def load_model(settings: Settings) -> Any:
        backend.settings = settings
        engine = SimpleNamespace(start=lambda loop: None)
        return SimpleNamespace(
            backend=backend, engine=engine, model=SimpleNamespace(name="scripted"), close=lambda: None
        )

    monkeypatch.setattr(runtime, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    return backend


def test_a_prompt_is_a_users_message(backend: ScriptedBackend, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["generate", "--temperature", "0.5", "--seed", "7", "--max-tokens", "9", "--threads", "1", "Hi"]) == 0
    )
    (request,) = backend.requests
    assert isinstance(request, ChatRequest)
    assert [message.content for message in request.messages] == ["Hi"]
    assert (request.temperature, request.seed, request.token_limit) == (0.5, 7, 9)
    assert backend.settings is not None
    assert (backend.settings.threads, backend.settings.max_num_seqs) == (1, 1)
    assert capsys.readouterr().out == "hm Paris\n"


def test_raw_continues_the_prompt(backend: ScriptedBackend, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--raw", "All roads end"]) == 0
    (request,) = backend.requests
    assert isinstance(request, CompletionRequest)
    assert request.prompt == "All roads end"
    assert capsys.readouterr().out == "in Rome\n"


def test_the_prompt_may_come_from_standard_input(backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert cli.main(["generate", "--raw"]) == 0
    assert isinstance(backend.requests[0], CompletionRequest)
    assert backend.requests[0].prompt == "from a pipe"


def test_values_are_checked_as_the_server_checks_them(
    backend: ScriptedBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--temperature", "5", "--max-tokens", "0", "Hi"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["--temperature", "--max-tokens"]
    assert backend.requests == []


@pytest.mark.real_model
def test_the_default_model_continues_as_llama_cpp_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    command = [sys.executable, "-m", "server.cli", "generate", "--raw", "--temperature", "0", "--max-tokens", "12"]
    done = subprocess.run([*command, "The history of Rome begins with"], capture_output=True, text=True, check=True)
    assert done.stdout == " the founding of Rome by Romulus in 753\n"
    assert done.stderr == ""
