"""kill -9 in the middle of an import, at line after line: nothing visible or the whole version, and a repeat works."""

import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from server.adapters.registry import Registry
from server.adapters.version import VersionRef
from server.storage.database import open_database
from tests.server.adapters.make import WHO, adapter_dir, store_at

WATCHED = ("server/adapters/", "server/storage/database.py", "pathlib.py", "shutil.py")
ENOUGH_LINES = 10_000


def import_in_child(url: str, root: Path, source: Path, kill_at: int | None) -> tuple[int, int]:
    """Fork a process that imports and dies at its n-th watched line. Returns its wait status and lines executed."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        num_lines = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal num_lines
            if not any(part in frame.f_code.co_filename for part in WATCHED):
                return None
            if event == "line":
                num_lines += 1
                if num_lines == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        code = 1
        try:
            store = store_at(Registry(open_database(url)), root)
            sys.settrace(trace)
            store.import_version(source, "tools", **WHO)
            sys.settrace(None)
            os.write(write_end, str(num_lines).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    status = os.waitpid(pid, 0)[1]
    with open(read_end, "rb") as pipe:
        lines = pipe.read()
    return status, int(lines or b"0")


def check_one(tmp_path: Path, source: Path, kill_at: int) -> bool:
    """Whether the version was visible after the kill."""
    url, root = f"sqlite:///{tmp_path}/registry.db", tmp_path / "store"
    open_database(url).close()
    status, _ = import_in_child(url, root, source, kill_at)
    assert os.WIFSIGNALED(status), f"the import ended before line {kill_at}"
    database = open_database(url)
    registry = Registry(database)
    later = store_at(registry, root, clock=lambda: datetime.now(UTC) + timedelta(hours=2))
    visible = registry.adapters()
    for adapter in visible:
        for version in adapter.versions.values():
            assert later.load(version).digest == version.digest
    version, is_new = later.import_version(source, "tools", **WHO)
    assert version.ref == VersionRef("tools", 1)
    assert is_new is (not visible)
    later.collect_garbage()
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert left == {f"{version.directory}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert later.load(version).digest == version.digest
    database.close()
    return bool(visible)


def kill_everywhere(tmp_path: Path, num_kills: int) -> None:
    source = adapter_dir(tmp_path / "peft")
    (tmp_path / "count").mkdir()
    url = f"sqlite:///{tmp_path}/count/registry.db"
    open_database(url).close()
    status, num_lines = import_in_child(url, tmp_path / "count" / "store", source, None)
    assert status == 0
    assert 100 < num_lines < ENOUGH_LINES
    seen = set()
    for index in range(num_kills):
        kill_at = 1 + index * (num_lines - 1) // max(num_kills - 1, 1)
        directory = tmp_path / f"at-{kill_at}"
        directory.mkdir()
        seen.add(check_one(directory, source, kill_at))
    assert seen == {True, False}  # the last lines come after the commit


def test_killed_at_some_lines(tmp_path: Path) -> None:
    kill_everywhere(tmp_path, 12)


@pytest.mark.slow
def test_killed_at_many_lines(tmp_path: Path) -> None:
    kill_everywhere(tmp_path, 80)
