"""The wheel alone is a working server: built, installed elsewhere, started in another folder, asked and drained."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import DEFAULT_MODEL, Settings
from server.models.catalog import resolve_model
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.xdist_group("wheel")]  # built once


def run(*command: object, cwd: Path) -> None:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel; the dependencies are borrowed from the one that runs this."""
    work = tmp_path_factory.mktemp("wheel")
    build = work / "build"  # a build folder of its own: the checkout's belongs to the editable install
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", work,
        f"--config-settings=build-dir={build}", ROOT, cwd=work)  # fmt: skip
    (wheel,) = work.glob("sterna-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", work / "venv", cwd=work)
    python = work / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=work)
    (site,) = (work / "venv/lib").glob("python*/site-packages")
    # A path in a .pth file is searched, but .pth files in it are not run, so the editable install stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture
def server(installed: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its address from the line that says it is ready."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("STERNA_", "PYTHON"))}
    model = resolve_model(DEFAULT_MODEL, Settings().cache_dir).path
    command = [installed / "sterna", "serve", "--port", "0", "--model", model, "--kv-memory", "64MiB"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def test_nothing_comes_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    script = "import _sterna, quant, server; print(_sterna.__file__, quant.__file__, server.__file__, sep='\\n')"
    done = subprocess.run(
        [installed / "python", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.split()) == 3
    for path in done.stdout.split():
        assert Path(path).is_relative_to(installed.parent)


def test_commands_work_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    def output(*arguments: str) -> str:
        return subprocess.run(
            [installed / "sterna", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert re.fullmatch(r"sterna \d+\.\d+\.\d+\n", output("--version"))
    assert DEFAULT_MODEL in output("models", "list")


def test_it_serves_and_drains(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    body = {"model": "", "prompt": "The history of Rome begins with", "max_tokens": 6, "temperature": 0}
    with urllib.request.urlopen(f"{url}/v1/models", timeout=PATIENCE_SECONDS) as response:
        body["model"] = json.load(response)["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
        answer = json.load(response)
    assert answer["choices"][0]["text"].startswith(" the founding of Rome")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
