"""Where the files of versions are kept: a local directory, or anything that fsspec reaches (S3, GCS, ...).

A directory of the store is `<adapter>/<unique name>`, claimed in the registry before anything appears under it, never
changed afterwards, and never named by a request. Locally it appears whole, by one rename of synced files.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from server.engine.lora import CONFIG_NAME, TENSORS_NAME
from server.errors import AdapterError, ConfigError, ServerUnavailableError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem  # type: ignore[import-untyped]

STAGING, TRASH = ".staging", ".trash"
_HIDDEN = "."


class VersionFiles(Protocol):
    """One store's files. Faults of the store are ServerUnavailableError."""

    def staging(self) -> "_Staging":
        """A context manager: a fresh local directory, gone afterwards unless it was published."""

    def publish(self, staged: Path, directory: str) -> None:
        """Make the staged files the content of `directory`; `staged` may be gone afterwards."""

    def local(self, directory: str) -> Path:
        """Where the files can be read here; fetches them first when they are elsewhere."""

    def directories(self) -> list[str]:
        """All there are."""

    def remove(self, directory: str) -> None:
        """Once or again."""

    def clean(self, before: datetime) -> None:
        """Remove what was begun before and left half done by a process that died."""

    def forget(self, directory: str) -> None:
        """Drop the local copy of remote files, which turned out to be wrong."""


class _Staging:
    """A fresh directory under `<root>/.staging`."""

    def __init__(self, root: Path) -> None:
        self._path = root / STAGING / uuid.uuid4().hex

    def __enter__(self) -> Path:
        with _faults():
            self._path.mkdir(parents=True)
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class LocalFiles:
    """Versions under one local directory; made when first written to."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def staging(self) -> _Staging:
        return _Staging(self._root)

    def publish(self, staged: Path, directory: str) -> None:
        target = self._path(directory)
        with _faults():
            target.parent.mkdir(parents=True, exist_ok=True)
            sync_directory(staged)
            os.rename(staged, target)  # fails, harmlessly, when the staged files were cleaned away
            for parent in (target.parent, self._root, self._root.parent):
                sync_directory(parent)

    def local(self, directory: str) -> Path:
        return self._path(directory)

    def directories(self) -> list[str]:
        with _faults():
            return [
                f"{adapter.name}/{version.name}"
                for adapter in _children(self._root)
                if not adapter.name.startswith(_HIDDEN)
                for version in _children(adapter)
            ]

    def remove(self, directory: str) -> None:
        self._discard(self._path(directory))

    def clean(self, before: datetime) -> None:
        with _faults():
            for staged in _children(self._root / STAGING):
                if staged.stat().st_mtime < before.timestamp():
                    self._discard(staged)
            for dead in _children(self._root / TRASH):
                shutil.rmtree(dead, ignore_errors=True)

    def forget(self, directory: str) -> None:
        """There is no copy: what is here is the original."""

    def _discard(self, path: Path) -> None:
        """First out of sight in one step, so that nobody ever sees half of it."""
        trash = self._root / TRASH / uuid.uuid4().hex
        with _faults():
            trash.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(path, trash)
            except FileNotFoundError:
                return
        shutil.rmtree(trash, ignore_errors=True)

    def _path(self, directory: str) -> Path:
        adapter, _, name = directory.partition("/")
        assert adapter, "directories come from the registry"
        assert name, "directories come from the registry"
        assert not {adapter[0], name[0]} & {"."}, "no way out of the store"
        assert "/" not in name, "no way out of the store"
        return self._root / adapter / name


class RemoteFiles:
    """Versions under an fsspec URL, with a local directory of copies."""

    def __init__(self, filesystem: "AbstractFileSystem", root: str, copies: Path) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._copies = LocalFiles(copies)

    def staging(self) -> _Staging:
        return self._copies.staging()

    def publish(self, staged: Path, directory: str) -> None:
        """No rename is needed: nobody looks there before the registry names it."""
        with _faults():
            self._fs.makedirs(self._url(directory), exist_ok=True)
            for file in sorted(staged.iterdir()):
                self._fs.put_file(str(file), f"{self._url(directory)}/{file.name}")
                if self._fs.size(f"{self._url(directory)}/{file.name}") != file.stat().st_size:
                    raise ServerUnavailableError(f"the adapter store kept only a part of {file.name}")

    def local(self, directory: str) -> Path:
        path = self._copies.local(directory)
        if not path.is_dir():
            with self.staging() as staged:
                with _faults():
                    for name in (CONFIG_NAME, TENSORS_NAME):
                        try:
                            self._fs.get_file(f"{self._url(directory)}/{name}", str(staged / name))
                        except FileNotFoundError:
                            raise AdapterError(f"{directory}/{name} is not in the adapter store") from None
                try:
                    self._copies.publish(staged, directory)
                except ServerUnavailableError:
                    if not path.is_dir():  # else another load was faster, with the same bytes
                        raise
        return path

    def directories(self) -> list[str]:
        with _faults():
            if not self._fs.exists(self._root):
                return []
            adapters = self._fs.ls(self._root, detail=False)
            found = [url for adapter in adapters for url in self._fs.ls(adapter, detail=False)]
        return ["/".join(url.rstrip("/").rsplit("/", 2)[1:]) for url in found]

    def remove(self, directory: str) -> None:
        self._copies.remove(directory)
        with _faults():
            for name in (
                CONFIG_NAME,
                TENSORS_NAME,
            ):  # not `rm(recursive=True)`, which takes "[" in the URL for a pattern
                if self._fs.exists(f"{self._url(directory)}/{name}"):
                    self._fs.rm_file(f"{self._url(directory)}/{name}")
        with suppress(OSError):  # object stores have no directories
            self._fs.rmdir(self._url(directory))

    def clean(self, before: datetime) -> None:
        """Also copies of versions that another server deleted. Copies first: what is fetched meanwhile is not seen."""
        self._copies.clean(before)
        for directory in sorted({*self._copies.directories()} - {*self.directories()}):
            self._copies.remove(directory)

    def forget(self, directory: str) -> None:
        self._copies.remove(directory)

    def _url(self, directory: str) -> str:
        return f"{self._root}/{directory}"


def open_files(url: str, copies: Path) -> VersionFiles:
    """`url` is a path or an fsspec URL; `copies` holds local copies of remote versions. Raises ConfigError."""
    if "://" not in url:
        return LocalFiles(Path(url).expanduser())
    if url.startswith("file://"):
        return LocalFiles(Path(url.removeprefix("file://")))
    # Here, because it would cost every start of a server with a local store.
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        filesystem, root = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"the adapter store {url} cannot be opened: {error}") from None
    return RemoteFiles(filesystem, str(root), copies)


def sync_directory(path: Path) -> None:
    """Put a directory's entries on disk."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _children(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ServerUnavailableError(f"the adapter store failed: {error}") from error
