"""The default model: a request's answer is the same bits alone and among 31 others, cold and from the cache.

What test_invariance_engine.py shows on a tiny model, at the real sizes: thirty layers, a head of 49,152 rows, two
threads that share every product.
"""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from quant.model_file import ModelFile, open_model
from server.engine.engine import Engine
from server.engine.params import EngineOutput, SamplingParams
from server.engine.stream import merge_outputs
from server.engine.weights import load_core
from server.text.tokenizer import build_tokenizer

pytestmark = pytest.mark.real_model

PROMPT = "A lighthouse keeper and her daughter count the ships that pass in the night. The first of them"
COMMON = {"max_tokens": 20, "ignore_eos": True, "num_logprobs": 5}
SUBJECTS = [
    SamplingParams(temperature=0.0, **COMMON),
    SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.1, presence_penalty=0.4, **COMMON),
]


def run(file: ModelFile, *waves: list[tuple[list[int], SamplingParams]], threads: int) -> list[list[EngineOutput]]:
    """A fresh engine answers the waves one after the other."""
    core = load_core(
        file, isa="auto", num_threads=threads, num_blocks=256, max_num_seqs=40, max_batch_tokens=256, max_model_len=256
    )
    engine = Engine(core, max_model_len=256, max_waiting=64, eog_token_ids=frozenset({2}))

    async def answer(ids: list[int], params: SamplingParams) -> EngineOutput:
        return merge_outputs([output async for output in engine.submit(ids, params)])

    async def serve() -> list[list[EngineOutput]]:
        engine.start(asyncio.get_running_loop())
        return [list(await asyncio.gather(*(answer(*request) for request in wave))) for wave in waves]

    try:
        return asyncio.run(serve())
    finally:
        engine.stop()


def test_alone_and_among_31_others(default_model: Path) -> None:
    file = open_model(default_model)
    ids = build_tokenizer(file.tokenizer, file.config.vocab_size).encode(PROMPT, add_special=True, parse_special=True)
    subjects = [(ids, params) for params in SUBJECTS]
    # Each on its own: without cache hits, on one thread.
    alone = [run(file, [subject], threads=1)[0][0] for subject in subjects]

    rng = np.random.default_rng(5)
    others = [
        (
            (ids[:17] if i % 4 == 0 else []) + rng.integers(10, 49152, int(rng.integers(3, 40))).tolist(),
            SamplingParams(max_tokens=int(rng.integers(15, 30)), temperature=0.5 * (i % 3), seed=i),
        )
        for i in range(31)
    ]
    cold, hot = run(file, [*others[:16], *subjects, *others[16:]], subjects, threads=2)
    for got, expected in [*zip(cold[16:18], alone, strict=True), *zip(hot, alone, strict=True)]:
        assert got.error is None
        assert len(got.token_ids) == 20
        assert tuple(got.token_ids) == tuple(expected.token_ids)
        assert got.logprobs == expected.logprobs
    assert [output.num_cached_tokens for output in hot] == [16, 16]
    file.close()
