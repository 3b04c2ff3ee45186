"""The server's API in the learner's words: adapters and their versions, greedy answers, losses, how busy it is.

Questions are asked as evaluations (X-Sterna-Purpose) and kept out of the log (X-Sterna-Log): a held-out request that
were logged again would outlive the deletion of the trace that it came from. What was answered is kept by the round.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.serving.errors import RefusedError
from finetune.serving.http import Http
from server.adapters.version import VersionRef

EVALUATION = {"X-Sterna-Purpose": "evaluation", "X-Sterna-Log": "off"}
_BUSY = re.compile(r"^sterna_num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class ServerApi:
    """Every method raises RefusedError and ServerDownError."""

    def __init__(self, http: Http) -> None:
        self._http = http

    @property
    def url(self) -> str:
        return self._http.url

    # -- adapters -----------------------------------------------------------------------------------------------------

    def adapter_names(self) -> list[str]:
        return [one["name"] for one in self._http.request("GET", "/v1/adapters").json()["data"]]

    def adapter(self, name: str) -> dict[str, Any]:
        """The adapter with its versions and its `change`."""
        found: dict[str, Any] = self._http.request("GET", f"/v1/adapters/{name}").json()
        return found

    def version(self, ref: VersionRef) -> dict[str, Any]:
        found: dict[str, Any] = self._http.request("GET", _path(ref)).json()
        return found

    def create_adapter(self, name: str, reason: str) -> None:
        """One that exists stays as it is."""
        self._http.request("POST", "/v1/adapters", json={"name": name, "reason": reason})

    def import_version(
        self, name: str, archive: Path, *, base_digest: str, origin: str, reason: str, parent: VersionRef | None
    ) -> dict[str, Any]:
        """The version that the zip file is, with `is_new`."""
        answer = self._http.request(
            "POST",
            f"/v1/adapters/{name}/versions",
            content=archive.read_bytes(),  # megabytes; a body that is sent again must begin at its beginning
            query={
                "reason": reason,
                "origin": origin,
                "base_digest": base_digest,
                "parent": None if parent is None else str(parent),
            },
            headers={"Content-Type": "application/zip"},
        )
        found: dict[str, Any] = answer.json()
        return found

    def export_version(self, ref: VersionRef) -> bytes:
        """A zip file of its PEFT directory."""
        return self._http.request("GET", _path(ref, "export")).content

    def start_canary(self, ref: VersionRef, *, share: float, reason: str, expected_change: int) -> None:
        self._act(ref, "canary", share=share, reason=reason, expected_change=expected_change)

    def promote(self, ref: VersionRef, *, hold_back_share: float, reason: str, expected_change: int) -> None:
        self._act(ref, "promote", hold_back_share=hold_back_share, reason=reason, expected_change=expected_change)

    def reject(self, ref: VersionRef, *, reason: str, expected_change: int | None = None) -> None:
        self._act(ref, "reject", reason=reason, expected_change=expected_change)

    def roll_back(self, name: str, *, reason: str, expected_change: int) -> None:
        body = {"reason": _cut(reason), "expected_change": expected_change}
        self._http.request("POST", f"/v1/adapters/{name}/rollback", json=body)

    def _act(self, ref: VersionRef, verb: str, **body: Any) -> None:
        body = {key: value for key, value in body.items() if value is not None} | {"reason": _cut(body["reason"])}
        self._http.request("POST", _path(ref, verb), json=body)

    # -- answers ------------------------------------------------------------------------------------------------------

    def base_name(self) -> str:
        """What requests for the base model itself are called."""
        for model in self._http.request("GET", "/v1/models").json()["data"]:
            if model.get("parent") is None and VersionRef.parse(model["id"]) is None:
                return str(model["id"])
        raise RefusedError(404, f"the server at {self.url} lists no base model")

    def answer(self, model: str, request: Mapping[str, Any], *, max_tokens: int) -> dict[str, Any]:
        """The greedy answer to a chat request (messages, tools, ...): message, finish reason, and of what model."""
        body = dict(request) | {"model": model, "temperature": 0, "max_completion_tokens": max_tokens, "n": 1}
        reply = self._http.request("POST", "/v1/chat/completions", json=body, headers=EVALUATION).json()
        choice = reply["choices"][0]
        return {
            "message": choice["message"],
            "finish_reason": choice["finish_reason"],
            "system_fingerprint": reply.get("system_fingerprint"),
        }

    def token_losses(self, model: str, token_ids: Sequence[int], num_scored: int) -> list[float]:
        """Nats of each of the last `num_scored` tokens, given all before it."""
        body = {"model": model, "prompt": list(token_ids), "echo": True, "max_tokens": 0, "logprobs": 0}
        reply = self._http.request("POST", "/v1/completions", json=body, headers=EVALUATION).json()
        logprobs = reply["choices"][0]["logprobs"]["token_logprobs"]
        return [-float(value) for value in logprobs[len(token_ids) - num_scored : len(token_ids)]]

    def num_requests(self) -> int | None:
        """Running and waiting now; None: the server does not say."""
        text = self._http.peek("/metrics")
        found = None if text is None else _BUSY.findall(text)
        return int(sum(float(value) for value in found)) if found else None


def _path(ref: VersionRef, *rest: str) -> str:
    return "/".join([f"/v1/adapters/{ref.adapter}/versions/{ref.number}", *rest])


def _cut(reason: str) -> str:
    """What the registry takes, with room to spare."""
    return reason if len(reason) <= 500 else reason[:499] + "…"
