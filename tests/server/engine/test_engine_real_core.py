"""The engine over the real C++ core on a tiny random model: nothing around a request may change its tokens."""

import asyncio
import random

import numpy as np
import pytest

from server.engine.engine import Engine
from server.engine.lora_types import LoraProjection, LoraWeights
from server.engine.params import EngineOutput, SamplingParams
from server.engine.stream import TokenStream, merge_outputs
from tests.patience import PATIENCE_SECONDS
from tests.server.engine.core_twin import PROJECTIONS, Shape, Twin
from tests.server.engine.test_engine_thread import CycleGrammar

TWIN = Twin(Shape())
NUM_REQUESTS = 24


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(TWIN.shape.vocab), k=length)


def requests() -> list[tuple[list[int], SamplingParams]]:
    shared = prompt(1000, 40)
    return [
        (
            (shared if i % 3 == 0 else []) + prompt(i, 1 + 5 * i),
            SamplingParams(
                max_tokens=60 + i,
                temperature=0.0 if i % 2 else 0.8,
                top_p=0.9,
                seed=i,
                frequency_penalty=0.4,
                repetition_penalty=1.1,
                ignore_eos=True,
                num_logprobs=3,
            ),
        )
        for i in range(NUM_REQUESTS)
    ]


def tolerance(logits: np.ndarray) -> float:
    """test_core_forward.py's bound on one logit: float32 sums and a 16-bit KV cache."""
    return 0.03 * float(logits.std())


async def finish(stream: TokenStream) -> EngineOutput:
    return merge_outputs([output async for output in stream])


def run(main, *, num_blocks: int = 400, **options) -> tuple[list[EngineOutput], Engine]:
    async def body():
        core = TWIN.core(num_blocks=num_blocks)
        engine = Engine(core, max_model_len=512, max_waiting=99, eog_token_ids=frozenset({60}), **options)
        engine.start(asyncio.get_running_loop())
        try:
            results = await main(engine)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while engine.stats().num_blocks_used:  # noqa: ASYNC110 - the engine's thread frees them
                    await asyncio.sleep(0.001)
            return results, engine
        finally:
            engine.stop()

    return asyncio.run(body())


async def one_by_one(engine: Engine) -> list[EngineOutput]:
    return [await finish(engine.submit(*request)) for request in requests()]


async def together(engine: Engine) -> list[EngineOutput]:
    return await asyncio.gather(*[finish(engine.submit(*request)) for request in requests()])


def test_alone_together_preempted_hot_and_cold_are_equal_bit_for_bit():
    alone, _ = run(one_by_one, enable_prefix_caching=False)
    assert all(len(result.token_ids) == 60 + i for i, result in enumerate(alone))
    cold, engine = run(together, enable_prefix_caching=False)
    assert max(size for size, count in enumerate(engine.stats().batch_size_counts) if count) >= 4
    hot, engine = run(together)
    assert engine.stats().prefix_hit_tokens > 0
    chunked, _ = run(together, max_num_batched_tokens=40, max_mixed_prefill_tokens=3)
    squeezed, engine = run(together, num_blocks=33)
    assert engine.stats().num_preemptions > 0
    for other in (cold, hot, chunked, squeezed):
        for result, expected in zip(other, alone, strict=True):
            assert result.token_ids == expected.token_ids
            assert result.logprobs == expected.logprobs  # floats, exactly


def test_prompt_logprobs_equal_the_twin():
    text = prompt(7, 70)

    async def main(engine: Engine) -> list[EngineOutput]:
        params = SamplingParams(max_tokens=1, temperature=0.0, num_prompt_logprobs=1)
        return [await finish(engine.submit(text, params))]

    (result,), _ = run(main, max_num_batched_tokens=48)
    logits = TWIN.logits(np.array(text))
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert result.prompt_logprobs[0] is None
    for position, entry in enumerate(result.prompt_logprobs[1:], 1):
        assert entry.token_id == text[position]
        assert entry.logprob == pytest.approx(expected[position - 1, text[position]], abs=tolerance(logits))
        assert entry.top[0][1] == pytest.approx(expected[position - 1].max(), abs=tolerance(logits))


def test_adapters_share_a_batch_with_the_base():
    text = prompt(8, 50)
    rng = np.random.default_rng(3)

    def weights(number: int) -> LoraWeights:
        parts = []
        for layer in range(TWIN.shape.layers):
            for name in PROJECTIONS:
                rows, columns = TWIN.shape.size(name)
                a = rng.standard_normal((4, columns)).astype(np.float32) / 4
                b = rng.standard_normal((rows, 4)).astype(np.float32) / 4
                parts.append(LoraProjection(layer, name, a, b, 0.5))
        return LoraWeights(4, tuple(parts), f"sha256:{number}")

    adapters = [weights(1), weights(2)]
    params = SamplingParams(max_tokens=8, temperature=0.0, num_prompt_logprobs=0, ignore_eos=True)

    async def main(engine: Engine) -> list[EngineOutput]:
        loaded = [await asyncio.to_thread(engine.load_adapter, each) for each in adapters]
        handles = [None, *loaded]
        mixed = await asyncio.gather(*[finish(engine.submit(text, params, adapter=handle)) for handle in handles])
        alone = [await finish(engine.submit(text, params, adapter=handle)) for handle in handles]
        assert [result.token_ids for result in mixed] == [result.token_ids for result in alone]
        return mixed

    results, _ = run(main)
    for result, given in zip(results, [None, *adapters], strict=True):
        lora = {(p.layer, p.projection): (p.a, p.b, p.scale) for p in given.projections} if given else None
        logits = TWIN.logits(np.array(text), lora)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        got = [entry.logprob for entry in result.prompt_logprobs[1:]]
        assert got == pytest.approx([expected[i, token] for i, token in enumerate(text[1:])], abs=tolerance(logits))
    assert len({result.token_ids for result in results}) == 3


def test_grammar_masks_reach_the_sampler():
    async def main(engine: Engine) -> list[EngineOutput]:
        params = SamplingParams(max_tokens=9, temperature=1.0, seed=1)
        grammars = [CycleGrammar(5), CycleGrammar(99)]
        return await asyncio.gather(*[finish(engine.submit(prompt(1, 9), params, grammar=g)) for g in grammars])

    (ended, cut), _ = run(main)
    assert cut.token_ids == (10, 20, 30, 10, 20, 30, 10, 20, 30)
    assert ended.token_ids == (10, 20, 30, 10, 20, 60)
    assert ended.finish_reason == "stop"
