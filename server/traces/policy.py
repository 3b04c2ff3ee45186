"""Whether a request is logged: the server's setting, the key's policy and the request's header can each say no."""

from typing import Literal

from server.errors import InvalidRequestError

LOG_HEADER = "X-Sterna-Log"
TracePolicy = Literal["on", "off"]


def unlogged_reason(
    *, is_enabled: bool, key_policy: TracePolicy, header: str | None
) -> Literal["settings", "key", "request"] | None:
    """Who said no; None: it is logged. `header`: the value of X-Sterna-Log, "off" or "on" ("on" overrules nobody)."""
    wanted = header.strip().lower() if header is not None else "on"
    if wanted not in ("on", "off"):
        raise InvalidRequestError(f"{LOG_HEADER} must be 'on' or 'off', not {wanted[:40]!r}", param=LOG_HEADER)
    if not is_enabled:
        return "settings"
    if key_policy == "off":
        return "key"
    return "request" if wanted == "off" else None
