"""The version store: imports, exports and deletes versions, keeping the files and the registry in step.

An import checks everything on its own copy, claims a directory, moves the files there in one step and only then adds
the registry's row. Killed at any point it leaves nothing that anybody sees, or the whole version; `collect_garbage`
removes what is left over. The same content again is the same version.

Synchronous: call it from a thread. Paths come from an operator or from the registry, never from a request's model name.
"""

import json
import logging
import re
import shutil
import uuid
import zipfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from quant.model_types import ModelConfig
from server.adapters.files import VersionFiles
from server.adapters.registry import Registry
from server.adapters.source import MANIFEST_NAME, take
from server.adapters.states import DELETABLE
from server.adapters.version import Adapter, NewVersion, Version, VersionRef, check_adapter_name
from server.engine.lora import CONFIG_NAME, TENSORS_NAME, load_adapter_files
from server.engine.lora_types import LoraWeights
from server.errors import AdapterError
from server.storage.clock import Clock, utc_now

logger = logging.getLogger(__name__)

MAX_VERSION_BYTES = 2 << 30
"""Rank 64 on every matrix of an 8B model is 0.7 GB in float32; anything near this is a mistake."""
STALE_AFTER = timedelta(hours=1)
"""After this an import is taken for dead. It takes seconds; one that is slower fails and can be repeated."""
PANEL_ROWS = 16
"""The core packs matrices in panels of so many rows (quant/kernels/kernels.h, kPanel)."""
BLOCK = 32
"""8-bit values that share an f16 scale (kBlock); the last block of a row may be half a one (lora.inc)."""
_OURS = re.compile(r"[^/]+/[0-9a-f]{16}-[0-9a-f]{8}")
"""Directories that an import made. A user's own files under the same root are nobody's garbage."""


@dataclass(frozen=True, slots=True)
class Base:
    """The model that versions must fit. `names` are what requests call it: no adapter may be called so.

    `is_float`: a projection is not quantized, and so neither are its adapters.
    """

    digest: str
    config: ModelConfig
    names: frozenset[str]
    is_float: bool = False


