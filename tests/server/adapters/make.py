"""Short ways to versions in any state, as registry rows or as plain objects, and to adapter files and stores."""

import tempfile
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from server.adapters.files import open_files
from server.adapters.registry import Registry
from server.adapters.states import State
from server.adapters.store import Base, VersionStore
from server.adapters.version import NewVersion, Version, VersionRef
from tests.server.engine.test_lora_files import BASE_CONFIG, MODEL, tensors_for, write_adapter

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
    return put(registry, new(adapter, content, **changes))[0].ref


def put(registry: Registry, version: NewVersion) -> tuple[Version, bool]:
    """Claim its directory, then number it, as the store does."""
    directory = f"{version.directory}-{uuid.uuid4().hex}"
    registry.begin_import(directory)
    return registry.add_version(replace(version, directory=directory), **WHO)


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


def adapter_dir(path: Path, content: int = 1, *, model: Any = MODEL, **config: Any) -> Path:
    """A PEFT directory for the small model, made without PEFT; `content` makes its numbers."""
    tensors = tensors_for(
        [(layer, projection) for layer in range(model.num_layers) for projection in ("q_proj", "v_proj")], model=model
    )
    scaled = {name: (values * content, dtype) for name, (values, dtype) in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_adapter(path, BASE_CONFIG | config, scaled)


def store_at(registry: Registry, root: str | Path, *, base: str = BASE, **options: Any) -> VersionStore:
    """`root`: a path or an fsspec URL."""
    copies = Path(tempfile.mkdtemp(prefix="sterna-copies-"))
    files = open_files(str(root), copies)
    return VersionStore(registry, files, Base(base, MODEL, frozenset({"base-model"})), **options)  # type: ignore[arg-type]
