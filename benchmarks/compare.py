"""Sterna's engine beside llama.cpp's on the same model, threads and machine, in turn; a table and one line of JSON.

Measures tokens per second of prefill (512 tokens) and greedy decode at batch 1, 8 and 32, with both engines run
alternately `--rounds` times and the median ratio reported: machines are shared and absolute figures move.
llama.cpp comes as llama-cpp-python, compiled for this machine into a virtual environment of its own in the cache
(about ten minutes, once), or from `--llama-python PATH`.

usage: python -m benchmarks.compare [--model NAME] [--threads 2] [--rounds 3] [--json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

LLAMA_CPP = "llama-cpp-python==0.3.36"
KEYS = ("prefill512_tok_s", "decode_b1_tok_s", "decode_b8_tok_s", "decode_b32_tok_s")
HEADINGS = ("prefill 512", "decode b1", "decode b8", "decode b32")


def install_llama_cpp(cache: Path) -> Path:
    """The interpreter of a virtual environment that holds llama-cpp-python built with this machine's instructions."""
    folder = cache / "peers" / LLAMA_CPP.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"compiling {LLAMA_CPP} into {folder} (about ten minutes)", file=sys.stderr)
        venv.create(folder, with_pip=True)
        environment = dict(os.environ, CMAKE_ARGS="-DGGML_NATIVE=ON")
        subprocess.run([python, "-m", "pip", "install", "--quiet", LLAMA_CPP, "numpy"], env=environment, check=True)
        (folder / "ready").touch()
    return python


def run_json(command: list[str | Path]) -> dict:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def cpu() -> dict[str, str]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = fields.get("flags", "").split()
    known = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8") if f in flags]
    return {"cpu": fields.get("model name", "unknown"), "flags": " ".join(known)}


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(ours: dict[str, float], theirs: dict[str, float], ratios: dict[str, float]) -> str:
    rows = [("tokens per second", *HEADINGS)]
    rows.append(("Sterna", *(f"{ours[k]:,.0f}" for k in KEYS)))
    rows.append(("llama.cpp", *(f"{theirs[k]:,.0f}" for k in KEYS)))
    rows.append(("ratio", *(f"{ratios[k]:.1f}x" for k in KEYS)))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * len(KEYS))
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="catalogue name or path of a GGUF")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-python", type=Path, help="interpreter that already has llama-cpp-python")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sterna")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    llama = args.llama_python or install_llama_cpp(args.cache)
    sterna = Path(sys.executable).parent / "sterna"
    path = subprocess.run(
        [sterna, "models", "path", args.model], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    script = Path(__file__).parent / "peers" / "llamacpp_speed.py"
    runs: list[tuple[dict, dict]] = []
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
        ours = run_json([sterna, "bench", "--model", path, "--threads", str(args.threads), "--json"])
        runs.append((ours, run_json([llama, script, path, str(args.threads)])))
    median = statistics.median
    ours = {k: median(float(a[k]) for a, _ in runs) for k in KEYS}
    theirs = {k: median(float(b[k]) for _, b in runs) for k in KEYS}
    ratios = {k: round(median(float(a[k]) / float(b[k]) for a, b in runs), 2) for k in KEYS}
    if not args.json:
        print(table(ours, theirs, ratios))
    about = {"model": Path(path).name, "threads": args.threads, "peer": runs[0][1]["engine"], "commit": commit()}
    print(json.dumps({**about, **cpu(), "sterna": ours, "llama.cpp": theirs, "ratio": ratios}))


if __name__ == "__main__":
    main()
