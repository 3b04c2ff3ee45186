"""Clients and an operator who work against one server until it dies, and remember what they were told was done."""

import io
import random
import threading
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.model_file import open_model
from tests.server.adapters.make import adapter_dir
from tests.server.faults.process import Reply, Server

ADAPTER = "tools"


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """An answer whose last byte arrived."""

    trace_id: str
    text: str
    version: str | None


@dataclass(slots=True)
class Told:
    """What a round's clients know. One writer a list."""

    answers: list[Acknowledged] = field(default_factory=list)
    num_broken: int = 0
    """Requests that were under way when the server died."""
    imported: dict[str, str] = field(default_factory=dict)
    """Digest by version, of acknowledged imports."""
    num_imports_begun: int = 0
    may_be_live: list[str | None] = field(default_factory=lambda: [None])
    """The last acknowledged live version, and the one that was asked for afterwards."""
    faults: list[str] = field(default_factory=list)
    """What no server may answer, alive or dying."""


def adapter_zip(model: Path, folder: Path, content: int) -> bytes:
    """A version for the model at `model`; each `content` is another one."""
    with closing(open_model(model)) as file:
        directory = adapter_dir(folder / f"peft-{content}", content, model=file.config)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in directory.iterdir():
            archive.write(path, path.name)
    return buffer.getvalue()


def import_version(server: Server, data: bytes, adapter: str = ADAPTER) -> Reply:
    path = f"/v1/adapters/{adapter}/versions?reason=test"
    return server.request("POST", path, data, {"Content-Type": "application/zip"})


def promote(server: Server, version: str, **options: Any) -> Reply:
    adapter, _, number = version.partition("@")
    body = {"reason": "test", "override": True} | options
    return server.request("POST", f"/v1/adapters/{adapter}/versions/{number}/promote", body)


def use(server: Server, number: int, is_over: threading.Event, told: Told) -> None:
    """One client: short conversations, streamed or not, with the base, the adapter or by name of the episode."""
    dice = random.Random(number)
    while not is_over.is_set():
        history: list[dict[str, Any]] = []
        headers = {"X-Sterna-Episode": f"{number}-{dice.random()}"} if dice.random() < 0.3 else {}
        for _ in range(dice.randint(1, 3)):
            content, stream = f"question {number}/{dice.random()}", dice.random() < 0.5
            model = ADAPTER if told.imported and dice.random() < 0.5 else "tiny"
            num_tokens = dice.randint(1, 12)
            reply = server.chat(
                content, headers=headers, model=model, history=history, stream=stream, num_tokens=num_tokens
            )
            if not (reply.is_done if stream else reply.status == 200 and reply.is_whole):
                _note_failure(reply, is_over, told)
                break
            text = _text(reply, stream=stream)
            told.answers.append(Acknowledged(reply.trace_id, text, reply.headers.get("x-sterna-adapter-version")))
            history += [{"role": "user", "content": content}, {"role": "assistant", "content": text}]


def operate(server: Server, archives: Callable[[], bytes], is_over: threading.Event, told: Told) -> None:
    """The operator: imports one version after the other and makes each live."""
    while not is_over.is_set():
        told.num_imports_begun += 1
        reply = import_version(server, archives())
        if not (reply.status == 201 and reply.is_whole):
            _note_failure(reply, is_over, told)
            continue
        version = reply.json["version"]
        told.imported[version] = reply.json["digest"]
        told.may_be_live = [told.may_be_live[0], version]
        reply = promote(server, version)
        if reply.status == 200 and reply.is_whole:
            told.may_be_live = [version]
        else:
            _note_failure(reply, is_over, told)


def _note_failure(reply: Reply, is_over: threading.Event, told: Told) -> None:
    """A dead server's clients get nothing or a part; anything else is a fault, also while it dies."""
    told.num_broken += 1
    if reply.status not in (0, 200, 201) or (reply.is_whole and reply.status):
        told.faults.append(f"{reply.status}: {reply.body[-500:]!r}")
        is_over.set()


def _text(reply: Reply, *, stream: bool) -> str:
    if not stream:
        return reply.json["choices"][0]["message"]["content"] or ""
    deltas = [choice["delta"] for event in reply.events for choice in event["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)
