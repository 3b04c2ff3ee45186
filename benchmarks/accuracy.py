"""How near the engine's answers are to exact ones: perplexity and top-1 beside a float reference and llama.cpp.

On three texts of about 2,000 tokens (tests/data/texts: prose, code, German), each one sequence from position 0:
perplexity, its difference from a float32 NumPy forward pass on the same dequantized weights, and the share of
positions whose most likely token is the reference's. "noise" is the standard error of that difference: what another
text of the kind could have given. Targets: difference within 0.5 %, top-1 no lower than llama.cpp's minus 0.5 points.
llama.cpp is measured where `--llama-python` names an interpreter that has llama-cpp-python. Not covered: speed.

usage: python -m benchmarks.accuracy [--model NAME|PATH] [--isa auto,avx2] [--threads 2] [--tokens N]
       [--llama-python PATH] [--write] [--json]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import _sterna
from quant.model_file import ModelFile, open_model
from server.config import DEFAULT_MODEL, Settings
from server.engine.weights import load_core
from server.models.catalog import resolve_model
from tests.server.engine.reference import (
    TEXT_NAMES,
    ExpectedScores,
    Reference,
    Scores,
    core_logits,
    score,
    text_ids,
    write_expected,
)

ROWS_A_STEP = 64
REFERENCE, LLAMA_CPP = "float32", "llama.cpp"


def core_scores(file: ModelFile, isa: str, threads: int, texts: dict[str, np.ndarray]) -> dict[str, Scores]:
    core = load_core(
        file,
        isa=isa,
        num_threads=threads,
        num_blocks=max(-(-len(ids) // 16) for ids in texts.values()),
        max_num_seqs=1,
        max_batch_tokens=ROWS_A_STEP,
    )
    return {name: score(ids, core_logits(core, ids)) for name, ids in texts.items()}


def llamacpp_scores(python: Path, model: Path, threads: int, texts: dict[str, np.ndarray]) -> dict[str, Scores]:
    request = {"model": str(model), "threads": threads, "texts": [ids.tolist() for ids in texts.values()]}
    script = Path(__file__).with_name("peers") / "llamacpp_logits.py"
    command = [python, script]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    answers = json.loads(done.stdout)["texts"]
    scores = [Scores(np.array(a["top1"]), np.array(a["logprobs"])) for a in answers]
    return dict(zip(texts, scores, strict=True))


def compare(scores: Scores, reference: Scores) -> dict[str, float]:
    """In percent but for the perplexity itself."""
    difference = scores.logprobs - reference.logprobs
    return {
        "perplexity": round(scores.perplexity, 4),
        "difference_percent": round(100 * (scores.perplexity / reference.perplexity - 1), 3),
        "noise_percent": round(100 * float(difference.std()) / len(difference) ** 0.5, 3),
        "top1_percent": round(100 * scores.agreement(reference), 2),
    }


def table(result: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [f"{'text':<8} {'engine':<12} {'perplexity':>10} {'difference':>11} {'noise':>7} {'top-1':>8}"]
    for text, engines in result.items():
        for engine, r in engines.items():
            lines.append(
                f"{text:<8} {engine:<12} {r['perplexity']:>10.4f} {r['difference_percent']:>+9.3f} % "
                f"{r['noise_percent']:>7.3f} {r['top1_percent']:>6.2f} %"
            )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="catalogue name, GGUF file or Hugging Face directory")
    parser.add_argument("--isa", default="auto", help=f"separated by commas, of {', '.join(_sterna.available_isas())}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="of each text, from its start (the scalar ISA is slow)")
    parser.add_argument("--llama-python", type=Path, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--write", action="store_true", help="keep the reference's scores for the tests")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    arguments = parser.parse_args()
    if arguments.write and (arguments.tokens or arguments.model != DEFAULT_MODEL or not arguments.llama_python):
        parser.error("--write is for the whole texts on the default model, and needs --llama-python")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    path = resolve_model(arguments.model, Settings().cache_dir).path
    file = open_model(path)
    texts = {name: text_ids(file, name)[: arguments.tokens] for name in TEXT_NAMES}

    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    say("float32 reference")
    float_model = Reference(file)
    reference = {name: score(ids, float_model.logits(ids)) for name, ids in texts.items()}
    del float_model
    engines = {REFERENCE: reference}
    for isa in arguments.isa.split(","):
        say(f"core, {isa}")
        engines[isa] = core_scores(file, isa, arguments.threads, texts)
    if arguments.llama_python:
        say("llama.cpp")
        engines[LLAMA_CPP] = llamacpp_scores(arguments.llama_python, path, arguments.threads, texts)
    if arguments.write:
        agreements = {name: engines[LLAMA_CPP][name].agreement(reference[name]) for name in texts}
        write_expected(file, {name: ExpectedScores(reference[name], agreements[name]) for name in texts})
    result = {name: {e: compare(scores[name], reference[name]) for e, scores in engines.items()} for name in texts}
    if not arguments.json:
        print(table(result))
    print(json.dumps({"model": file.digest, "tokens": {n: len(ids) for n, ids in texts.items()}, "texts": result}))


if __name__ == "__main__":
    main()
