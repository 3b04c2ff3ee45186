"""Adapters on this machine: a directory packed for its way to the server, a file taken (or unpacked) on its way back.

The rules of which files belong to an adapter are the server's own (server/adapters/source.py), so that what it would
refuse is refused here with the same words before anything is sent.
"""

import mmap
import os
import shutil
import stat
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from server.adapters.source import check_names, directory_files
from server.errors import AdapterError


@contextmanager
def opened_for_import(source: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A zip file as it is, or a directory as a zip file without a name; and its size. Raises AdapterError."""
    try:
        status = os.stat(source, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode):
            with source.open("rb") as file:
                yield file, status.st_size
            return
    except OSError as error:
        raise AdapterError(f"{source}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise AdapterError(f"{source} is neither a directory nor a zip file")
    with tempfile.TemporaryFile(prefix="sterna-") as packed:
        num_bytes = _pack(source, packed)
        packed.seek(0)
        yield packed, num_bytes


def _pack(source: Path, target: IO[bytes]) -> int:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # weights do not compress
        for name, file in directory_files(source):
            try:
                with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                    shutil.copyfileobj(file, member, 1 << 20)
            except OSError as error:
                raise AdapterError(f"{source}/{name} could not be packed: {error.strerror}") from None
    return target.tell()


@contextmanager
def written_to(target: Path, *, is_zip: bool = True) -> Iterator[IO[bytes]]:
    """A file that becomes `target` at the end; a zip file is unpacked into a directory unless it is called .zip.

    `target` appears whole or not at all. Raises AdapterError when it exists or cannot be written.
    """
    if os.path.lexists(target):
        raise AdapterError(f"{target} exists already")
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        if target.suffix == ".zip" or not is_zip:
            with beside.open("x+b") as file:
                yield file
        else:
            with tempfile.TemporaryFile(prefix="sterna-") as packed:
                yield packed
                _unpack(packed, target, beside)
        beside.rename(target)
    except OSError as error:
        raise AdapterError(f"{target}: {error.strerror}") from None
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)


def folded_tensors(target: Path, file: IO[bytes]) -> list[str]:
    """Of a LoRA GGUF file that just came: the tensors with a part of the scale in their B. Raises AdapterError."""
    from quant.errors import ModelFileError
    from quant.gguf_reader import read_header
    from quant.lora_gguf import FOLDED_KEY

    file.flush()
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names: list[str] = read_header(data, target).metadata.get(FOLDED_KEY, [])
    except (ModelFileError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise AdapterError(f"{target}: what came is no whole GGUF file: {error}") from None
    return names


def _unpack(packed: IO[bytes], target: Path, directory: Path) -> None:
    directory.mkdir()
    try:
        with zipfile.ZipFile(packed) as archive:
            for name in check_names(target, archive.namelist()):
                with archive.open(name) as member, (directory / name).open("xb") as copy:
                    shutil.copyfileobj(member, copy, 1 << 20)
    except zipfile.BadZipFile as error:
        raise AdapterError(f"{target}: what came is no whole zip file: {error}") from None
