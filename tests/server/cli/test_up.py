"""`sterna up`: two children in order, restarted when they crash, ended in order; and the lines that start them."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server import cli
from server.commands import up
from server.commands.supervisor import Child, Supervisor

READY = "print('It serves on http://127.0.0.1:{port}, well', flush=True)"
STAY = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: (print('bye', flush=True), sys.exit(0)))"


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


def server(port: int = 1, *more: str) -> Child:
    return Child("serve", python(STAY, READY.format(port=port), *more, "signal.pause()"), grace_seconds=20)


def sidecar(*more: str) -> Child:
    """Says which URL it was told."""
    lines = (STAY, "print('learns on http://x from', sys.argv[2], flush=True)", *more, "signal.pause()")
    return Child("finetune", python(*lines), grace_seconds=20, needs_url="--url")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run(*children: Child, on_ready: Callable[[Any], None] = lambda urls: stop(), **options: Any) -> int:
    supervisor = Supervisor(children, on_ready=on_ready, first_wait_seconds=0.01, **options)
    return asyncio.run(supervisor.run())


def test_started_in_order_and_ended_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[Any] = []

    def on_ready(urls: Any) -> None:
        heard.append(list(urls))
        stop()

    first, second = server(), sidecar()
    assert run(first, second, on_ready=on_ready) == 0
    assert heard == [["http://127.0.0.1:1", "http://x"]]
    assert [one.process.returncode for one in (first, second) if one.process] == [0, 0]
    out = capfd.readouterr().out.splitlines()
    assert out == [
        "serve    | It serves on http://127.0.0.1:1, well",
        "finetune | learns on http://x from http://127.0.0.1:1",
        "serve    | bye",
        "finetune | bye",
    ]


def test_a_crash_is_mended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The sidecar dies twice; the server never notices."""
    lives = tmp_path / "lives"
    script = (
        f"from pathlib import Path; path = Path({str(lives)!r})",
        "number = len(path.read_text()) if path.exists() else 0",
        "path.write_text('x' * (number + 1))",
        "print('learns on http://x', flush=True)",
        "number == 2 and os.kill(os.getppid(), signal.SIGTERM)",
        "number < 2 and os._exit(3)",
    )
    child = Child("finetune", python("import os", STAY, *script, "signal.pause()"), 20, needs_url="--url")
    assert run(server(), child, on_ready=lambda urls: None) == 0
    assert lives.read_text() == "xxx"
    captured = capfd.readouterr()
    assert captured.err.splitlines() == [
        "sterna: finetune ended (exit code 3); started again in 0.01 s",
        "sterna: finetune ended (exit code 3); started again in 0.02 s",
    ]
    assert captured.out.count("serve    | It serves") == 1


def test_what_cannot_start_ends_everything(capfd: pytest.CaptureFixture[str]) -> None:
    broken = Child("finetune", python("import sys; sys.exit('the port is taken')"), 20)
    first = server()
    assert run(first, broken) == 1
    assert first.process is not None
    assert first.process.returncode == 0
    captured = capfd.readouterr()
    assert "finetune | the port is taken" in captured.err
    assert "sterna: finetune could not start (exit code 1)" in captured.err
    assert run(Child("serve", python("import sys; sys.exit(2)"), 20), sidecar()) == 2


def test_a_second_signal_quits_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    deaf = Child(
        "serve", python("import signal; signal.signal(15, signal.SIG_IGN)", READY.format(port=1), "signal.pause()"), 60
    )

    def on_ready(urls: Any) -> None:
        stop()
        asyncio.get_running_loop().call_later(0.05, stop)

    assert run(deaf, on_ready=on_ready) == 128 + signal.SIGTERM
    assert deaf.process is not None
    assert deaf.process.returncode == -signal.SIGKILL


def test_who_does_not_end_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    deaf = Child(
        "serve",
        python("import signal; signal.signal(15, signal.SIG_IGN)", READY.format(port=1), "signal.pause()"),
        0.05,
    )
    assert run(deaf) == 0
    assert "serve did not end within 0.05 s and is killed" in capfd.readouterr().err


def test_a_server_that_moved_is_found_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With port 0 a server that crashed comes back elsewhere."""
    died = tmp_path / "died"
    first = Child(
        "serve",
        python(
            "import os, time",
            STAY,
            f"first = not os.path.exists({str(died)!r})",
            "print('serves on http://127.0.0.1:' + ('1' if first else '2'), flush=True)",
            f"first and (signal.sigtimedwait([], 0.3), open({str(died)!r}, 'w'), os._exit(1))",
            "signal.pause()",
        ),
        20,
    )
    second = sidecar("sys.argv[2].endswith('2') and __import__('os').kill(__import__('os').getppid(), 15)")
    assert run(first, second, on_ready=lambda urls: None) == 0
    assert "finetune | learns on http://x from http://127.0.0.1:2" in capfd.readouterr().out


def test_json_logs_stay_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(server(), is_prefixed=False) == 0
    assert capfd.readouterr().out.startswith("It serves on")


def test_each_child_gets_its_own_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.toml").write_text("threads = 2\n")
    made: list[Child] = []

    class Fake:
        def __init__(self, children: list[Child], **options: Any) -> None:
            made.extend(children)

        async def run(self) -> int:
            return 0

    monkeypatch.setattr(up, "Supervisor", Fake)
    flags = ["--port", "0", "--no-log-requests", "--model", "m.gguf", "--config", "other.toml", "--drain-seconds", "7"]
    assert cli.main(["up", *flags, "--finetune-port", "0", "--finetune-rslora"]) == 0
    start = [sys.executable, "-m", "server.cli"]
    assert made[0].command == [
        *[*start, "serve", "--config", "other.toml"],
        *["--port=0", "--no-log-requests", "--model=m.gguf", "--drain-seconds=7"],
    ]
    assert made[1].command == [*start, "finetune", "--config", "other.toml", "--model=m.gguf", "--port=0", "--rslora"]
    assert made[0].grace_seconds == 12


def test_a_wrong_line_is_told_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["up", "--port", "x", "--finetune-rank", "0", "--finetune-prt", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("sterna: --port: 'x' is not accepted") for line in lines)
    assert any(line.startswith("sterna: --finetune-rank: '0' is not accepted") for line in lines)
    assert "sterna: --finetune-prt: no such flag; did you mean --finetune-port?" in lines


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["up", "--help"])
    output = capsys.readouterr().out
    assert re.search(r"--finetune-every-hours HOURS", output)
    assert "example:\n  sterna up " in output
