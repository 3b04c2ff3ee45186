"""What a request's `X-Sterna-*` headers say about its trace: the episode, whether to log it, and its purpose."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from server.errors import InvalidRequestError
from server.openai.access import Caller
from server.traces.episodes import EPISODE_HEADER
from server.traces.policy import LOG_HEADER
from server.traces.record import Purpose

PURPOSE_HEADER = "X-Sterna-Purpose"
MAX_EPISODE_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Notes:
    episode: str | None = None
    log: str | None = None
    """The header's value; server/traces/policy.py reads it."""
    purpose: Purpose = "user"


def read_notes(headers: Mapping[str, str], caller: Caller) -> Notes:
    """Raises InvalidRequestError, and MissingScopeError for a purpose that traffic may not claim."""
    episode = headers.get(EPISODE_HEADER)
    if episode is not None and not (0 < len(episode) <= MAX_EPISODE_LENGTH and episode.isprintable()):
        raise InvalidRequestError(
            f"{EPISODE_HEADER} has 1 to {MAX_EPISODE_LENGTH} printable characters, not {len(episode)}",
            param=EPISODE_HEADER,
        )
    return Notes(episode, headers.get(LOG_HEADER), _purpose(headers.get(PURPOSE_HEADER), caller))


def _purpose(wanted: str | None, caller: Caller) -> Purpose:
    match wanted:
        case None | "user":
            return "user"
        case "evaluation":
            caller.require("train")
            return "evaluation"
        case _:
            accepted = " or ".join(f"'{one}'" for one in get_args(Purpose))
            raise InvalidRequestError(f"{PURPOSE_HEADER} is {accepted}, not {wanted[:40]!r}", param=PURPOSE_HEADER)
