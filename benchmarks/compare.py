"""Sterna beside llama.cpp, ik_llama.cpp and vLLM's CPU build: same machine, models, threads and run, engines in turn.

Tokens per second of prefill (512 and 4,096 tokens) and greedy decode (batch 1, 8, 32, and one sequence after 4,096
tokens) on the default model and on random ternary ones. A figure is the median of `--rounds`, a ratio that of the
rounds' ratios. A round takes the median of three runs; a single run on `2b`, of 4,096 tokens and of ik_llama.cpp's
tool; and over HTTP the best of three loads. Prompts are random and distinct; no prefix cache, no speculation; int16 KV.
Beside ratios stands what they must reach. Also: both engines with AVX2 alone, eight LoRA versions in a batch of 32,
shares of this machine's limits in the run. Logits that are not the scalar kernels' end it (benchmarks/scalar_twin.py).

Peers: `llama`, `llama-avx2`, `vllm` are installed on first use into the cache (each about ten minutes; `--peers`);
ik_llama.cpp is in no registry: `--ik-llama-bench` names a build. Without one, ratios to it are estimated from another
run's (benchmarks/peers/ik_llamacpp.py) and marked "est.".

usage: python -m benchmarks.compare [--models ...] [--peers llama llama-avx2 vllm] [--threads 2] [--rounds 3] [--quick]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import comparison, http_streams, limits, models, report, scalar_twin
from benchmarks.cases import Cases
from benchmarks.comparison import Comparison
from benchmarks.peers import ik_llamacpp
from benchmarks.peers.install import CACHE, PEERS, install

HERE = Path(__file__).parent
DEFAULTS = (models.DEFAULT, "nano", "2b")
QUICK = Cases(prefill=64, long_prefill=192, steps=4, long_steps=4, repeats=1)
NUM_LORAS = 8


@dataclass(frozen=True)
class Engine:
    name: str
    measure: Callable[[str, Path, Cases], dict]
    """(model, its file, cases) to tokens per second by key."""


def run_json(command: list[str | Path], environment: dict[str, str] | None = None) -> dict:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def sterna(isa: str, threads: int) -> Callable[[str, Path, Cases], dict]:
    return lambda _, path, cases: run_json(
        [sys.executable, "-m", "benchmarks.engine_speed", path, str(threads), cases.to_json(), isa]
    )


def llama_cpp(python: Path, threads: int) -> Callable[[str, Path, Cases], dict]:
    script = HERE / "peers" / "llamacpp_speed.py"
    return lambda _, path, cases: run_json([python, script, path, str(threads), cases.to_json()])


def ik_llama_cpp(program: Path, threads: int) -> Callable[[str, Path, Cases], dict]:
    return lambda model, path, cases: ik_llamacpp.measure(
        program, ik_llamacpp.converted(program, model, path, models.CACHE), threads, cases
    )


def engines(args: argparse.Namespace) -> list[Engine]:
    """In the order in which a round runs them."""
    chosen = [Engine("Sterna", sterna(args.isa, args.threads))]
    if "llama" in args.peers:
        python = args.llama_python or install("llama", args.cache)
        chosen.append(Engine("llama.cpp", llama_cpp(python, args.threads)))
    if args.ik_llama_bench:
        chosen.append(Engine("ik_llama.cpp", ik_llama_cpp(args.ik_llama_bench, args.threads)))
    if "llama-avx2" in args.peers:
        python = args.llama_avx2_python or install("llama-avx2", args.cache)
        chosen.append(Engine("Sterna, AVX2", sterna("avx2", args.threads)))
        chosen.append(Engine("llama.cpp, AVX2", llama_cpp(python, args.threads)))
    return chosen


def cases_of(model: str, quick: bool, busy: bool) -> Cases:
    """The large model's passes take seconds to minutes each: one a round says enough."""
    cases = QUICK if quick else Cases(repeats=1 if model == "2b" else 3)
    return replace(cases, own_clock=busy, num_loras=NUM_LORAS if model == models.DEFAULT else 0)


