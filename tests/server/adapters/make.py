"""Short ways to versions in any state, as registry rows or as plain objects."""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from server.adapters.registry import Registry
from server.adapters.states import State
from server.adapters.version import NewVersion, Version, VersionRef

BASE = "sha256:" + "b" * 64
WHO: dict[str, str] = {"asked_by": "user:ada", "reason": "a test"}


def digest_of(text: str) -> str:
    return f"sha256:{sha256(text.encode()).hexdigest()}"


def new(adapter: str = "tools", content: str = "1", **changes: Any) -> NewVersion:
    values = {
        "adapter": adapter, "digest": digest_of(content), "base_digest": BASE, "rank": 4, "size_bytes": 1000,
        "memory_bytes": 2000, "origin": "a test", "parent": None, "directory": f"{adapter}/{digest_of(content)[7:]}",
    }  # fmt: skip
    return NewVersion(**(values | changes))


def add(registry: Registry, adapter: str = "tools", content: str = "1", **changes: Any) -> VersionRef:
    return registry.add_version(new(adapter, content, **changes), **WHO)[0].ref


def put_live(registry: Registry, ref: VersionRef, **options: Any) -> None:
    registry.promote(ref, override=True, **options, **WHO)


def version(
    number: int = 1, adapter: str = "tools", state: State = State.CANDIDATE, *, memory_bytes: int = 1, **changes: Any
) -> Version:
    """Not in any registry."""
    values = {
        "ref": VersionRef(adapter, number), "state": state, "digest": digest_of(f"{adapter}@{number}"),
        "base_digest": BASE, "rank": 4, "size_bytes": 1000, "memory_bytes": memory_bytes, "origin": "a test",
        "parent": None, "directory": f"{adapter}/{number}", "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "predecessor": None, "state_change": number, "is_pinned": False, "is_deleted": False,
    }  # fmt: skip
    return Version(**(values | changes))
