"""`sterna serve --backend openai` in front of `sterna serve`: two processes, the official client against both."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

from server.config import DEFAULT_MODEL
from tests.server.cli.test_serve import Server

USER: Any = [{"role": "user", "content": "How warm is it in Rome?"}]


@contextmanager
def serve(folder: Path, *flags: str) -> Iterator[Server]:
    folder.mkdir()
    server = Server("--data-dir", str(folder / "data"), *flags, cwd=folder)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.real_model
def test_sterna_in_front_of_sterna(tmp_path: Path) -> None:
    ask: dict[str, Any] = {"model": DEFAULT_MODEL, "messages": USER, "max_tokens": 24, "temperature": 0, "seed": 1}
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    with (
        serve(tmp_path / "teacher") as teacher,
        serve(tmp_path / "front", "--backend", "openai", "--upstream", f"http://127.0.0.1:{teacher.port}/v1") as front,
    ):
        assert re.search(r"record mode: 127\.0\.0\.1:\d+ answers", front.ready_line)
        direct = OpenAI(api_key="x", base_url=f"http://127.0.0.1:{teacher.port}/v1", max_retries=0)
        proxied = OpenAI(api_key="x", base_url=f"http://127.0.0.1:{front.port}/v1", max_retries=0)
        assert [model.id for model in proxied.models.list()] == [model.id for model in direct.models.list()]
        theirs, ours = (one.chat.completions.create(**ask) for one in (direct, proxied))
        assert ours.choices[0].to_dict() == theirs.choices[0].to_dict()
        assert ours.system_fingerprint == theirs.system_fingerprint
        assert ours.usage is not None
        assert theirs.usage is not None
        assert ours.usage.completion_tokens == theirs.usage.completion_tokens == 24
        text = ""
        with proxied.chat.completions.create(**ask, stream=True) as stream:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text == ours.choices[0].message.content
        called, called_direct = (one.chat.completions.create(**{**ask, **forced}) for one in (proxied, direct))
        [call], [call_direct] = (one.choices[0].message.tool_calls or [] for one in (called, called_direct))
        assert call.type == call_direct.type == "function"
        assert json.loads(call.function.arguments) == json.loads(call_direct.function.arguments) == {"city": "Rome"}
        scored = proxied.completions.create(model=DEFAULT_MODEL, prompt="Rome is", max_tokens=4, logprobs=2, seed=1)
        assert scored.choices[0].logprobs is not None
        assert len(scored.choices[0].logprobs.token_logprobs or []) == 4
        with pytest.raises(APIStatusError) as caught:
            proxied.chat.completions.create(**{**ask, "model": "nonesuch"})
        assert caught.value.status_code == 404
        for server in (front, teacher):
            server.process.terminate()
            assert server.wait() == 0
            assert "Traceback" not in server.errors.read_text()
