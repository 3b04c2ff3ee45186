"""A request's tokens and log-probabilities are the same bits whatever else the engine does.

The real engine, scheduler, prefix cache and core on a tiny random Q4_1 model with a Q8_0 embedding, like the default
model: alone, among 31 others, on one thread or three, in chunks, from a hot cache, preempted, beside adapters, drafted.
Every run is compared with the request alone in a fresh engine on one thread without cache.
"""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import _sterna
from quant.formats import GGMLType
from quant.model_file import ModelFile, open_model
from server.engine.engine import Engine
from server.engine.lora_types import PROJECTIONS, LoraProjection, LoraWeights
from server.engine.params import EngineOutput, SamplingParams
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence as EngineSequence
from server.engine.step import StepPlan
from server.engine.stream import merge_outputs
from server.engine.weights import load_core
from tests.patience import PATIENCE_SECONDS
from tests.tiny_models import write_tiny_gguf

VOCAB = 384
NUM_NEIGHBOURS = 31


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: int | None = None
    """Index into ADAPTER_SEEDS."""


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCAB, length).tolist())


# Lengths either side of a block of 16 and of the attention's span of 128; each crosses another block while decoding.
COMMON = {"max_tokens": 24, "ignore_eos": True, "num_logprobs": 4}
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}
SUBJECTS = {
    "greedy": Request(prompt(1, 37), SamplingParams(temperature=0.0, **COMMON)),
    "greedy, long": Request(prompt(2, 120), SamplingParams(temperature=0.0, num_prompt_logprobs=2, **COMMON)),
    "seeded": Request(prompt(3, 15), SamplingParams(temperature=1.0, seed=11, **PENALTIES, **COMMON)),
    "seeded, second choice": Request(
        prompt(4, 64), SamplingParams(seed=2**64 - 1, choice=1, top_k=50, top_p=0.95, min_p=0.01, **COMMON)
    ),
    "adapter": Request(prompt(5, 50), SamplingParams(seed=5, logit_bias={7: 3.0}, **COMMON), adapter=0),
}
ADAPTER_SEEDS = (21, 22)


def neighbours(seed: int) -> list[Request]:
    """31 requests of all kinds, ending at different steps; some begin as a subject does, some use adapters."""
    rng = np.random.default_rng(seed)
    shared = [subject.prompt for subject in SUBJECTS.values()]
    found = []
    for i in range(NUM_NEIGHBOURS):
        start = shared[i % len(shared)][: int(rng.integers(0, 40))] if i % 3 == 0 else ()
        params = SamplingParams(
            max_tokens=int(rng.integers(30, 90)),
            temperature=float(rng.choice([0.0, 0.7, 1.3])),
            seed=i,
            ignore_eos=bool(i % 2),
            num_logprobs=None if i % 2 else 3,
            num_prompt_logprobs=1 if i % 7 == 0 else None,
        )
        adapter = (None, 0, 1)[i % 3]
        found.append(Request(start + prompt(100 + i, int(rng.integers(1, 90))), params, adapter))
    return found


def adapter_weights(file: ModelFile, seed: int) -> LoraWeights:
    rng = np.random.default_rng(seed)
    parts = []
    for layer in range(file.config.num_layers):
        for name in PROJECTIONS:
            rows, columns = file.config.projection_shape(name)
            a = (rng.standard_normal((8, columns)) / np.sqrt(columns)).astype(np.float32)
            b = (rng.standard_normal((rows, 8)) * 0.3).astype(np.float32)
            parts.append(LoraProjection(layer, name, a, b, 0.7))
    return LoraWeights(8, tuple(parts), f"sha256:{seed}")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    path = tmp_path_factory.mktemp("invariance") / "model.gguf"
    write_tiny_gguf(path, linear_type=GGMLType.Q4_1, embedding_type=GGMLType.Q8_0, vocab_size=VOCAB, tie=False)
    model = open_model(path)
    yield model
    model.close()


