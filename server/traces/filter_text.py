"""A TraceFilter from texts, spelled alike in a URL's query and on the command line.

A time is ISO 8601 (without a zone: in the caller's), or an age: `30d` is thirty days ago. Units: s, m, h, d, w.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, get_args

from server.errors import InvalidRequestError
from server.storage.clock import Clock, utc_now
from server.traces.filters import TraceFilter
from server.traces.record import Purpose, Status

FILTER_TEXTS = {
    "trace_id": "this trace alone",
    "adapter": "that the request named, also while the base answered for it",
    "version": "that answered, such as tools@7",
    "key_id": "the API key that asked; empty: none was needed",
    "user_id": "the request's user or safety_identifier",
    "episode_id": "an episode's id, or the key's own name for it",
    "purpose": "what the request was for",
    "status": "how it ended",
    "since": "at this time or later: ISO 8601, or an age such as 12h",
    "until": "before this time: ISO 8601, or an age such as 30d",
    "has_tool_calls": "the answer has tool calls",
    "has_tool_error": "a call came back as an error",
    "has_feedback": "there is feedback on it or its episode",
    "is_audit": "it was drawn for labelling",
}
"""Every field of TraceFilter, and what it says."""

_FLAGS = ("has_tool_calls", "has_tool_error", "has_feedback", "is_audit")
FILTER_CHOICES: dict[str, tuple[str, ...]] = {
    "purpose": get_args(Purpose),
    "status": get_args(Status),
    **dict.fromkeys(_FLAGS, ("true", "false")),
}
"""The fields that take one of a few values."""

_AGE = re.compile(r"([0-9]{1,9})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def read_filter(values: Mapping[str, str], *, zone: tzinfo | None = UTC, clock: Clock = utc_now) -> TraceFilter:
    """`zone`: of times that name none; None is this machine's. Raises InvalidRequestError."""
    found: dict[str, Any] = {}
    for name, text in values.items():
        choices = FILTER_CHOICES.get(name)
        if choices is not None and text not in choices:
            message = f"'{name}' is one of {', '.join(choices)}, not {text[:40]!r}"
            raise InvalidRequestError(message, param=name, code="invalid_value")
        if name in _FLAGS:
            found[name] = text == "true"
        elif name in ("since", "until"):
            found[name] = _read_time(text, name, zone, clock)
        else:
            found[name] = text
    return TraceFilter(**found)


def _read_time(text: str, name: str, zone: tzinfo | None, clock: Clock) -> datetime:
    """In UTC."""
    age = _AGE.fullmatch(text)
    try:
        if age is not None:
            return clock() - timedelta(**{_UNITS[age[2]]: int(age[1])})
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None and zone is not None:
            moment = moment.replace(tzinfo=zone)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):  # also a moment before the year 1
        raise InvalidRequestError(
            f"'{name}' is a time such as 2026-01-31, 2026-01-31T12:00:00Z, or an age such as 30d, not {text[:40]!r}",
            param=name,
            code="invalid_value",
        ) from None
