"""Takes an adapter from outside, a directory or a zip file, into a fresh directory of ours: two files and nothing else.

Whatever is there decides nothing: names are compared with a fixed list, links are not followed, sizes are bounded while
copying, and pickles are not even copied. What the files say is checked afterwards, on our copy (store.py).
"""

import json
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from server.engine.lora import CONFIG_NAME, MAX_CONFIG_BYTES, TENSORS_NAME
from server.errors import AdapterError, ServerUnavailableError

MANIFEST_NAME = "sterna.json"
"""Optional; `export` writes it. Says what the content's digest is and which base it was trained on."""
_IGNORED = frozenset(("README.md", ".gitattributes"))  # PEFT writes the one, a model hub the other
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_COPY_BYTES = 1 << 20
_ZIP_FAULTS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    OSError,  # a position before the file's beginning; damaged bzip2
    RuntimeError,  # encrypted, or (NotImplementedError) an unknown compression
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an exported version says of itself; None where nothing is said."""

    digest: str | None = None
    base_digest: str | None = None


def take(source: Path, target: Path, *, max_bytes: int) -> Manifest:
    """Copy the adapter at `source` into the empty directory `target`, synced to disk. Raises AdapterError."""
    try:
        status = os.lstat(source)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{source}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(status.st_mode):
        return _copy(directory_files(source), target, max_bytes)
    if stat.S_ISREG(status.st_mode):
        with _zip_faults(source):
            return _copy(_zip_files(source), target, max_bytes)
    raise AdapterError(f"{source} is neither a directory nor a zip file")


def _copy(opened: Generator[tuple[str, IO[bytes]], None, None], target: Path, max_bytes: int) -> Manifest:
    limits = {CONFIG_NAME: MAX_CONFIG_BYTES, TENSORS_NAME: max_bytes, MANIFEST_NAME: MAX_CONFIG_BYTES}
    manifest = Manifest()
    with closing(opened):
        for name, file in opened:
            blocks = _bounded(file, name, limits[name])
            if name == MANIFEST_NAME:
                manifest = _read_manifest(blocks)
            else:
                _write(target / name, blocks)
    return manifest


def _write(path: Path, blocks: Iterator[bytes]) -> None:
    try:
        with path.open("xb") as copy:
            copy.writelines(blocks)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError as error:  # faults of reading are AdapterErrors by now
        raise ServerUnavailableError(f"the adapter store failed: {error}") from error


def check_names(source: Path, names: list[str]) -> list[str]:
    """Those to copy. Raises AdapterError about any other."""
    wanted = (CONFIG_NAME, TENSORS_NAME, MANIFEST_NAME)
    for name in sorted(set(names) - _IGNORED - set(wanted)):
        shown = ascii(name)[1:-1][:200]
        if name.endswith(_PICKLES):
            raise AdapterError(f"{source}: {shown} is a pickle and is never read; save as safetensors")
        raise AdapterError(
            f"{source}: {shown} does not belong to an adapter, which is {CONFIG_NAME} and {TENSORS_NAME}"
        )
    if len(set(names)) < len(names):
        raise AdapterError(f"{source}: a name occurs twice")
    for name in (CONFIG_NAME, TENSORS_NAME):
        if name not in names:
            raise AdapterError(f"{source}: {name} is missing")
    return [name for name in wanted if name in names]


def directory_files(source: Path) -> Generator[tuple[str, IO[bytes]], None, None]:
    """The names and the opened files of an adapter's directory, those to copy only. Raises AdapterError."""
    try:
        names = check_names(source, os.listdir(source))
    except OSError as error:
        raise AdapterError(f"{source}: {error.strerror}") from None
    for name in names:
        with _open_regular(source / name) as file:
            yield name, file


@contextmanager
def _open_regular(path: Path) -> Iterator[IO[bytes]]:
    """A link is not followed; a pipe is not waited for."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link; copy the file itself" if path.is_symlink() else error.strerror
        raise AdapterError(f"{path}: {reason}") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise AdapterError(f"{path}: it is no regular file")
    with open(number, "rb") as file:
        yield file


def _zip_files(source: Path) -> Generator[tuple[str, IO[bytes]], None, None]:
    with _open_regular(source) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for name in check_names(source, [entry.filename for entry in entries]):
            entry = archive.getinfo(name)
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise AdapterError(f"{source}: {name} is a symbolic link")
            with archive.open(entry) as member:
                yield name, member


@contextmanager
def _zip_faults(source: Path) -> Iterator[None]:
    try:
        yield
    except _ZIP_FAULTS as error:
        raise AdapterError(f"{source}: the zip file is damaged or of a kind that is not read: {error}") from None


def _bounded(file: IO[bytes], name: str, limit: int) -> Iterator[bytes]:
    """The file's blocks; sizes that a header claims prove nothing."""
    total = 0
    while True:
        try:
            block = file.read(_COPY_BYTES)
        except OSError as error:
            raise AdapterError(f"{name}: {error.strerror or error}") from None
        if not block:
            return
        total += len(block)
        if total > limit:
            raise AdapterError(f"{name} is larger than {limit} bytes")
        yield block


def _read_manifest(blocks: Iterator[bytes]) -> Manifest:
    try:
        values: Any = json.loads(b"".join(blocks))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{MANIFEST_NAME} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{MANIFEST_NAME} must hold an object")
    digests = {}
    for key in ("digest", "base_digest"):
        value = values.get(key)
        if value is not None and not (isinstance(value, str) and value.startswith("sha256:")):
            raise AdapterError(f"{MANIFEST_NAME}: {key} is {str(value)[:100]!r}; it must be 'sha256:' and a hash")
        digests[key] = value
    return Manifest(**digests)
