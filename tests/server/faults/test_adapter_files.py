"""A live version whose files are damaged or gone: its requests hear why, all others are answered, and it comes back."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patience import until
from tests.server.faults.load import ADAPTER, adapter_zip, import_version, promote
from tests.server.faults.process import Server

pytestmark = pytest.mark.slow


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def change(file: Path) -> None:
    """One bit of a weight, which only the digest tells."""
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def remove(file: Path) -> None:
    shutil.rmtree(file.parent)


@pytest.mark.parametrize("damage", [cut, change, remove])
def test_a_live_version_with_bad_files(damage: Callable[[Path], None], tiny_model: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/traces.db"
    server = Server(tiny_model, tmp_path, url)
    try:
        assert import_version(server, adapter_zip(tiny_model, tmp_path / "made", 1)).status == 201
        assert promote(server, f"{ADAPTER}@1").status == 200
        before = server.chat("say", model=ADAPTER, num_tokens=20)
        assert server.stop() == 0

        [weights] = (tmp_path / "adapters").rglob("adapter_model.safetensors")
        kept = shutil.copytree(weights.parent, tmp_path / "kept")
        damage(weights)
        server = Server(tiny_model, tmp_path, url)
        refused = server.chat("say", model=ADAPTER)
        assert refused.status == 503
        assert f"{ADAPTER}@1" in refused.json["error"]["message"]
        assert server.chat("base").status == 200
        assert server.metric("adapters_failing") == 1

        shutil.rmtree(weights.parent, ignore_errors=True)
        kept.rename(weights.parent)
        until(lambda: not server.metric("adapters_failing"), "it is tried again, after 1, 2, 4, ... seconds")
        after = server.chat("say", model=ADAPTER, num_tokens=20)
        assert after.status == 200
        assert after.headers["x-sterna-adapter-digest"] == before.headers["x-sterna-adapter-digest"]
        assert server.stop() == 0
    finally:
        server.kill()
    assert "Traceback" not in server.errors.read_text()
