"""The logits of fast kernels beside those of the scalar ones, on a whole model: is what the speed is measured of right?

Once for each of the ternary models of random weights: a few tokens, all their logits. The kernels round activations
alike but sum in another order, so that now and then a value falls on the other side of a rounding boundary; a wrong
kernel is off by about the spread itself. Scalar kernels are a hundred times slower, hence the few tokens. The default
model's accuracy: benchmarks/accuracy.py. Measures no speed.

usage: python -m benchmarks.scalar_twin {nano,2b} [--isa auto]
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import limits, models
from quant.model_file import open_model
from server.engine.weights import load_core

TOKENS = {"nano": 8, "2b": 2}
"""Of the prompt. They take 1 and 11 s of CPU time, packing included (`cpu_s` of the command above)."""
MAX_ERROR = 0.05
"""One and two per cent on AVX-512, as the command above prints them."""


def error_of_spread(got: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, over the standard deviation of what is expected. NaN where any logit is."""
    return float(np.sqrt(np.square(got - expected).mean()) / expected.std())


def refuse_wrong(errors: dict[str, dict[str, float]]) -> None:
    """`errors`: of each model by ISA. Exits above MAX_ERROR, and where the error is no number."""
    wrong = [f"{model}, {isa}: {e:.1%}" for model, by in errors.items() for isa, e in by.items() if not e <= MAX_ERROR]
    if wrong:
        raise SystemExit(f"logits differ from the scalar kernels' by more than {MAX_ERROR:.0%}: {'; '.join(wrong)}")


def logits(path: Path, isa: str, threads: int, tokens: int) -> np.ndarray:
    """float32 (tokens, vocab), of one random prompt."""
    file = open_model(path)
    core = load_core(file, isa=isa, num_threads=threads, num_blocks=1, max_num_seqs=tokens, max_batch_tokens=tokens)
    ids = np.random.default_rng(0).integers(0, core.vocab_size, tokens).astype(np.int32)
    first, none = np.zeros(1, np.int32), np.full(1, -1, np.int32)
    core.forward(
        ids, np.array([0, tokens], np.int32), first, first.reshape(1, 1), none, np.arange(tokens, dtype=np.int32)
    )
    result = np.array(core.logits(tokens))
    file.close()
    return result


def errors(model: str, isas: Sequence[str], threads: int) -> dict[str, float]:
    """By ISA; "auto" by the name of what it means."""
    path, tokens = models.path_of(model), TOKENS[model]
    named = dict.fromkeys(limits.best_isa() if isa == "auto" else isa for isa in isas)
    expected = logits(path, "scalar", threads, tokens)
    return {isa: error_of_spread(logits(path, isa, threads, tokens), expected) for isa in named}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=TOKENS)
    parser.add_argument("--isa", default="auto")
    args = parser.parse_args()
    start = time.process_time()
    found = errors(args.model, [args.isa], len(os.sched_getaffinity(0)))
    print(json.dumps({"tokens": TOKENS[args.model], "errors": found, "cpu_s": round(time.process_time() - start, 1)}))
    refuse_wrong({args.model: found})


if __name__ == "__main__":
    main()
