"""A server to talk to without a socket: a real registry behind the admin API's routes, and answers by a script.

`down` makes it go away for so many requests, from the next one on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import SecretStr

from finetune.serving.api import ServerApi
from finetune.serving.errors import RefusedError
from finetune.serving.http import Http
from server.adapters.errors import AdapterConflictError, VersionNotFoundError
from server.adapters.registry import Registry
from server.adapters.states import State
from server.adapters.version import Adapter, NewVersion, Version, VersionRef
from server.config import Remote
from server.storage.database import Database

BASE = "base"
BASE_DIGEST = "sha256:" + "0" * 64
Script = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


def silent(model: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "No."}


@dataclass
class FakeServer:
    database: Database
    script: Script = silent
    loss: Callable[[str, list[int]], float] = lambda model, token_ids: 1.0
    base_digest: str = BASE_DIGEST
    num_requests: int = 0
    """Running, as /metrics has it."""
    down: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of everything that was answered."""
    slept: list[float] = field(default_factory=list)
    questions: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    archives: dict[str, bytes] = field(default_factory=dict)
    """What was imported, by version."""
    on_request: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.registry = Registry(self.database)

    def http(self, *, patience_seconds: float = 60.0, **options: Any) -> Http:
        """Time passes only by sleeping."""
        remote = Remote("http://127.0.0.1:1", SecretStr("sk-sterna-test"))
        options = {"sleep": self.slept.append, "clock": lambda: sum(self.slept)} | options
        return Http(remote, patience_seconds=patience_seconds, transport=httpx.MockTransport(self.handle), **options)

    def api(self, **options: Any) -> ServerApi:
        return ServerApi(self.http(**options))

    def handle(self, request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer sk-sterna-test"
        self.on_request()
        if self.down > 0:
            self.down -= 1
            if self.down % 2:
                raise httpx.ConnectError("connection refused", request=request)
            return _error(503, "The server is shutting down.")
        self.asked.append((request.method, request.url.path))
        try:
            return self._route(request)
        except VersionNotFoundError as error:
            return _error(404, str(error))
        except AdapterConflictError as error:
            return _error(409, str(error))
        except RefusedError as error:
            return _error(error.status, str(error))

    def _route(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.strip("/").split("/")
        match request.method, path:
            case "GET", ["metrics"]:
                lines = f"sterna_num_requests_running {self.num_requests}.0\nsterna_num_requests_waiting 0.0\n"
                return httpx.Response(200, text=lines)
            case "GET", ["v1", "models"]:
                return _json({"data": [{"id": BASE, "parent": None}]})
            case "GET", ["v1", "adapters"]:
                return _json({"data": [{"name": one.name} for one in self.registry.adapters()]})
            case "POST", ["v1", "adapters"]:
                body = json.loads(request.content)
                self.registry.create(body["name"], asked_by="test", reason=body["reason"])
                return _json({})
            case "GET", ["v1", "adapters", name]:
                return _json(adapter_body(self.registry.adapter(name)))
            case "POST", ["v1", "adapters", name, "versions"]:
                return self._import(name, request)
            case "POST", ["v1", "adapters", name, "rollback"]:
                body = json.loads(request.content)
                return _json(adapter_body(self.registry.rollback(name, asked_by="test", **body)))
            case "GET", ["v1", "adapters", name, "versions", number]:
                return _json(version_body(self.registry.version(VersionRef(name, int(number)))))
            case "GET", ["v1", "adapters", name, "versions", number, "export"]:
                return httpx.Response(200, content=self.archives[f"{name}@{number}"])
            case "POST", ["v1", "adapters", name, "versions", number, verb]:
                act = {
                    "canary": self.registry.start_canary,
                    "promote": self.registry.promote,
                    "reject": self.registry.reject,
                }[verb]
                body = json.loads(request.content)
                return _json(adapter_body(act(VersionRef(name, int(number)), asked_by="test", **body)))
            case "POST", ["v1", "chat", "completions"]:
                return self._chat(request)
            case "POST", ["v1", "completions"]:
                return self._score(request)
        return _error(404, f"no route {request.url.path}")

    def _import(self, name: str, request: httpx.Request) -> httpx.Response:
        query = request.url.params
        if query["base_digest"] != self.base_digest:
            return _error(400, f"the adapter was trained on {query['base_digest']}, the base is {self.base_digest}")
        digest = "sha256:" + hashlib.sha256(request.content).hexdigest()
        directory = f"{name}/{digest[7:20]}-{len(self.asked)}"
        self.registry.begin_import(directory)
        new = NewVersion(name, digest, self.base_digest, 4, 100, 100, query["origin"], query.get("parent"), directory)
        version, is_new = self.registry.add_version(new, asked_by="test", reason=query["reason"])
        self.archives[str(version.ref)] = request.content
        return _json(version_body(version) | {"is_new": is_new})

    def _chat(self, request: httpx.Request) -> httpx.Response:
        self._check_evaluation(request)
        body = json.loads(request.content)
        assert body["temperature"] == 0
        self.questions.append((body["model"], body))
        message = self.script(body["model"], body)
        return _json({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    def _score(self, request: httpx.Request) -> httpx.Response:
        self._check_evaluation(request)
        body = json.loads(request.content)
        assert (body["echo"], body["max_tokens"]) == (True, 0)
        losses = [-self.loss(body["model"], body["prompt"])] * len(body["prompt"])
        return _json({"choices": [{"index": 0, "logprobs": {"token_logprobs": losses}}]})

    @staticmethod
    def _check_evaluation(request: httpx.Request) -> None:
        assert request.headers["x-sterna-purpose"] == "evaluation"
        assert request.headers["x-sterna-log"] == "off"


def adapter_body(adapter: Adapter) -> dict[str, Any]:
    def ref(version: Version | None) -> str | None:
        return None if version is None else str(version.ref)

    return {
        "name": adapter.name,
        "change": adapter.change,
        "live": ref(adapter.live),
        "previous": ref(adapter.previous),
        "canary": ref(adapter.in_state(State.CANARY)),
        "canary_share": adapter.canary_share,
        "hold_back_share": adapter.hold_back_share,
        "versions": [version_body(version) for version in adapter.versions.values()],
    }


def version_body(version: Version) -> dict[str, Any]:
    return {
        "version": str(version.ref),
        "number": version.ref.number,
        "state": str(version.state),
        "digest": version.digest,
        "base_digest": version.base_digest,
        "rank": version.rank,
        "size_bytes": version.size_bytes,
        "origin": version.origin,
        "parent": version.parent,
    }


def _json(body: Any) -> httpx.Response:
    return httpx.Response(200, json=body)


def _error(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})
