"""The real sidecar killed by `kill -9` at random moments: its round ends as the one that nobody disturbed.

50 kills, some ten minutes: STERNA_TEST_KILL_ROUNDS=50 pytest -n 0 -m slow tests/server/cli/test_sidecar_kills.py
"""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.rounds.round import Round
from finetune.rounds.store import RoundStore
from server.storage.database import open_database
from server.traces.exchange import import_lines
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN
from tests.patience import PATIENCE_SECONDS, POLL_SECONDS
from tests.server.cli.learning import SETTINGS, conversations
from tests.server.faults.process import ROOT, Server
from tests.tiny_models import write_tiny_gguf

pytestmark = pytest.mark.slow

NUM_KILLS = int(os.environ.get("STERNA_TEST_KILL_ROUNDS", "5"))


def database_url(folder: Path) -> str:
    return f"sqlite:///{folder}/data/sterna.db"


def newest_round(folder: Path) -> Round | None:
    with closing(open_database(database_url(folder))) as database:
        rounds = RoundStore(database).list(limit=1)
    return rounds[0] if rounds else None


class Learning:
    """A server, and sidecars that live and die, on one folder."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.server = Server(model, folder, database_url(folder))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("STERNA_")}
        self.environment = environment | SETTINGS | {"PYTHONPATH": str(ROOT)}
        self.command = [sys.executable, "-m", "server.cli", "finetune", "--port", "0", "--model", str(model)]
        self.command += ["--url", f"http://127.0.0.1:{self.server.port}", "--database", database_url(folder)]
        self.command += ["--data-dir", str(folder / "data")]

    def live(self, seconds: float) -> bool:
        """One sidecar's life, ended by SIGKILL. Whether the round was over before."""
        with (self.folder / "sidecar.log").open("a") as log:
            process = subprocess.Popen(self.command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                assert process.poll() is None, self.said()
                round = newest_round(self.folder)
                if round is not None and round.result is not None:
                    return True
                time.sleep(POLL_SECONDS)
            return False
        finally:
            process.kill()
            process.wait()

    def said(self) -> str:
        return (self.folder / "sidecar.log").read_text()


@contextmanager
def learning(folder: Path, model: Path) -> Iterator[Learning]:
    made = Learning(folder, model)
    try:
        yield made
    finally:
        made.server.kill()


def outcome(made: Learning) -> dict[str, Any]:
    """Everything that a round finds out, the digests of its snapshot and of its weights among it; no times."""
    round = newest_round(made.folder)
    assert round is not None
    return {name: value for name, value in dataclasses.asdict(round).items() if not name.endswith("_at")}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """What the rounds begin with: a log, a model and a request."""
    model = write_tiny_gguf(tmp_path / "tiny.gguf", context_length=4096)
    folder = tmp_path / "prepared"
    folder.mkdir()
    assert Server(model, folder, database_url(folder)).stop() == 0
    with closing(open_database(database_url(folder))) as database:
        import_lines(TraceStore(database), ADMIN, conversations().splitlines(), adapter="tools")
        RoundStore(database).request("tools", None)
    return folder


def test_killed_at_random_moments_a_round_ends_as_an_undisturbed_one(prepared: Path, tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    shutil.copytree(prepared, tmp_path / "undisturbed")
    with learning(tmp_path / "undisturbed", model) as made:
        start = time.monotonic()
        assert made.live(PATIENCE_SECONDS), made.said()
        whole = time.monotonic() - start
        expected = outcome(made)
    dice = random.Random(20261122)
    num_kills = num_rounds = 0
    while num_kills < NUM_KILLS:
        num_rounds += 1
        folder = tmp_path / f"killed-{num_rounds}"
        shutil.copytree(prepared, folder)
        with learning(folder, model) as made:
            while not made.live(dice.uniform(0, whole) if num_kills < NUM_KILLS else PATIENCE_SECONDS):
                num_kills += 1
            assert outcome(made) == expected, made.said()