def run_rounds(args: argparse.Namespace) -> Comparison:
    chosen = engines(args)
    paths = {model: models.path_of(model) for model in args.models}
    rounds, measured, streams = [], [], []
    vllm = vllm_of(args, paths)
    for number in range(args.rounds):
        measured.append(limits.measure(args.threads, args.isa))
        figures = {}
        for model, path in paths.items():
            for engine in chosen:
                print(f"round {number + 1} of {args.rounds}: {model}, {engine.name}", file=sys.stderr)
                cases = cases_of(model, args.quick, args.busy)
                # Adapters are ours alone to measure, and once.
                alone = cases if engine.name == "Sterna" else replace(cases, num_loras=0)
                figures[model, engine.name] = engine.measure(model, path, alone)
                print(f"  {json.dumps(figures[model, engine.name])}", file=sys.stderr)
        rounds.append(figures)
        if vllm:
            print(f"round {number + 1} of {args.rounds}: streams over HTTP", file=sys.stderr)
            streams.append(vllm(number))
            print(f"  {streams[-1]}", file=sys.stderr)
    works = {model: models.work_of(path) for model, path in paths.items()}
    return Comparison(rounds, works, measured, streams, cases_of("", args.quick, args.busy))


def checked_logits(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """How far the ternary models' logits are from the scalar kernels', by model and ISA. Exits where it is too much."""
    isas = [args.isa, *(["avx2"] if "llama-avx2" in args.peers else [])]
    errors = {m: scalar_twin.errors(m, isas, args.threads) for m in args.models if m in scalar_twin.TOKENS}
    print(f"logits beside the scalar kernels': {json.dumps(errors)}", file=sys.stderr)
    scalar_twin.refuse_wrong(errors)
    return errors


def vllm_of(args: argparse.Namespace, paths: dict[str, Path]) -> Callable[[int], dict[int, tuple[float, float]]] | None:
    """A round over HTTP, by its number; None when vLLM was not asked for."""
    if "vllm" not in args.peers:
        return None
    python = args.vllm_python or install("vllm", args.cache)
    file = paths.get(models.DEFAULT) or models.path_of(models.DEFAULT)
    directory = http_streams.hugging_face_directory(python, file, args.cache)
    return lambda number: http_streams.run_round(
        str(file), python, directory, args.threads, seed=1000 * number, quick=args.quick
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(DEFAULTS), help="nano, 2b, catalogue names or GGUF files")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["llama"], help="what to install and run [llama]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--isa", default="auto", help="of Sterna's main rows")
    parser.add_argument("--llama-python", type=Path, help="interpreter that already has llama-cpp-python")
    parser.add_argument("--llama-avx2-python", type=Path, help="one that has it built for AVX2")
    parser.add_argument("--vllm-python", type=Path, help="one that has vLLM's CPU build")
    parser.add_argument(
        "--ik-llama-bench", type=Path, help="folder of an ik_llama.cpp build's programs, or one of them"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="where peers are installed")
    parser.add_argument(
        "--quick", action="store_true", help="tiny cases, to see that everything runs: no figures to quote"
    )
    parser.add_argument(
        "--busy",
        action="store_true",
        help="one thread, timed by its own clock: for a machine that does other things too",
    )
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    parser.add_argument("--markdown", type=Path, help="a document whose section `compare` gets the tables")
    args = parser.parse_args()
    if args.busy and (args.ik_llama_bench or "vllm" in args.peers):
        parser.error("--busy: ik_llama.cpp and vLLM are timed by wall clock only")
    return argparse.Namespace(**{**vars(args), "threads": 1 if args.busy else args.threads})


def main() -> None:
    args = parse_arguments()
    errors = checked_logits(args)
    vllm = {}
    if "vllm" in args.peers:
        vllm["vLLM"] = http_streams.vllm_version(args.vllm_python or install("vllm", args.cache))
    done = run_rounds(args)
    figures = {
        "threads": args.threads,
        "quick": args.quick,
        "busy": args.busy,
        "versions": {engine: done.rounds[0][args.models[0], engine]["engine"] for engine in done.engines()} | vllm,
        "logits_beside_scalar": {m: {i: round(e, 5) for i, e in by.items()} for m, by in errors.items()},
        "limits": [asdict(one) for one in done.limits],
        **comparison.figures(done),
    }
    report.finish(comparison.text(done), figures, json_only=args.json, markdown=args.markdown, section="compare")


if __name__ == "__main__":
    main()
