"""What callers send to /v1/adapters: JSON bodies and query parameters, checked strictly.

Not here: how a query's names are checked (query.py), and what the registry has against a request.
"""

import re
from typing import Annotated, Literal

from pydantic import Field

from server.adapters.checks import MAX_TEXT_CHARS
from server.adapters.errors import VersionNotFoundError
from server.adapters.version import VersionRef
from server.errors import InvalidRequestError
from server.openai.protocol.common import WireModel

MAX_HISTORY = 1000

Share = Annotated[float, Field(ge=0, le=1)]
Reason = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS, description="goes into the history")]
ExpectedChange = Annotated[
    int | None, Field(ge=0, lt=2**63, description="do nothing (409) unless the adapter is still at this change")
]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class AdapterShadowRequest(WireModel):
    reason: Reason
    share: Share = Field(1.0, description="of the episodes, also run on this version, unseen")
    expected_change: ExpectedChange = None


class AdapterCanaryRequest(WireModel):
    reason: Reason
    share: Share = Field(description="of the episodes, answered by this version")
    expected_change: ExpectedChange = None


class AdapterPromoteRequest(WireModel):
    reason: Reason
    hold_back_share: Share = Field(0.0, description="of the episodes, that stay on the predecessor")
    override: bool = Field(False, description="without a canary's test; admin only")
    expected_change: ExpectedChange = None


class AdapterRejectRequest(WireModel):
    reason: Reason
    expected_change: ExpectedChange = None


class AdapterRollbackRequest(WireModel):
    reason: Reason
    to: int | None = Field(None, ge=1, lt=10**9, description="a retired version's number; else the predecessor")
    expected_change: ExpectedChange = None


class AdapterShareRequest(WireModel):
    reason: Reason
    state: Literal["shadow", "canary", "live"] = Field(description="live: the share held back on its predecessor")
    share: Share
    expected_change: ExpectedChange = None


class AdapterPinRequest(WireModel):
    reason: Reason


class AdapterCreateRequest(WireModel):
    name: str = Field(description="what requests call it: 1 to 64 of a-z, 0-9, '_', '.' and '-'")
    reason: Reason


ADAPTER_REQUESTS: tuple[type[WireModel], ...] = (
    AdapterCreateRequest,
    AdapterShadowRequest,
    AdapterCanaryRequest,
    AdapterPromoteRequest,
    AdapterRejectRequest,
    AdapterRollbackRequest,
    AdapterShareRequest,
    AdapterPinRequest,
)
"""For the OpenAPI document."""

IMPORT_QUERY = {
    "reason": "goes into the history",
    "origin": "where the file came from, kept with the version [upload]",
    "base_digest": "the digest of the base it was trained on, if known: another one is refused",
    "parent": "the version that a warm start began with, such as tools@3",
}
EXPORT_QUERY = {"format": "peft: a zip file of the directory; gguf: one file for llama.cpp [peft]"}
HISTORY_QUERY = {"limit": f"changes at most, 1 to {MAX_HISTORY} [{MAX_HISTORY}]"}
DELETE_QUERY = {"reason": "goes into the history"}
DIFF_QUERY = {"other": "the version to compare with, such as tools@2"}


def read_limit(text: str) -> int:
    """Raises InvalidRequestError."""
    limit = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
    if not 1 <= limit <= MAX_HISTORY:
        raise InvalidRequestError(f"'limit' must be 1 to {MAX_HISTORY}, got {text[:20]!r}", param="limit")
    return limit


def read_export_format(text: str | None) -> str:
    """Raises InvalidRequestError."""
    if text not in (None, "peft", "gguf"):
        raise InvalidRequestError(f"'format' must be 'peft' or 'gguf', got {text[:20]!r}", param="format")
    return text or "peft"


def read_digest(text: str | None, param: str) -> str | None:
    """Raises InvalidRequestError."""
    if text is not None and not _DIGEST.fullmatch(text):
        raise InvalidRequestError(f"'{param}' must be 'sha256:' and 64 hexadecimal digits", param=param)
    return text


def read_ref(text: str, param: str) -> VersionRef:
    """Raises InvalidRequestError."""
    ref = VersionRef.parse(text)
    if ref is None:
        raise InvalidRequestError(f"'{param}' must name a version such as tools@2, got {text[:100]!r}", param=param)
    return ref


def path_ref(name: str, number: str) -> VersionRef:
    """From a URL's path, where nonsense is as unknown as any other version. Raises VersionNotFoundError."""
    ref = VersionRef.parse(f"{name}@{number}")
    if ref is None:
        raise VersionNotFoundError(f"there is no version '{name[:100]}@{number[:20]}'")
    return ref