class VersionStore:
    """Files and rows of one registry, for one base model."""

    def __init__(
        self,
        registry: Registry,
        files: VersionFiles,
        base: Base,
        *,
        max_version_bytes: int = MAX_VERSION_BYTES,
        clock: Clock = utc_now,
    ) -> None:
        self.registry = registry
        self.base = base
        self._files = files
        self.max_version_bytes = max_version_bytes
        self._clock = clock

    def create(self, adapter: str, *, asked_by: str, reason: str) -> tuple[Adapter, bool]:
        """An adapter that the base answers for until it has a live version, and whether it is new. AdapterError."""
        self._check_name(adapter)
        return self.registry.create(adapter, asked_by=asked_by, reason=reason)

    def import_version(
        self,
        source: Path,
        adapter: str,
        *,
        asked_by: str,
        reason: str,
        origin: str | None = None,
        parent: VersionRef | None = None,
        base_digest: str | None = None,
    ) -> tuple[Version, bool]:
        """The version that `source` (a directory or a zip file) now is, and whether it is new.

        `base_digest`: what it was trained on, if known. Raises AdapterError with the tensor or key and the reason.
        """
        self._check_name(adapter)
        if parent is not None:
            self.registry.version(parent)
        with self._files.staging() as staged:
            manifest = take(source, staged, max_bytes=self.max_version_bytes)
            for trained_on in (base_digest, manifest.base_digest):
                self._check_base(str(source), trained_on)
            weights = self._validated(staged, source)
            if manifest.digest not in (None, weights.digest):
                raise AdapterError(f"{source}: its digest is {weights.digest}, {MANIFEST_NAME} says {manifest.digest}")
            known = self.registry.find_content(adapter, weights.digest, self.base.digest)
            if known is not None:
                return known, False
            new = NewVersion(
                adapter=adapter,
                digest=weights.digest,
                base_digest=self.base.digest,
                rank=weights.rank,
                size_bytes=sum(file.stat().st_size for file in staged.iterdir()),
                memory_bytes=memory_bytes(weights, is_float=self.base.is_float),
                origin=_printable(origin or f"import of {source.name}"),
                parent=None if parent is None else str(parent),
                directory=f"{adapter}/{weights.digest[7:23]}-{uuid.uuid4().hex[:8]}",
            )
            return self._publish(staged, new, asked_by, reason)

    def load(self, version: Version) -> LoraWeights:
        """Read a version for the engine. Raises AdapterError when it is for another base or not what it was."""
        self._check_base(str(version.ref), version.base_digest)
        try:
            weights = load_adapter_files(self._files.local(version.directory), self.base.config)
            if weights.digest != version.digest:
                raise AdapterError(f"its files were changed: digest {weights.digest}, not {version.digest}")
        except AdapterError as error:
            self._files.forget(version.directory)  # a bad copy must not stay; the next load fetches again
            raise AdapterError(f"{version.ref}: {error}") from error
        return weights

    def staging(self) -> AbstractContextManager[Path]:
        """A fresh directory on the store's own disk, for what is on its way in or out; lives for an hour at most."""
        return self._files.staging()

    def path(self, version: Version) -> Path:
        """A directory here with its two files, to read only."""
        return self._files.local(version.directory)

    def delete(self, ref: VersionRef, *, asked_by: str, reason: str) -> Version:
        """Remove the files of a retired or rejected version; its row stays. Raises AdapterStateError."""
        version = self.registry.mark_deleted(ref, asked_by=asked_by, reason=reason)
        assert version.state in DELETABLE
        self._files.remove(version.directory)
        return version

    def collect_garbage(self) -> list[str]:
        """Remove directories that belong to nothing, and imports given up. Returns what was removed."""
        stale = self._clock() - STALE_AFTER
        self.registry.end_imports(started_before=stale)
        found = {one for one in self._files.directories() if _OURS.fullmatch(one)}
        garbage = sorted(found - self.registry.directories())  # read second: what it does not name now is unclaimed
        for directory in garbage:
            logger.info("removing %s, which belongs to no adapter version", directory)
            self._files.remove(directory)
        self._files.clean(stale)
        return garbage

    def export(self, ref: VersionRef, target: Path) -> Path:
        """Write a PEFT directory, or a zip file when `target` ends so, with the manifest beside. It must not exist."""
        version = self.registry.version(ref)
        if version.is_deleted:
            raise AdapterError(f"{ref} was deleted")
        if target.exists():
            raise AdapterError(f"{target} exists already")
        files = {name: self.path(version) / name for name in (CONFIG_NAME, TENSORS_NAME)}
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            if target.suffix == ".zip":
                with zipfile.ZipFile(beside, "x", zipfile.ZIP_STORED) as archive:  # weights do not compress
                    archive.writestr(zipfile.ZipInfo(MANIFEST_NAME), _manifest(version))  # no time: equal bytes
                    for name, path in files.items():
                        archive.write(path, name)
            else:
                beside.mkdir()
                (beside / MANIFEST_NAME).write_text(_manifest(version))
                for name, path in files.items():
                    shutil.copyfile(path, beside / name)
            beside.rename(target)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            beside.unlink(missing_ok=True)
            raise AdapterError(f"{target}: {error.strerror or error}") from error
        return target

    def _check_name(self, adapter: str) -> None:
        if check_adapter_name(adapter) in self.base.names:
            raise AdapterError(f"'{adapter}' is the base model's name; an adapter needs another")

    def _publish(self, staged: Path, new: NewVersion, asked_by: str, reason: str) -> tuple[Version, bool]:
        self.registry.begin_import(new.directory)
        self._files.publish(staged, new.directory)
        version, is_new = self.registry.add_version(new, asked_by=asked_by, reason=reason)
        if not is_new:  # another import of the same content was faster
            self._files.remove(new.directory)
        return version, is_new

    def _validated(self, staged: Path, source: Path) -> LoraWeights:
        try:
            return load_adapter_files(staged, self.base.config)
        except AdapterError as error:
            raise AdapterError(str(error).replace(str(staged), str(source))) from error

    def _check_base(self, what: str, trained_on: str | None) -> None:
        if trained_on not in (None, self.base.digest):
            raise AdapterError(f"{what} was trained on the base {trained_on}; this one is {self.base.digest}")


def memory_bytes(weights: LoraWeights, *, is_float: bool) -> int:
    """What the core packs, rows rounded up to whole panels: 8-bit blocks, or float32 beside a float base."""
    matrices = [matrix.shape for part in weights.projections for matrix in (part.a, part.b)]
    return sum(
        _up(rows, PANEL_ROWS) * (4 * columns if is_float else _up(columns, BLOCK // 2) + 2 * -(-columns // BLOCK))
        for rows, columns in matrices
    )


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _manifest(version: Version) -> str:
    values = {
        "version": str(version.ref),
        "digest": version.digest,
        "base_digest": version.base_digest,
        "parent": version.parent,
        "origin": version.origin,
        "created_at": version.created_at.isoformat(),
    }
    return json.dumps(values, indent=2) + "\n"


def _printable(text: str) -> str:
    """A name from outside, kept to one short line."""
    return (text if text.isprintable() else ascii(text))[:200]
