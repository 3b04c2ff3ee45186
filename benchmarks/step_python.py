"""A step's Python: microseconds of scheduling, of filling the core's arrays and of what is done with its tokens.

The engine's own loop (scheduler, runner, drafter as `sterna serve` has it) over the real core, sequences of random
tokens that decode together at temperature 1 (greedily they would soon repeat themselves, and drafts be taken). What the
core takes is subtracted: it releases the GIL, and others' Python runs meanwhile. Not in it: handing tokens to requests,
detokenizing, HTTP.

usage: python -m benchmarks.step_python [--model NAME|PATH] [--batches 1 8 32] [--steps 300] [--threads 1] [--json]
"""

import argparse
import json
import statistics
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, report
from quant.model_file import open_model
from server.config import Settings
from server.engine.block_manager import BlockManager
from server.engine.drafting import Drafter
from server.engine.params import SamplingParams
from server.engine.runner import Runner
from server.engine.scheduler import MAX_MIXED_PREFILL_TOKENS, Outputs, Scheduler
from server.engine.sequence import Sequence
from server.engine.stats import Counters
from server.engine.weights import load_core

_PROMPT = 100
_WARM_UP = 20


class TimedCore:
    """The core, and how long its steps took."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def step(self, *arguments: Any) -> None:
        start = time.perf_counter()
        self._core.step(*arguments)
        self.seconds += time.perf_counter() - start


def measure(path: Path, batch: int, steps: int, threads: int) -> dict[str, float]:
    """Microseconds a step: the median of each part, and the least of all sums, `best`."""
    file = open_model(path)
    length = _PROMPT + 4 * (steps + _WARM_UP)  # what repeats itself comes several tokens a step
    blocks = batch * (length // 16 + 2)
    limits = {"num_blocks": blocks, "max_num_seqs": batch, "max_batch_tokens": 512}
    core = TimedCore(load_core(file, isa="auto", num_threads=threads, **limits))
    counters = Counters()
    drafter = Drafter(Settings.model_fields["max_draft_tokens"].default, counters)
    scheduler = Scheduler(
        BlockManager(blocks, core.block_size),
        max_num_seqs=batch,
        max_num_batched_tokens=512,
        max_logit_rows=core.max_logit_rows,
        max_mixed_prefill_tokens=MAX_MIXED_PREFILL_TOKENS,
        counters=counters,
        drafter=drafter,
    )
    runner = Runner(core, max_num_seqs=batch, max_tokens=512, max_blocks=length // 16 + 2)
    rng = np.random.default_rng(0)
    for i in range(batch):
        prompt = array("i", rng.integers(3, file.config.vocab_size, _PROMPT).tolist())
        params = SamplingParams(max_tokens=length, temperature=1.0, ignore_eos=True)
        scheduler.add(Sequence(i, prompt, params, seed=0, end_token_ids=frozenset(), max_length=length))
    parts: dict[str, list[float]] = {"schedule": [], "arrays": [], "tokens": [], "sum": []}
    clock = time.perf_counter
    while scheduler.has_work and len(parts["sum"]) < steps + _WARM_UP:
        outputs: Outputs = []
        core.seconds = 0.0
        start = clock()
        plan = scheduler.schedule()
        scheduled = clock()
        result = runner.run(plan)
        ran = clock()
        scheduler.postprocess(plan, result, outputs)
        done = clock()
        if not plan.has_prompts:
            drafter.cost.observe(plan.num_decode_rows, done - start)
            took = (scheduled - start, ran - scheduled - core.seconds, done - ran, done - start - core.seconds)
            for name, seconds in zip(parts, took, strict=True):
                parts[name].append(seconds * 1e6)
    runner.close()
    file.close()
    found = {name: statistics.median(values[_WARM_UP:]) for name, values in parts.items()}
    return found | {"best": min(parts["sum"][_WARM_UP:])}


def main() -> None:
    summary, usage = (__doc__ or "").split("\n\nusage: ")
    parser = argparse.ArgumentParser(description=summary, usage=usage, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=models.DEFAULT, help="nano, 2b, a catalogue name or a GGUF file")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1, help="of the core")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    options = parser.parse_args()
    path = models.path_of(options.model)
    found = {batch: measure(path, batch, options.steps, options.threads) for batch in options.batches}
    if not options.json:
        names = ["schedule", "arrays", "tokens", "sum", "best"]
        rows = [[f"batch {batch}", *(f"{one[name]:.0f}" for name in names)] for batch, one in found.items()]
        print(report.table([["microseconds of Python a step (medians)", *names], *rows]) + "\n")
    print(json.dumps({"model": options.model, "python": found, **report.cpu(), "commit": report.commit()}))


if __name__ == "__main__":
    main()
