"""Our engine's speed on one GGUF, the twin of the peers' scripts: what benchmarks/cases.py says, as one line of JSON.

The core is driven without a scheduler, so there is no prefix cache and no speculation; int16 KV, the head in the file's
precision, greedy, every row sampled at every step. With adapters: `loras_none` none loaded, `loras_unused` eight loaded
and used by no sequence, `loras_mixed` the rows of the batch of 32 spread over them; the three in turn, in one process.

usage: python -m benchmarks.engine_speed MODEL.gguf THREADS CASES_AS_JSON [ISA]
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.cases import BATCHES, KEYS, Cases
from quant.model_file import open_model
from quant.model_types import ModelConfig
from server.engine.bench import EngineTimer
from server.engine.core_api import Core
from server.engine.lora_types import PROJECTIONS
from server.engine.weights import load_core

_RANK = 16
_CHUNK = 512
_BLOCKS = 256 // 16


def add_loras(core: Core, config: ModelConfig, count: int) -> None:
    """Rank 16 on all seven projections of all layers. The core packs each version by itself, whatever its values."""
    rng = np.random.default_rng(0)
    halves = {}
    for name in PROJECTIONS:
        rows, cols = config.projection_shape(name)
        halves[name] = (
            rng.standard_normal((_RANK, cols), np.float32) * np.float32(0.02),
            rng.standard_normal((rows, _RANK), np.float32) * np.float32(0.02),
        )
    for slot in range(count):
        lora = core.new_lora()
        for layer in range(config.num_layers):
            for name, (a, b) in halves.items():
                lora.add(layer, name, a, b, 1.0)
        core.set_lora(slot, lora)


def _median(run: Callable[[], float], repeats: int) -> float:
    return round(statistics.median(run() for _ in range(repeats)), 2)


def measure(path: Path, threads: int, cases: Cases, isa: str) -> dict[str, float]:
    long_blocks = (cases.long_prefill + cases.long_steps + 15) // 16
    file = open_model(path)
    core = load_core(
        file,
        isa=isa,
        num_threads=threads,
        num_blocks=max(max(BATCHES) * _BLOCKS, long_blocks),
        max_num_seqs=max(BATCHES),
        max_batch_tokens=_CHUNK,
        max_loras=max(cases.num_loras, 1),
    )
    clock = time.process_time if cases.own_clock else time.perf_counter
    long, short = EngineTimer(core, long_blocks, clock), EngineTimer(core, _BLOCKS, clock)
    long.prefill(cases.prefill)  # the first pass touches buffers for the first time
    result = {"prefill": _median(lambda: long.prefill(cases.prefill), cases.repeats)}
    result["long_prefill"] = round(long.prefill(cases.long_prefill), 2)
    result["long_decode"] = round(long.decode(1, cases.long_steps, context=cases.long_prefill), 2)
    for batch in BATCHES:
        result[f"decode_b{batch}"] = _median(lambda b=batch: short.decode(b, cases.steps), cases.repeats)
    if cases.num_loras:
        result |= _with_loras(core, file.config, short, cases)
    file.close()
    assert set(KEYS) <= set(result)
    return result


def _with_loras(core: Core, config: ModelConfig, timer: EngineTimer, cases: Cases) -> dict[str, float]:
    mixed = np.arange(32, dtype=np.int32) % cases.num_loras
    rates: dict[str, list[float]] = {"loras_none": [], "loras_unused": [], "loras_mixed": []}
    for _ in range(cases.repeats):
        for slot in range(cases.num_loras):
            core.clear_lora(slot)
        rates["loras_none"].append(timer.decode(32, cases.steps))
        add_loras(core, config, cases.num_loras)
        rates["loras_unused"].append(timer.decode(32, cases.steps))
        rates["loras_mixed"].append(timer.decode(32, cases.steps, lora_slots=mixed))
    return {name: round(statistics.median(values), 2) for name, values in rates.items()}


def main() -> None:
    path, threads, cases = Path(sys.argv[1]), int(sys.argv[2]), Cases(**json.loads(sys.argv[3]))
    isa = sys.argv[4] if len(sys.argv) > 4 else "auto"
    print(json.dumps({"engine": f"sterna {version('sterna')}", **measure(path, threads, cases, isa)}))


if __name__ == "__main__":
    main()
