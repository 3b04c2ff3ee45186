"""The demonstration's processes: `sterna serve` and `sterna finetune` as anybody would start them, on free ports.

Each has a log file; it is ready when it prints its address. Ended by SIGTERM, after requests and micro-batches.
Not here: what is asked of them.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import FinetuneError

START_SECONDS = 120.0
"""A server starts in a second; on a machine that compiles beside it, in many."""
STOP_SECONDS = 60.0
_READY = re.compile(r"^Sterna (?:serves|learns) .*?on (http://[^\s,]+)", re.MULTILINE)


class DemoError(FinetuneError):
    """The demonstration cannot go on; its message says why and which log tells more."""


@contextmanager
def running(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """`sterna ARGUMENTS` until the block ends; gives its address. Raises DemoError."""
    command = [sys.executable, "-m", "server.cli", *arguments]
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment})
    try:
        yield _address(process, log, start, arguments[0])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """`sterna ARGUMENTS` to its end, its progress on our terminal; gives its output. Raises DemoError."""
    command = [sys.executable, "-m", "server.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise DemoError(f"sterna {' '.join(arguments)} ended with exit code {done.returncode}")
    return done.stdout.decode()


def _address(process: "subprocess.Popen[bytes]", log: Path, start: int, name: str) -> str:
    """`start`: where this process's part of the log begins."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        found = _READY.search(log.read_bytes()[start:].decode("utf-8", "replace"))
        if found:
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    last = log.read_bytes()[start:].decode("utf-8", "replace").strip().splitlines()[-1:]
    raise DemoError(f"sterna {name} did not start: {last[0] if last else 'it said nothing'} (see {log})")