@dataclass
class Run:
    """One life of an engine. Each of its `waves` is submitted when all of the last have begun to answer."""

    file: ModelFile
    isa: str = "auto"
    threads: int = 1
    num_blocks: int = 400
    max_num_batched_tokens: int = 256
    max_mixed_prefill_tokens: int = 64
    prefix_caching: bool = False
    max_draft_tokens: int = 0
    num_accepted: int = field(default=0, init=False)
    """Drafted tokens of the last life that were right."""
    num_full_steps: int = field(default=0, init=False)
    """Steps of the last life with more than 16 sequences."""

    def __call__(self, *waves: Sequence[Request]) -> list[list[EngineOutput]]:
        core = load_core(
            self.file,
            isa=self.isa,
            num_threads=self.threads,
            num_blocks=self.num_blocks,
            max_num_seqs=32,
            max_batch_tokens=256,
        )
        engine = Engine(
            core,
            max_model_len=self.file.config.context_length,
            max_waiting=64,
            eog_token_ids=frozenset({2}),
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_mixed_prefill_tokens=self.max_mixed_prefill_tokens,
            enable_prefix_caching=self.prefix_caching,
            max_draft_tokens=self.max_draft_tokens,
            clock=lambda: 0.0,  # no cost is measured, so that how much is drafted does not hang on the machine
        )
        try:
            answers = asyncio.run(self._serve(engine, waves))
            self.num_accepted = engine.stats().accepted_tokens
            self.num_full_steps = engine.stats().batch_size_counts[5]
            return answers
        finally:
            engine.stop()

    async def _serve(self, engine: Engine, waves: Sequence[Sequence[Request]]) -> list[list[EngineOutput]]:
        engine.start(asyncio.get_running_loop())
        weights = [adapter_weights(self.file, seed) for seed in ADAPTER_SEEDS]
        adapters = [await asyncio.to_thread(engine.load_adapter, w) for w in weights]

        async def answer(request: Request, started: asyncio.Event) -> EngineOutput:
            adapter = None if request.adapter is None else adapters[request.adapter]
            outputs = []
            try:
                async for output in engine.submit(request.prompt, request.params, adapter=adapter):
                    outputs.append(output)
                    started.set()
            finally:
                started.set()  # the next wave must not wait for one that failed
            return merge_outputs(outputs)

        tasks = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            for wave in waves:
                events = [asyncio.Event() for _ in wave]
                pairs = zip(wave, events, strict=True)
                tasks.append([asyncio.create_task(answer(request, started)) for request, started in pairs])
                for event in events:
                    await event.wait()
            return [list(await asyncio.gather(*wave)) for wave in tasks]


Alone = dict[str, EngineOutput]


@pytest.fixture(scope="module")
def alone(file: ModelFile) -> Alone:
    found = {name: Run(file)([subject])[0][0] for name, subject in SUBJECTS.items()}
    for name, output in found.items():
        assert len(output.token_ids) == 24
        assert len(set(output.token_ids)) > 3, f"{name} only repeats itself and would prove little"
    return found


def assert_same(got: EngineOutput, expected: EngineOutput) -> None:
    """Tokens, log-probabilities with their alternatives, prompt log-probabilities: equal, not close."""
    assert got.error is None
    assert tuple(got.token_ids) == tuple(expected.token_ids)
    assert got.logprobs == expected.logprobs
    assert got.prompt_logprobs == expected.prompt_logprobs
    assert got.finish_reason == expected.finish_reason


