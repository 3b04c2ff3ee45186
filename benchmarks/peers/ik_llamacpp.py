"""ik_llama.cpp's speed by its own `llama-batched-bench`, for those who have built it: no registry has it.

From an ik_llama.cpp tree: `cmake -B build -DGGML_NATIVE=ON && cmake --build build --target llama-batched-bench
llama-quantize`. Ternary models are converted to its own IQ2_BN types first, by its `llama-quantize`, the embedding left
as it is. The tool decodes without sampling and always feeds the same token, which flatters it a little.

Its figures of one run on one machine, as ratios to llama.cpp in that run, stand in MEASURED: what is computed from them
is an estimate and marked so.
"""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.cases import BATCHES, Cases

MEASURED = {
    "smollm2-135m-instruct": {
        "prefill": 1342 / 342, "decode_b1": 201 / 145, "decode_b8": 490 / 259, "decode_b32": 546 / 303,
    },
    "nano": {"prefill": 2109 / 974, "decode_b1": 427 / 296, "decode_b8": 806 / 551, "decode_b32": 806 / 675},
    "2b": {"prefill": 133 / 50, "decode_b1": 46 / 29, "decode_b8": 93 / 41, "decode_b32": 101 / 45},
}  # fmt: skip
"""ik_llama.cpp of 2026-08-15 over llama-cpp-python 0.3.36, two Zen 4 cores, idle: Sterna's issue 6."""
TYPES = {"nano": "IQ2_BN", "2b": "IQ2_BN_R4"}


def tool(path: Path, name: str) -> Path:
    """A program of the build that `path` is in: the folder, or any program of it. Exits when it is not there."""
    found = (path if path.is_dir() else path.parent) / name
    if not found.exists():
        raise SystemExit(f"--ik-llama-bench: {found} does not exist; build its target {name}")
    return found


def converted(path: Path, model: str, file: Path, cache: Path) -> Path:
    """The file as ik_llama.cpp runs it fastest."""
    if model not in TYPES:
        return file
    out = cache / f"{file.stem}-{TYPES[model].lower()}.gguf"
    if not out.exists():
        command = [tool(path, "llama-quantize"), "--allow-requantize", "--token-embedding-type", "q8_0"]
        beside = out.with_suffix(".part")
        subprocess.run([*command, file, beside, TYPES[model]], check=True, stdout=sys.stderr)
        beside.rename(out)
    return out


def measure(path: Path, file: Path, threads: int, cases: Cases) -> dict[str, float | str]:
    """The keys of the other engines' scripts."""
    program = tool(path, "llama-batched-bench")
    result: dict[str, float | str] = {"engine": f"ik_llama.cpp {build_of(program)} ({program.parent})"}
    result |= {"prefill": _run(program, file, threads, cases.prefill, 1, 1)[1]["S_PP t/s"]}
    long = _run(program, file, threads, cases.long_prefill, cases.long_steps, 1)[1]
    result |= {"long_prefill": long["S_PP t/s"], "long_decode": long["S_TG t/s"]}
    for batch, row in _run(program, file, threads, 6, cases.steps, *BATCHES).items():
        result[f"decode_b{batch}"] = row["S_TG t/s"]
    return result


def build_of(program: Path) -> str:
    said = subprocess.run(
        [program, "--version"], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return read_build(said.stdout)


def read_build(text: str) -> str:
    """Number and commit, as "3870 (1f2a3b4c)", where the programs print them."""
    found = re.search(r"\b(?:version|build)\s*[:=]\s*(\d+ \(\w+\))", text)
    return found[1] if found else "of unknown build"


def _run(
    program: Path, file: Path, threads: int, prompt: int, steps: int, *batches: int
) -> dict[int, dict[str, float]]:
    context = max(batches) * max(prompt + steps, 256)
    command = [program, "-m", file, "-t", threads, "-c", max(context, 512), "-b", 512, "-ub", 512]
    command += ["-npp", prompt, "-ntg", steps, "-npl", ",".join(map(str, batches))]
    done = subprocess.run(
        list(map(str, command)), check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return read_table(done.stdout)


def read_table(text: str) -> dict[int, dict[str, float]]:
    """The tool's table, a row by batch size. Raises ValueError when there is none."""
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if "|" in line]
    heading = next((line for line in lines if line[:3] == ["PP", "TG", "B"]), None)
    if heading is None:
        raise ValueError(f"llama-batched-bench printed no table, but: {text[-500:]}")
    rows = [line for line in lines if len(line) == len(heading) and line[0].isdigit()]
    return {int(row[2]): dict(zip(heading, map(float, row), strict=True)) for row in rows}
