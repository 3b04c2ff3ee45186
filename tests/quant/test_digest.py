"""Digests: the file's SHA-256, a cache that never answers for other bytes, and a directory's combined digest."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from quant.digest import file_digest
from quant.errors import ModelFileError
from quant.model_file import open_model
from tests.tiny_models import write_tiny_gguf, write_tiny_hf

OLD = 1_600_000_000


def write_old(path: Path, content: bytes, mtime: int = OLD) -> Path:
    """Write a file that is old enough to be remembered."""
    path.write_bytes(content)
    os.utime(path, (mtime, mtime))
    return path


def forge(cache: Path) -> None:
    """Change the one remembered digest, to see whether it is used."""
    (entry,) = cache.iterdir()
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"sha256": "f" * 64}))


def test_gguf_digest_is_the_files_sha256(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    assert open_model(path).digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_remembered_digest_is_used_until_the_file_changes(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "digests"
    path = write_old(tmp_path / "f", b"one")
    assert file_digest(path, cache) == hashlib.sha256(b"one").hexdigest()
    forge(cache)
    assert file_digest(path, cache) == "f" * 64
    link = tmp_path / "link"
    link.symlink_to(path)
    assert file_digest(link, cache) == "f" * 64
    assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    write_old(path, b"two", OLD + 1)
    assert file_digest(path, cache) == hashlib.sha256(b"two").hexdigest()


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    assert file_digest(path, tmp_path / "cache") == hashlib.sha256(b"one").hexdigest()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sha256": "no"}', b"\xff"])
def test_a_broken_entry_is_computed_anew(tmp_path: Path, content: bytes) -> None:
    cache = tmp_path / "cache"
    path = write_old(tmp_path / "f", b"one")
    file_digest(path, cache)
    (entry,) = cache.iterdir()
    entry.write_bytes(content)
    assert file_digest(path, cache) == hashlib.sha256(b"one").hexdigest()
    assert json.loads(entry.read_text())["sha256"] == hashlib.sha256(b"one").hexdigest()


def test_a_cache_that_cannot_be_written_costs_no_answer(tmp_path: Path) -> None:
    path = write_old(tmp_path / "f", b"one")
    cache = tmp_path / "cache"
    cache.write_bytes(b"a file where the folder should be")
    assert file_digest(path, cache) == hashlib.sha256(b"one").hexdigest()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="gone: No such file"):
        file_digest(tmp_path / "gone")


def test_a_file_replaced_after_opening_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    model = open_model(path)
    write_tiny_gguf(tmp_path / "new.gguf", seed=1).replace(path)
    with pytest.raises(ModelFileError, match="changed or replaced"):
        model.digest  # noqa: B018
    path.unlink()
    with pytest.raises(ModelFileError, match="No such file"):
        model.digest  # noqa: B018


def test_a_directorys_digest_covers_contents_and_names_only(tmp_path: Path) -> None:
    first = open_model(write_tiny_hf(tmp_path / "a", num_shards=2)).digest
    assert first == open_model(write_tiny_hf(tmp_path / "b", num_shards=2)).digest
    assert first != open_model(write_tiny_hf(tmp_path / "c", num_shards=2, seed=1)).digest
    assert first != open_model(tmp_path / "a", quantize="q8_0").digest
    (tmp_path / "a" / "README.md").write_text("no part of the model")
    assert first == open_model(tmp_path / "a").digest
    (tmp_path / "a" / "chat_template.jinja").write_text("another")
    assert first != open_model(tmp_path / "a").digest
