"""`sterna serve` as a process of its own, for benchmarks: a free port, a folder for its data, its memory, its HTTP API.

Measures nothing itself.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

STERNA = Path(sys.executable).parent / "sterna"
START_DEADLINE_SECONDS = 120


class Server:
    """One server on 127.0.0.1. `data_dir` None: one of its own, gone afterwards. `flags` as on the command line."""

    def __init__(self, model: str, threads: int, *flags: str, data_dir: Path | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._own_data = tempfile.TemporaryDirectory(prefix="sterna-bench-") if data_dir is None else None
        data = self._own_data.name if self._own_data else str(data_dir)
        command = [STERNA, "serve", "--model", model, "--threads", str(threads), "--port", str(port)]
        self.started = time.perf_counter()
        self._process = subprocess.Popen([*command, "--data-dir", data, *flags], stdout=subprocess.DEVNULL)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        if self._own_data:
            self._own_data.cleanup()

    def seconds_to_first_token(self) -> float:
        """From process start to the end of the first answer, which this asks for."""
        while time.perf_counter() - self.started < START_DEADLINE_SECONDS:
            if self._process.poll() is not None:
                raise SystemExit("sterna serve ended; see its message above")
            try:
                body = {"model": self.base_name(), "prompt": "Hello", "max_tokens": 1}
                assert self.post("/v1/completions", body)["usage"]["completion_tokens"] == 1
                return time.perf_counter() - self.started
            except (urllib.error.URLError, ConnectionError, IndexError):
                time.sleep(0.01)
        raise SystemExit("sterna serve did not answer in time")

    def base_name(self) -> str:
        return str(self.get("/v1/models")["data"][0]["id"])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any] | bytes) -> Any:
        """Bytes are sent as a zip file. Raises urllib.error.HTTPError."""
        is_zip = isinstance(body, bytes)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/zip" if is_zip else "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers)) as response:
            return json.load(response)

    def import_version(self, adapter: str, zip_bytes: bytes) -> str:
        """Its reference, such as `tools@7`."""
        return str(self.post(f"/v1/adapters/{adapter}/versions?reason=benchmark", zip_bytes)["version"])

    def cpu_seconds(self) -> float:
        """Of all its threads, so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) // 1024


def model_path(name: str) -> str:
    """Where `sterna models` keeps a model (or the path itself)."""
    done = subprocess.run([STERNA, "models", "path", name], stdout=subprocess.PIPE, check=True, text=True)
    return done.stdout.strip()
