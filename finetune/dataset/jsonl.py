"""Compressed JSON lines whose digest is that of what they say, and folders that appear whole or not at all.

The digest is taken before compression, so that another zlib gives another file but the same snapshot.
"""

import gzip
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PARTIAL = ".partial-"
_LEVEL = 6


@dataclass(frozen=True)
class Written:
    sha256: str
    num_rows: int


def write_lines(path: Path, lines: Iterable[bytes]) -> Written:
    """`lines` end with a newline each. On the disk when this returns."""
    digest, num_rows = hashlib.sha256(), 0
    with path.open("wb") as file:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=_LEVEL, mtime=0) as packed:
            for line in lines:
                packed.write(line)
                digest.update(line)
                num_rows += 1
        file.flush()
        os.fsync(file.fileno())
    return Written(digest.hexdigest(), num_rows)


def write_file(path: Path, content: bytes) -> None:
    """On the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        yield from file


def digest_of(path: Path) -> Written:
    """Of a file that was written: to be compared."""
    digest, num_rows = hashlib.sha256(), 0
    for line in read_lines(path):
        digest.update(line)
        num_rows += 1
    return Written(digest.hexdigest(), num_rows)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(root: Path) -> Iterator[Path]:
    """A partial folder, to be filled and then moved by `settle`; gone at the end if it was not."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root / (PARTIAL + uuid.uuid4().hex)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settle(folder: Path, final: Path) -> None:
    """In one step; what is there already stays, for it has the same content."""
    _sync(folder)
    try:
        folder.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    _sync(final.parent)


def remove_partial(root: Path) -> None:
    """What a killed process left behind. Call it only where nobody else can be writing (under the adapter's lease)."""
    if root.is_dir():
        for folder in root.glob(PARTIAL + "*"):
            shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
