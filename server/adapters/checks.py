"""What the registry refuses before it writes: shares, texts of the history, deletions of what is needed."""

from server.adapters.errors import AdapterStateError
from server.adapters.states import DELETABLE
from server.adapters.version import Adapter, Version
from server.errors import InvalidRequestError

MAX_TEXT_CHARS = 2000
"""Of a reason or a name in the history: a paragraph."""


def check_share(share: float) -> None:
    if not 0.0 <= share <= 1.0:  # also false for NaN
        raise InvalidRequestError(f"a share of traffic is {share!r}; it must be between 0 and 1", param="share")


def cause_of(asked_by: str, reason: str) -> tuple[str, str]:
    """Who and why, as they go into the history: never empty, printable, of bounded length."""
    return check_text(asked_by, "asked_by"), check_text(reason, "reason")


def check_text(text: str, param: str) -> str:
    if not text.strip() or len(text) > MAX_TEXT_CHARS:
        raise InvalidRequestError(f"'{param}' must have 1 to {MAX_TEXT_CHARS} characters", param=param)
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise InvalidRequestError(f"'{param}' holds a NUL or half a surrogate pair", param=param)
    return text


def check_not_deleted(version: Version) -> None:
    if version.is_deleted:
        raise AdapterStateError(f"{version.ref} was deleted; import it again")


def check_deletable(adapter: Adapter, version: Version) -> None:
    if version.state not in DELETABLE:
        accepted = " or ".join(sorted(DELETABLE))
        raise AdapterStateError(f"{version.ref} is {version.state}; only a version that is {accepted} can be deleted")
    if version.is_pinned:
        raise AdapterStateError(f"{version.ref} is pinned; unpin it first")
    previous = adapter.previous
    if previous is not None and previous.ref == version.ref:
        raise AdapterStateError(f"{version.ref} is what a rollback would bring back")
