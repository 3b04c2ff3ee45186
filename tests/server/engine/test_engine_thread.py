"""The engine with its thread and event loop: streams, queue, failures, grammars, adapters."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from copy import copy

import numpy as np
import pytest

from server.engine.engine import Engine
from server.engine.lora_types import LoraProjection, LoraWeights
from server.engine.params import EngineOutput, SamplingParams
from server.engine.stream import TokenStream, merge_outputs
from server.errors import AdapterError, ConfigError, InvalidRequestError, QueueFullError, ServerUnavailableError
from tests.patience import PATIENCE_SECONDS
from tests.server.engine.fake_core import FakeCore, lora_content, reference_tokens

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
LONG = SamplingParams(max_tokens=200, temperature=0.0)
ENDS = frozenset({60})


def prompt(seed: int, length: int = 10) -> list[int]:
    return random.Random(seed).choices(range(60), k=length)


@asynccontextmanager
async def running(core: FakeCore, **options) -> AsyncIterator[Engine]:
    engine = Engine(
        core, **{"max_draft_tokens": 6, "max_model_len": 250, "max_waiting": 64, "eog_token_ids": ENDS} | options
    )
    engine.start(asyncio.get_running_loop())
    try:
        yield engine
        await until(lambda: is_idle(engine))
        engine._blocks.check_invariants([])
    finally:
        if core.gate is not None:
            core.gate.set()
        engine.stop()


def is_idle(engine: Engine) -> bool:
    stats = engine.stats()
    return (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0) and not engine._streams


async def finish(stream: TokenStream) -> EngineOutput:
    return merge_outputs([output async for output in stream])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 a yield, no wait: nothing signals what the other thread does
            await asyncio.sleep(0)


async def generate(engine: Engine, tokens, params=GREEDY, **options) -> EngineOutput:
    return await finish(engine.submit(tokens, params, **options))


def expected(tokens, params=GREEDY, **options) -> list[int]:
    return reference_tokens(tokens, params, end_token_ids=ENDS, max_model_len=250, **options)


def test_many_requests_at_once():
    async def main():
        core = FakeCore()
        async with running(core) as engine:
            params = [SamplingParams(max_tokens=5 + i, temperature=i % 3 / 2, seed=i) for i in range(40)]
            results = await asyncio.gather(*(generate(engine, prompt(i, 3 + i), params[i]) for i in range(40)))
            for i, result in enumerate(results):
                assert list(result.token_ids) == expected(prompt(i, 3 + i), params[i])
            stats = engine.stats()
        assert stats.num_finished == 40
        assert stats.generated_tokens == sum(len(result.token_ids) for result in results)
        assert stats.prompt_tokens == sum(3 + i for i in range(40))
        assert stats.num_steps == len(core.steps) == sum(stats.batch_size_counts)
        assert core.threads == {"sterna-engine"}

    asyncio.run(main())


def test_one_wake_up_of_the_loop_a_step():
    class CountingLoop:
        def __init__(self, loop):
            self.loop, self.calls = loop, 0

        def call_soon_threadsafe(self, *args):
            self.calls += 1
            return self.loop.call_soon_threadsafe(*args)

    async def main():
        core = FakeCore(gate=threading.Event())
        engine = Engine(core, max_model_len=250, max_waiting=64, eog_token_ids=ENDS)
        loop = CountingLoop(asyncio.get_running_loop())
        engine.start(loop)
        streams = [engine.submit(prompt(i), GREEDY) for i in range(8)]
        core.gate.set()
        await asyncio.gather(*(finish(stream) for stream in streams))
        engine.stop()
        assert 12 <= loop.calls <= len(core.steps)

    asyncio.run(main())


def test_unseeded_requests_differ():
    async def main():
        async with running(FakeCore()) as engine:
            params = SamplingParams(max_tokens=30, temperature=2.0, ignore_eos=True)
            results = await asyncio.gather(*(generate(engine, prompt(0), params) for _ in range(3)))
        assert len({tuple(result.token_ids) for result in results}) == 3

    asyncio.run(main())


def test_end_of_generation_and_ignore_eos():
    async def main():
        params = {"max_tokens": 150, "temperature": 5.0, "seed": 3}
        async with running(FakeCore()) as engine:
            ended = await generate(engine, prompt(1), SamplingParams(**params))
            ignored = await generate(engine, prompt(1), SamplingParams(**params, ignore_eos=True))
            stopped = await generate(
                engine, prompt(1), SamplingParams(**params, ignore_eos=True, stop_token_ids=frozenset(range(30)))
            )
        assert (ended.finish_reason, ended.stop_token_id, ended.token_ids[-1]) == ("stop", 60, 60)
        assert (ignored.finish_reason, len(ignored.token_ids)) == ("length", 150)
        assert 60 in ignored.token_ids
        assert stopped.finish_reason == "stop"
        assert stopped.stop_token_id < 30

    asyncio.run(main())


def test_the_context_limit_ends_a_sequence():
    async def main():
        async with running(FakeCore(), max_model_len=20) as engine:
            result = await generate(
                engine, prompt(1, 15), SamplingParams(max_tokens=99, temperature=0, ignore_eos=True)
            )
        assert (result.finish_reason, len(result.token_ids)) == ("length", 5)

    asyncio.run(main())


def test_cancelling_frees_the_work():
    async def main():
        core = FakeCore(num_blocks=256, gate=threading.Event())
        async with running(core, max_model_len=1000) as engine:
            endless = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
            by_hand, by_task, by_close, neighbour = (
                engine.submit(prompt(0), endless),
                engine.submit(prompt(1), endless),
                engine.submit(prompt(2), endless),
                engine.submit(prompt(3), GREEDY),
            )
            task = asyncio.create_task(finish(by_task))
            waiting = [engine.submit(prompt(9), endless) for _ in range(20)]
            core.gate.set()
            assert (await anext(by_hand)).token_ids
            by_hand.cancel()
            task.cancel()
            await by_close.aclose()
            for stream in waiting:
                stream.cancel()
            ends = [await finish(stream) for stream in (by_hand, by_close, *waiting)]
            assert {end.finish_reason for end in ends} == {"cancelled"}
            assert list((await finish(neighbour)).token_ids) == expected(prompt(3))
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_queue_full():
    async def main():
        now = [0.0]
        core = FakeCore(max_num_seqs=2)
        async with running(core, max_waiting=1, clock=lambda: now[0]) as engine:
            await generate(engine, prompt(0))
            await generate(engine, prompt(1))
            now[0] = 50.0
            core.gate = threading.Event()
            streams = [engine.submit(prompt(i), GREEDY) for i in range(3)]
            with pytest.raises(QueueFullError, match="waiting") as caught:
                engine.submit(prompt(4), GREEDY)
            # Two endings in 50 s: each of the queue takes 25 s.
            assert caught.value.retry_after_seconds in (25, 50, 60)
            core.gate.set()
            for i, stream in enumerate(streams):
                assert list((await finish(stream)).token_ids) == expected(prompt(i))
            assert list((await generate(engine, prompt(4))).token_ids) == expected(prompt(4))

    asyncio.run(main())


def test_stop_ends_every_stream():
    async def main():
        core = FakeCore(max_num_seqs=2, gate=threading.Event())
        engine = Engine(core, max_model_len=250, max_waiting=9, eog_token_ids=ENDS)
        with pytest.raises(ServerUnavailableError, match="starting"):
            engine.submit(prompt(0), GREEDY)
        engine.start(asyncio.get_running_loop())
        streams = [engine.submit(prompt(i), LONG) for i in range(4)]
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
        await until(lambda: engine.health() == "the engine has stopped")
        core.gate.set()
        await stopping
        ends = [await finish(stream) for stream in streams]
        assert {end.finish_reason for end in ends} == {"error"}
        assert all("shut down" in end.error for end in ends)
        engine.stop()
        with pytest.raises(ServerUnavailableError):
            engine.submit(prompt(0), GREEDY)
        with pytest.raises(ServerUnavailableError):
            engine.load_adapter(adapter(1))
        streams[0].cancel()

    asyncio.run(main())


def test_a_failed_step_ends_its_sequences_and_no_more(caplog):
    async def main():
        core = FakeCore()
        async with running(core) as engine:
            warm = await generate(engine, prompt(0, 30))
            core.fail_steps = 1
            failed = await generate(engine, prompt(0, 30))
            assert failed.finish_reason == "error"
            assert "told to fail" not in failed.error  # our insides are for the log
            assert engine.health() is None
            again = await generate(engine, prompt(0, 30))
            assert again.token_ids == warm.token_ids
            core.fail_steps = 3
            for i in range(3):
                assert (await generate(engine, prompt(i))).finish_reason == "error"
            assert "3 engine steps failed" in engine.health()
            assert (await generate(engine, prompt(1))).finish_reason == "length"
            assert engine.health() is None
            assert engine.stats().num_step_errors == 4

    asyncio.run(main())
    assert "told to fail" in caplog.text


# -- grammars --


class CycleGrammar:
    """Allows 10, 20, 30, 10, ... for `length` tokens, then the end token 60 only."""

    def __init__(self, length: int, *, fail_at: int | None = None, reject_at: int | None = None) -> None:
        self.length, self.fail_at, self.reject_at = length, fail_at, reject_at
        self.taken = 0
        self.threads: set[str] = set()

    def fill_mask(self, mask: np.ndarray) -> None:
        self.threads.add(threading.current_thread().name)
        if self.taken == self.fail_at:
            raise ValueError("broken grammar")
        token = 60 if self.is_finished() else (self.taken % 3 + 1) * 10
        mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def advance(self, token_id: int) -> bool:
        accepted = token_id == (self.taken % 3 + 1) * 10 and self.taken != self.reject_at
        self.taken += 1
        return accepted

    def is_finished(self) -> bool:
        return self.taken >= self.length

    def fork(self) -> "CycleGrammar":
        return copy(self)

    def take(self, token_ids: Sequence[int]) -> int:
        for index, token_id in enumerate(token_ids):
            if self.is_finished() or token_id != (self.taken % 3 + 1) * 10:
                return index
            self.taken += 1
        return len(token_ids)

    def forced_tokens(self) -> list[int]:
        """Without its end, which a real grammar may force too."""
        if self.length > 50:
            return []
        ends = (end for end in (self.length, self.fail_at, self.reject_at) if end is not None)
        return [(taken % 3 + 1) * 10 for taken in range(self.taken, min(ends))]


def test_grammar_restricts_its_own_sequence_only():
    async def main():
        async with running(FakeCore()) as engine:
            grammars = [CycleGrammar(5), CycleGrammar(100)]
            params = SamplingParams(max_tokens=8, temperature=1.0, seed=1, ignore_eos=True, min_tokens=7)
            results = await asyncio.gather(
                generate(engine, prompt(0, 70), params, grammar=grammars[0]),
                generate(engine, prompt(1), GREEDY),
                generate(engine, prompt(2), params, grammar=grammars[1]),
            )
        assert results[0].token_ids == (10, 20, 30, 10, 20, 60)
        assert (results[0].finish_reason, results[0].stop_token_id) == ("stop", 60)
        assert list(results[1].token_ids) == expected(prompt(1))
        assert results[2].token_ids == (10, 20, 30, 10, 20, 30, 10, 20)
        assert results[2].finish_reason == "length"
        assert grammars[0].taken == 5  # the end is not part of the grammar
        assert all(name.startswith("sterna-masks") for grammar in grammars for name in grammar.threads)

    asyncio.run(main())


def test_grammar_survives_preemption():
    async def main():
        async with running(FakeCore(num_blocks=16)) as engine:
            params = SamplingParams(max_tokens=35, temperature=0.5, seed=1)
            results = await asyncio.gather(
                *(generate(engine, prompt(i), params, grammar=CycleGrammar(99)) for i in range(4))
            )
            assert engine.stats().num_preemptions > 0
        assert {result.token_ids for result in results} == {tuple((i % 3 + 1) * 10 for i in range(35))}

    asyncio.run(main())


def test_a_broken_grammar_ends_its_own_sequence_only(caplog):
    async def main():
        async with running(FakeCore()) as engine:
            raises, rejects, neighbour = await asyncio.gather(
                generate(engine, prompt(0), grammar=CycleGrammar(9, fail_at=2)),
                generate(engine, prompt(1), grammar=CycleGrammar(9, reject_at=2)),
                generate(engine, prompt(2)),
            )
            assert engine.stats().num_step_errors == 0
        assert (raises.finish_reason, raises.token_ids) == ("error", (10, 20))
        assert "broken grammar" in raises.error
        assert rejects.finish_reason == "error"
        assert "does not accept token 30" in rejects.error
        assert list(neighbour.token_ids) == expected(prompt(2))

    asyncio.run(main())
    assert "broken grammar" in caplog.text


# -- adapters --


def adapter(number: int, num_layers: int = 10, scale: float = 1.0) -> LoraWeights:
    weight = np.full((1, 1), number, np.float32)
    projections = tuple(
        LoraProjection(layer, name, weight, weight, scale)
        for layer in range(num_layers)
        for name in ("q_proj", "v_proj")
    )
    return LoraWeights(1, projections, f"sha256:{number}")


def test_two_adapters_and_the_base_in_one_batch():
    async def main():
        async with running(FakeCore(max_loras=2)) as engine:
            weights = [adapter(1), adapter(2)]
            first, second = [await asyncio.to_thread(engine.load_adapter, each) for each in weights]
            assert engine.stats().num_adapters == 2
            results = await asyncio.gather(
                *(generate(engine, prompt(0, 20), adapter=each) for each in (first, second, None) * 2)
            )
            contents = [lora_content(weights[0]), lora_content(weights[1]), ""] * 2
            for result, content in zip(results, contents, strict=True):
                assert list(result.token_ids) == expected(prompt(0, 20), lora=content)
            with pytest.raises(AdapterError, match="all 2 adapter slots"):
                await asyncio.to_thread(engine.load_adapter, adapter(3))
            await asyncio.wrap_future(engine.unload_adapter(first))
            third = await asyncio.to_thread(engine.load_adapter, adapter(3))
            assert third.slot == first.slot
            with pytest.raises(AdapterError, match="not loaded"):
                engine.submit(prompt(0), GREEDY, adapter=first)
            result = await generate(engine, prompt(0, 20), adapter=third)
            assert list(result.token_ids) == expected(prompt(0, 20), lora=lora_content(adapter(3)))
            assert result.num_cached_tokens == 0
            await asyncio.wrap_future(engine.unload_adapter(first))  # twice is harmless

    asyncio.run(main())


def test_an_unload_waits_for_the_last_sequence():
    async def main():
        core = FakeCore(max_num_seqs=1)
        async with running(core) as engine:
            loaded = await asyncio.to_thread(engine.load_adapter, adapter(1))
            core.gate = threading.Event()
            streams = [engine.submit(prompt(i), GREEDY, adapter=loaded) for i in range(3)]
            unloads = [engine.unload_adapter(loaded), engine.unload_adapter(loaded)]
            assert not unloads[0].done()
            core.gate.set()
            for i, stream in enumerate(streams):
                assert list((await finish(stream)).token_ids) == expected(prompt(i), lora=lora_content(adapter(1)))
            for unload in unloads:
                await asyncio.wrap_future(unload)
            assert core.loras == {}
            with pytest.raises(AdapterError, match="not loaded"):
                engine.submit(prompt(0), GREEDY, adapter=loaded)

    asyncio.run(main())


def test_loads_and_unloads_do_not_wait_for_the_step_that_runs():
    async def main():
        core = FakeCore(gate=threading.Event())
        async with running(core) as engine:
            stream = engine.submit(prompt(0), LONG)
            await until(lambda: core.steps)  # a step is under way, and does not end
            first = await asyncio.to_thread(engine.load_adapter, adapter(1))
            await asyncio.wrap_future(engine.unload_adapter(first))
            second = await asyncio.to_thread(engine.load_adapter, adapter(2))
            assert second.slot == first.slot
            core.gate.set()
            result = await generate(engine, prompt(0), adapter=second)
            assert list(result.token_ids) == expected(prompt(0), lora=lora_content(adapter(2)))
            await finish(stream)
        assert "sterna-engine" not in core.lora_threads

    asyncio.run(main())


def test_a_refused_adapter_leaves_its_slot_free():
    async def main():
        core = FakeCore(max_loras=1)
        async with running(core) as engine:
            with pytest.raises(AdapterError, match="scale is not finite"):
                await asyncio.to_thread(engine.load_adapter, adapter(1, scale=float("nan")))
            loaded = await asyncio.to_thread(engine.load_adapter, adapter(2))
            result = await generate(engine, prompt(0), adapter=loaded)
            assert list(result.token_ids) == expected(prompt(0), lora=lora_content(adapter(2)))

    asyncio.run(main())


# -- what is refused --


@pytest.mark.parametrize(
    ("tokens", "params", "param"),
    [
        ([], {}, "prompt"),
        ([1, 61], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1, 10**30], {}, "prompt"),
        ([1.5], {}, "prompt"),
        ([[1], [2, 3]], {}, "prompt"),
        ([1] * 250, {}, "prompt"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"min_p": 2.0}, "min_p"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([1], {"presence_penalty": float("inf")}, "presence_penalty"),
        ([1], {"frequency_penalty": float("nan")}, "frequency_penalty"),
        ([1], {"seed": 2**64}, "seed"),
        ([1], {"num_logprobs": 21}, "logprobs"),
        ([1], {"num_prompt_logprobs": -1}, "prompt_logprobs"),
        ([1], {"logit_bias": {61: 1.0}}, "logit_bias"),
        ([1], {"logit_bias": {1: float("inf")}}, "logit_bias"),
        ([1], {"stop_token_ids": frozenset({-5})}, "stop_token_ids"),
        ([1], {"min_tokens": -1}, "min_tokens"),
    ],
)
def test_bad_input_is_named(tokens, params, param):
    async def main():
        async with running(FakeCore()) as engine:
            with pytest.raises(InvalidRequestError) as caught:
                engine.submit(tokens, SamplingParams(**{"max_tokens": 4} | params))
            assert caught.value.param == param
            assert engine.stats().num_waiting == 0

    asyncio.run(main())


def test_a_prompt_larger_than_the_pool_is_refused_with_what_fits():
    async def main():
        async with running(FakeCore(num_blocks=8)) as engine:
            assert engine.max_model_len == 32
            with pytest.raises(InvalidRequestError, match=r"at most 31 fit.*8 blocks of 4 tokens") as caught:
                engine.submit([1] * 32, GREEDY)
            assert caught.value.code == "context_length_exceeded"
            assert len((await generate(engine, [1] * 31)).token_ids) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_blocks", 65), ("num_blocks", 0), ("max_num_seqs", 9), ("max_num_batched_tokens", 7),
     ("max_num_batched_tokens", 65), ("max_mixed_prefill_tokens", 0)],
)  # fmt: skip
def test_limits_must_fit_the_core(option, value):
    with pytest.raises(ConfigError, match=option):
        Engine(FakeCore(), **{"max_model_len": 99, "max_waiting": 1, "eog_token_ids": ENDS, option: value})
