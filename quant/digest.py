"""SHA-256 of model files, cached by path, size and modification time so that a start need not read the file twice.

The cache is a folder of small JSON files. It is only ever a shortcut: an entry that is stale, torn or unreadable is
computed anew, and a folder that cannot be written costs time, not an answer.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant.errors import ModelFileError
from quant.mapping import MappedFile

_DIGEST = re.compile(r"[0-9a-f]{64}")
# A file written to just now can change again within the same tick of its modification time: do not remember it yet.
_RACY_SECONDS = 2.0


def file_digest(path: Path, cache_dir: Path | None = None) -> str:
    """SHA-256 of a file, as hex. Raises ModelFileError when it cannot be read."""
    real_path = path.resolve()
    try:
        with real_path.open("rb") as file:
            status = os.fstat(file.fileno())
            key = {"path": str(real_path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
            entry = (
                None if cache_dir is None else cache_dir / f"{hashlib.sha256(os.fsencode(real_path)).hexdigest()}.json"
            )
            known = entry and _lookup(entry, key)
            if known:
                return known
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(path, error.strerror or str(error)) from error
    if entry is not None and time.time() - status.st_mtime > _RACY_SECONDS:
        _store(entry, key | {"sha256": digest})
    return digest


def mapped_digest(file: MappedFile, cache_dir: Path | None = None) -> str:
    """As `file_digest`, but refuses a path that no longer names the mapped bytes."""
    digest = file_digest(file.path, cache_dir)
    try:
        status = file.path.stat()
    except OSError as error:
        raise ModelFileError(file.path, error.strerror or str(error)) from error
    if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != file.identity:
        raise ModelFileError(file.path, "the file was changed or replaced while it was being loaded")
    return digest


def combined_digest(
    mapped: Sequence[MappedFile], others: Sequence[Path], cache_dir: Path | None = None, *, suffix: str = ""
) -> str:
    """One SHA-256 over the names and contents of a folder's files, and over `suffix`: how they are quantized."""
    digests = {file.path.name: mapped_digest(file, cache_dir) for file in mapped}
    digests |= {path.name: file_digest(path, cache_dir) for path in others}
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))  # as `sha256sum` prints them
    return hashlib.sha256((lines + suffix).encode()).hexdigest()


def _lookup(entry: Path, key: dict[str, Any]) -> str | None:
    try:
        known = json.loads(entry.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or any(known.get(name) != value for name, value in key.items()):
        return None
    digest = known.get("sha256")
    return digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else None


def _store(entry: Path, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file)
            os.replace(temporary, entry)
        except OSError:
            os.unlink(temporary)
            raise
