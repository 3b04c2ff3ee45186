"""The words of the registry as plain data: a reference (`tools@7`), a version, an adapter with its versions, a change.

Names are checked here once: they become folder names and model names, so they hold no slash, no `@` and no leading dot.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Self

from server.adapters.states import Action, State
from server.errors import AdapterError

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_REFERENCE = re.compile(r"(?P<adapter>[a-z0-9][a-z0-9_.-]{0,63})@(?P<number>[1-9][0-9]{0,8})")


def check_adapter_name(name: str) -> str:
    """The name itself. Raises AdapterError."""
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"{name[:100]!r} is no adapter name: 1 to 64 of a-z, 0-9, '_', '.' and '-', the first a letter or digit"
        )
    return name


class VersionRef(NamedTuple):
    """`tools@7`: the adapter's name and the version's number, from 1."""

    adapter: str
    number: int

    def __str__(self) -> str:
        return f"{self.adapter}@{self.number}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None when the text is no reference: `tools`, `tools@latest`, `tools@07`."""
        match = _REFERENCE.fullmatch(text)
        return cls(match["adapter"], int(match["number"])) if match else None


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable result of training; only `state` and what belongs to it ever changes."""

    ref: VersionRef
    state: State
    digest: str
    """"sha256:<hex>" of the content (server/engine/lora.py); part of every KV block's key."""
    base_digest: str
    rank: int
    size_bytes: int
    """Of the two files."""
    memory_bytes: int
    """What it takes in the engine."""
    origin: str
    """Where it came from: an import's file name, a training round."""
    parent: str | None
    """The version that a warm start began with."""
    directory: str
    """Relative to the store's root; never from a request."""
    created_at: datetime
    predecessor: int | None
    """The number that was live when this one went live; None: the base. A rollback goes there."""
    state_change: int
    """The change that brought the present state. Draws are keyed by it, so that no two promotions share one."""
    is_pinned: bool
    """Kept: cannot be deleted."""
    is_deleted: bool
    """Its files are gone, its row stays for the traces that name it."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One line of versions and how its traffic is shared."""

    name: str
    change: int
    """The number of its last change: what a decision is based on."""
    canary_share: float
    shadow_share: float
    hold_back_share: float
    versions: Mapping[int, Version]

    def in_state(self, state: State) -> Version | None:
        """The version in an exclusive state."""
        return next((one for one in self.versions.values() if one.state is state), None)

    @property
    def live(self) -> Version | None:
        return self.in_state(State.LIVE)

    @property
    def previous(self) -> Version | None:
        """What a rollback would bring back; None: the base. Deleted versions in between are passed over."""
        version = self.live
        while version is not None and version.predecessor is not None:
            version = self.versions[version.predecessor]
            if not version.is_deleted:
                return version
        return None


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What an import knows of a version before the registry numbers it."""

    adapter: str
    digest: str
    base_digest: str
    rank: int
    size_bytes: int
    memory_bytes: int
    origin: str
    parent: str | None
    directory: str


@dataclass(frozen=True, slots=True)
class Change:
    """One row of the history: what happened, when, why and who asked."""

    number: int
    """Grows by one with every change of any adapter, in the order of commit."""
    adapter: str
    ref: VersionRef | None
    """None: of the adapter itself."""
    action: Action
    from_state: State | None
    to_state: State | None
    share: float | None
    """Of the traffic, where the action sets one; with a promotion the share held back."""
    reason: str
    asked_by: str
    at: datetime
