"""What adapters cost a decode step: the engine alone at batch 32, without, with one version, with eight mixed.

Measures medians of alternating rounds in one process, greedy, every row sampled: tokens a second and their ratio to
those without adapters. Rank 16 on all seven projections, random factors. `--own-clock` counts the thread's CPU time,
for one thread on a busy machine. Not covered: loading (many_adapters.py), prefill, the same beside peers (compare.py).

usage: python -m benchmarks.lora_decode [--model NAME] [--threads 2] [--isa auto] [--rounds 7] [--own-clock] [--json]
"""

import argparse
import json
import statistics
import time

import numpy as np

from benchmarks.engine_speed import add_loras
from benchmarks.serve_process import model_path
from quant.model_file import open_model
from server.engine.bench import EngineTimer
from server.engine.weights import load_core

BATCH, STEPS, BLOCKS = 32, 24, 4
VERSIONS = {"none": 0, "one": 1, "eight": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--own-clock", action="store_true", help="CPU time of one thread")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    args = parser.parse_args()
    if args.own_clock and args.threads != 1:
        parser.error(f"--own-clock counts one thread's time, and there are {args.threads}: add --threads 1")
    file = open_model(model_path(args.model))
    core = load_core(
        file,
        isa=args.isa,
        num_threads=args.threads,
        num_blocks=BATCH * BLOCKS,
        max_num_seqs=BATCH,
        max_batch_tokens=512,
        max_loras=max(VERSIONS.values()),
    )
    add_loras(core, file.config, max(VERSIONS.values()))
    file.close()
    timer = EngineTimer(core, BLOCKS, time.thread_time if args.own_clock else time.perf_counter)
    timer.decode(BATCH, STEPS)  # touches the buffers for the first time
    rates: dict[str, list[float]] = {name: [] for name in VERSIONS}
    for _ in range(args.rounds):
        for name, count in VERSIONS.items():
            slots = np.arange(BATCH, dtype=np.int32) % count if count else None
            rates[name].append(timer.decode(BATCH, STEPS, lora_slots=slots))
    result: dict[str, float] = {}
    for name, each in rates.items():
        ratio = statistics.median(mine / none for mine, none in zip(each, rates["none"], strict=True))
        result |= {f"{name}_tok_s": round(statistics.median(each), 1), f"{name}_ratio": round(ratio, 3)}
    if not args.json:
        print("\n".join(f"{key:<16} {value:>10}" for key, value in result.items()))
    print(json.dumps({"benchmark": "lora_decode", "model": args.model, "threads": args.threads, **result}))


if __name__ == "__main__":
    main()