SETTINGS = {
    "one thread": {},
    "three threads": {"threads": 3},
    "prefix cache": {"prefix_caching": True},
    "small chunks": {"max_num_batched_tokens": 33, "max_mixed_prefill_tokens": 7},
    "small chunks, cache, two threads": {
        "max_num_batched_tokens": 50,
        "max_mixed_prefill_tokens": 19,
        "threads": 2,
        "prefix_caching": True,
    },
    "drafts": {"max_draft_tokens": 6},
    "drafts, small chunks, cache, three threads": {
        "max_draft_tokens": 15,
        "max_num_batched_tokens": 50,
        "max_mixed_prefill_tokens": 19,
        "threads": 3,
        "prefix_caching": True,
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_among_31_others(settings: str, file: ModelFile, alone: Alone) -> None:
    """The subjects arrive while 22 others are being answered; nine more come after them."""
    others, run = neighbours(7), Run(file, **SETTINGS[settings])
    _, answers, _ = run(others[:22], list(SUBJECTS.values()), others[22:])
    if settings != "small chunks":  # there the prompts take so long that few answers overlap
        assert run.num_full_steps >= 10
    for got, expected in zip(answers, alone.values(), strict=True):
        assert_same(got, expected)


THREE_TOKENS = {7: 100.0, 8: 100.0, 9: 100.0}
LOOPS = [
    Request(
        prompt(30 + i, 5 + i) * 6,
        replace(subject.params, max_tokens=60, temperature=heat, seed=i, logit_bias=THREE_TOKENS),
        adapter,
    )
    for i, subject in enumerate(list(SUBJECTS.values())[:3])
    for heat, adapter in ((0.0, None), (0.0, 1), (0.3, 0))
]
"""Answers of three tokens only: many guesses, some right and some wrong."""


@pytest.mark.parametrize("isa", _sterna.available_isas())
def test_drafts_are_taken_back_without_a_trace(isa: str, file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted or not, in a pool too small for all and with preemptions, on every ISA."""
    expected = [Run(file, isa=isa)([one])[0][0] for one in LOOPS]
    run = Run(file, isa=isa, max_draft_tokens=8)
    for got, one in zip(run(LOOPS)[0], expected, strict=True):
        assert_same(got, one)
    assert run.num_accepted >= 10
    Preemptions(monkeypatch, every=7)
    run = Run(file, isa=isa, max_draft_tokens=8, threads=2, num_blocks=40, prefix_caching=True)
    for got, one in zip(run(LOOPS)[0], expected, strict=True):
        assert_same(got, one)
    assert run.num_accepted >= 5


@pytest.mark.parametrize("isa", _sterna.available_isas())
@pytest.mark.parametrize("subject", ["greedy, long", "adapter"])
def test_each_isa_is_invariant(subject: str, isa: str, file: ModelFile) -> None:
    """ISAs may differ from one another; each gives one answer."""
    (expected,), *_ = Run(file, isa=isa)([SUBJECTS[subject]])
    run = Run(file, isa=isa, threads=2, max_num_batched_tokens=40, max_mixed_prefill_tokens=11, prefix_caching=True)
    _, (got,) = run(neighbours(8), [SUBJECTS[subject]])
    assert_same(got, expected)


def test_alone_in_chunks_and_on_threads(file: ModelFile, alone: Alone) -> None:
    for settings in ({"max_num_batched_tokens": 32}, {"threads": 2}, {"threads": 3, "max_num_batched_tokens": 100}):
        for name, subject in SUBJECTS.items():
            assert_same(Run(file, **settings)([subject])[0][0], alone[name])


def test_hot_prefix_cache(file: ModelFile, alone: Alone) -> None:
    """The second time all full blocks of the prompt come from the cache, computed by the first or by a neighbour."""
    subjects = list(SUBJECTS.values())

    longer = [replace(s, prompt=s.prompt + prompt(9, 20), params=replace(s.params, seed=99)) for s in subjects]
    done = [replace(s, params=replace(s.params, max_tokens=1)) for s in longer]
    _, answers = Run(file, prefix_caching=True)(done, subjects)
    for subject, got, expected in zip(subjects, answers, alone.values(), strict=True):
        assert_same(got, expected)
        if subject.params.num_prompt_logprobs is None:
            assert got.num_cached_tokens == (len(subject.prompt) - 1) // 16 * 16


class Preemptions:
    """The prompts of what schedulers sent back. `every` forces one, of the youngest, each so many steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int | None = None) -> None:
        self.prompts: list[tuple[int, ...]] = []
        schedule, preempt = Scheduler.schedule, Scheduler._preempt
        steps = itertools.count(1)

        def scheduling(scheduler: Scheduler) -> StepPlan:
            if every is not None and next(steps) % every == 0 and scheduler.running:
                scheduler._preempt(scheduler.running[-1])
            return schedule(scheduler)

        def preempting(scheduler: Scheduler, seq: EngineSequence) -> None:
            self.prompts.append(tuple(seq.token_ids[: seq.num_prompt]))
            preempt(scheduler, seq)

        monkeypatch.setattr(Scheduler, "schedule", scheduling)
        monkeypatch.setattr(Scheduler, "_preempt", preempting)


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["cold", "hot"])
def test_preempted(prefix_caching: bool, file: ModelFile, alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, sent back at any step of its prompt or its answer, which it then computes again as one longer prompt."""
    preemptions = Preemptions(monkeypatch, every=5)
    run = Run(file, prefix_caching=prefix_caching, max_num_batched_tokens=32)
    for name, subject in SUBJECTS.items():
        assert_same(run([subject])[0][0], alone[name])
        assert preemptions.prompts.count(subject.prompt) >= 4


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["cold", "hot"])
def test_a_kv_pool_too_small_for_all(
    prefix_caching: bool, file: ModelFile, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 blocks for eleven sequences that would take about 80."""
    preemptions = Preemptions(monkeypatch)
    others = [replace(r, params=replace(r.params, max_tokens=60, ignore_eos=True)) for r in neighbours(9)[:6]]
    _, answers = Run(file, num_blocks=24, prefix_caching=prefix_caching)(others, list(SUBJECTS.values()))
    for got, expected in zip(answers, alone.values(), strict=True):
        assert_same(got, expected)
    assert preemptions.prompts


def test_an_adapter_beside_does_not_touch_those_without(file: ModelFile, alone: Alone) -> None:
    subject = SUBJECTS["greedy"]
    beside = [replace(subject, adapter=0), replace(subject, adapter=1), subject]
    with_0, with_1, without = Run(file, prefix_caching=True)(beside)[0]
    assert_same(without, alone["greedy"])
    assert len({tuple(o.token_ids) for o in (with_0, with_1, without)}) == 3, "the adapters do nothing"
    assert_same(with_1, Run(file)([beside[1]])[0][0])
