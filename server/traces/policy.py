"""Whether a request is logged: the server's setting, the key's policy and the request's header can each say no."""

from typing import Literal

from server.errors import InvalidRequestError

LOG_HEADER = "X-Sterna-Log"
TracePolicy = Literal["on", "off"]


def should_log(*, is_enabled: bool, key_policy: TracePolicy, header: str | None) -> bool:
    """`header`: the value of X-Sterna-Log, "off" or "on" ("on" does not overrule the others). None: not sent."""
    wanted = header.strip().lower() if header is not None else "on"
    if wanted not in ("on", "off"):
        raise InvalidRequestError(f"{LOG_HEADER} must be 'on' or 'off', not {wanted[:40]!r}", param=LOG_HEADER)
    return is_enabled and key_policy == "on" and wanted == "on"
