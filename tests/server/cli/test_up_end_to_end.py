"""`sterna up` for real, on a tiny model: a round on request, the sidecar killed in it, and an end in order."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.rounds.round import Phase
from finetune.rounds.store import RoundStore
from server.storage.database import open_database
from tests.patience import PATIENCE_SECONDS, until
from tests.server.cli.learning import SETTINGS, conversations
from tests.tiny_models import write_tiny_gguf

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


class Up:
    """Both processes, and everything they have said."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("STERNA_")}
        self.environment |= SETTINGS | {
            "PYTHONPATH": str(ROOT),
            "STERNA_DATA_DIR": str(folder / "data"),
            "STERNA_MODEL": str(model),
        }
        self.folder = folder
        command = [sys.executable, "-m", "server.cli", "up", "--port", "0", "--threads", "1", "--kv-memory", "64MiB"]
        self.process = subprocess.Popen(
            [*command, "--finetune-port", "0"],
            cwd=folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        try:
            self.wait_for(lambda: self.said(r"Sterna is up"))
            found = self.said(r"it serves on (\S+) and learns on (\S+)")
            assert found is not None
        except BaseException:
            self.close()
            raise
        self.url, self.sidecar = found[1], found[2]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def said(self, pattern: str) -> "re.Match[str] | None":
        return next((found for line in reversed(self.lines) if (found := re.search(pattern, line))), None)

    def wait_for(self, is_so: Callable[[], Any]) -> None:
        until(lambda: is_so() or self.process.poll() is not None, lambda: "\n".join(self.lines))
        assert self.process.poll() is None, "\n".join(self.lines)

    def sterna(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "server.cli", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True
        ).stdout

    def rounds(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.sterna("finetune", "rounds", "--json"))
        return found

    def phases(self) -> list[Phase]:
        """From the database: a command takes so long to start that a whole phase could pass between two."""
        with closing(open_database(f"sqlite:///{self.folder}/data/sterna.db")) as database:
            return [one.phase for one in RoundStore(database).list(limit=9)]

    def sidecar_pid(self) -> int:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
                parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == self.process.pid and b"finetune" in words:
                return int(path.parent.name)
        raise AssertionError("there is no sidecar")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    made = Up(tmp_path, write_tiny_gguf(tmp_path / "tiny.gguf", context_length=4096))
    try:
        yield made
    finally:
        made.close()


def test_a_round_survives_the_death_of_the_sidecar(up: Up) -> None:
    (up.folder / "log.jsonl").write_text(conversations())
    up.sterna("traces", "import", "log.jsonl", "--adapter", "tools")
    assert httpx.post(f"{up.sidecar}/rounds", json={"adapter": "tools"}, timeout=PATIENCE_SECONDS).status_code == 202
    up.wait_for(lambda: up.phases() == [Phase.TRAIN])
    os.kill(up.sidecar_pid(), signal.SIGKILL)
    up.wait_for(lambda: up.said(r"finetune ended \(exit code -9\); started again in 1 s"))
    up.wait_for(lambda: up.rounds()[0]["result"])
    (round,) = up.rounds()
    assert round["result"] in ("canary", "rejected"), round["reason"]
    assert round["num_restarts"] == 0
    assert round["facts"]["train"]["num_steps"] == 40
    assert round["decision"]["opponent"] == "tiny"
    report = up.sterna("finetune", "report", "tools-r1")
    assert "## tools@1 against tiny (the base: no version is live)" in report
    assert (
        httpx.get(f"{up.url}/v1/adapters/tools", timeout=PATIENCE_SECONDS).json()["versions"][0]["origin"] == "tools-r1"
    )
    assert httpx.get(f"{up.url}/health", timeout=PATIENCE_SECONDS).status_code == 200, "the server never noticed"
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(PATIENCE_SECONDS) == 0
    assert not any("Traceback" in line for line in up.lines), "\n".join(up.lines)
    assert any(line.startswith("serve    | Sterna serves tiny on http://127.0.0.1:") for line in up.lines)
    assert any(line.startswith("finetune | Sterna learns on http://127.0.0.1:") for line in up.lines)
