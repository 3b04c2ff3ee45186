"""Drafts change how fast tokens come and nothing else: every answer is the one that plain decoding gives.

The scheduler over the fake core, whose logits hang on every KV cell that the block table reaches, with random batches:
tokens, log-probabilities and endings with drafts are those without. The core's sampler and the real forward pass are
compared in test_speculation_core.py.
"""

import random
from copy import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from _sterna import find_match
from server.engine.params import EngineOutput, Grammar, SamplingParams
from server.engine.sequence import NO_DRAFT, Draft, Guess
from server.engine.step_cost import StepBudget, StepCost
from tests.server.engine.driver import Driver
from tests.server.engine.fake_core import FakeCore

VOCAB = 61


class Phrases:
    """Phrases from a list one after the other, `count` of them, then token 60; a choice where they begin alike."""

    def __init__(self, phrases: list[tuple[int, ...]], count: int, *, fail_at: int | None = None) -> None:
        self.phrases, self.count, self.fail_at = phrases, count, fail_at
        self.open = phrases
        self.place = 0
        self.num_taken = 0

    def _allowed(self) -> set[int]:
        return {60} if self.is_finished() else {phrase[self.place] for phrase in self.open}

    def fill_mask(self, mask: np.ndarray) -> None:
        if self.num_taken == self.fail_at:
            raise ValueError("broken grammar")
        for token in self._allowed():
            mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def advance(self, token_id: int) -> bool:
        if token_id not in self._allowed() or self.is_finished():
            return False
        self.num_taken += 1
        self.open = [phrase for phrase in self.open if phrase[self.place] == token_id]
        self.place += 1
        if self.place == min(map(len, self.open)):
            self.open, self.place = self.phrases, 0
            self.count -= 1
        return True

    def is_finished(self) -> bool:
        return self.count == 0

    def fork(self) -> "Phrases":
        return copy(self)

    def take(self, token_ids: list[int]) -> int:
        for index, token_id in enumerate(token_ids):
            if not self.advance(token_id):
                return index
        return len(token_ids)

    def forced_tokens(self) -> list[int]:
        ahead, forced = self.fork(), []
        while not ahead.is_finished() and len(allowed := ahead._allowed()) == 1 and ahead.num_taken != self.fail_at:
            forced += allowed
            ahead.advance(forced[-1])
        return forced


def request(rng: random.Random) -> tuple[list[int], SamplingParams, Grammar | None]:
    piece = [rng.randrange(60) for _ in range(rng.randint(1, 6))]
    prompt = (piece * 12)[: rng.randint(1, 40)]
    has_penalties = rng.random() < 0.3
    params = SamplingParams(
        max_tokens=rng.randint(1, 40),
        temperature=rng.choice([0.0, 0.0, 0.4, 1.0]),
        seed=rng.randrange(100),
        repetition_penalty=1.1 if has_penalties else 1.0,
        frequency_penalty=0.1 if has_penalties else 0.0,
        logit_bias={piece[0]: 2.0} if rng.random() < 0.2 else {},
        min_tokens=rng.choice([0, 0, 5]),
        num_logprobs=rng.choice([None, None, 0, 3]),
        num_prompt_logprobs=rng.choice([None, None, None, 1]),
    )
    grammar = None
    if rng.random() < 0.4:
        phrases = [tuple(rng.randrange(20) for _ in range(rng.randint(1, 7))) for _ in range(rng.randint(1, 3))]
        grammar = Phrases(phrases, rng.randint(1, 6), fail_at=rng.choice([None, None, None, rng.randrange(10)]))
    return prompt, params, grammar


def run(seed: int, max_draft_tokens: int, **core_options) -> tuple[list[EngineOutput], Driver]:
    """One batch of random requests that arrive some steps apart."""
    rng = random.Random(seed)
    driver = Driver(
        FakeCore(context=1, **core_options), max_draft_tokens=max_draft_tokens, prefix_caching=seed % 2 == 0
    )
    sequences = []
    for _ in range(rng.randint(1, 6)):
        prompt, params, grammar = request(rng)
        sequences.append(driver.add(prompt, params, ends=frozenset({60}), grammar=grammar))
        for _ in range(rng.randint(0, 3)):
            if driver.scheduler.has_work:
                driver.step()
    driver.run()
    return [driver.result(seq) for seq in sequences], driver


def assert_same(got: EngineOutput, expected: EngineOutput) -> None:
    assert tuple(got.token_ids) == tuple(expected.token_ids)
    assert got.logprobs == expected.logprobs
    assert got.prompt_logprobs == expected.prompt_logprobs
    assert (got.finish_reason, got.stop_token_id, got.error) == (
        expected.finish_reason,
        expected.stop_token_id,
        expected.error,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([64, 20]), st.sampled_from([16, 8]))
def test_answers_are_those_without_drafts(seed, num_blocks, max_logit_rows):
    expected, _ = run(seed, 0, num_blocks=num_blocks, max_logit_rows=max_logit_rows)
    got, driver = run(seed, 6, num_blocks=num_blocks, max_logit_rows=max_logit_rows)
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other)
    assert driver.blocks.num_used == 0


def test_loops_are_copied_in_fewer_steps():
    driver = Driver(FakeCore(context=1), max_draft_tokens=6)
    seq = driver.add([1, 2, 3], SamplingParams(max_tokens=150, temperature=0.0))
    driver.run()
    assert len(driver.tokens(seq)) == 150
    assert len(driver.core.steps) < 90
    assert driver.counters.draft_tokens >= driver.counters.accepted_tokens == 150 - len(driver.core.steps)


def test_forced_tokens_go_in_with_the_prompt_and_get_no_logits():
    driver = Driver(max_draft_tokens=4)
    grammar = Phrases([(1, 2, 3, 4, 5)], 2)
    seq = driver.add(
        [7, 8, 9], SamplingParams(max_tokens=20, temperature=1.0, seed=1), ends=frozenset({60}), grammar=grammar
    )
    driver.run()
    assert driver.tokens(seq) == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 60]
    (step,) = driver.core.steps
    assert step.num_tokens == [13]
    assert step.logit_rows == [12]
    assert driver.counters.forced_tokens == 10


def test_long_forced_texts_do_not_hold_up_the_other_answers():
    """Beside other sequences a step has room for as many forced tokens as for a prompt's; alone for all that fit."""

    def run_two(max_draft_tokens: int, *, late_prompt: bool) -> tuple[Driver, list[list[int]]]:
        core = FakeCore(context=1, max_batch_tokens=512, num_blocks=400)
        driver = Driver(core, max_draft_tokens=max_draft_tokens, max_mixed_prefill_tokens=64)
        first = driver.add([1, 2, 3], SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
        driver.step()
        forced = tuple(i % 50 for i in range(700))
        params = SamplingParams(max_tokens=900, temperature=0.0)
        sequences = [first, driver.add([4, 5], params, ends=frozenset({60}), grammar=Phrases([forced], 1))]
        for _ in range(2):
            driver.step()
        if late_prompt:
            sequences.append(driver.add([9] * 200, SamplingParams(max_tokens=3, temperature=0.0)))
        driver.run()
        return driver, [driver.tokens(seq) for seq in sequences]

    for late_prompt in (False, True):
        driver, tokens = run_two(4, late_prompt=late_prompt)
        shared = [step for step in driver.core.steps if len(step.num_tokens) > 1]
        assert len(shared) > 4
        assert max(sum(step.num_tokens) - len(step.num_tokens) for step in shared) <= 64
        if late_prompt:  # its chunks have half of it at least
            assert len([step for step in shared if len(step.num_tokens) == 3 and max(step.num_tokens) >= 32]) >= 6
        assert tokens == run_two(0, late_prompt=late_prompt)[1]
    alone = Driver(FakeCore(context=1, max_batch_tokens=512, num_blocks=400), max_draft_tokens=4)
    alone.add([4, 5], SamplingParams(max_tokens=900), ends=frozenset({60}), grammar=Phrases([tuple(range(50)) * 14], 1))
    alone.run()
    assert len(alone.core.steps) == 2


def test_forced_tokens_have_log_probabilities_when_asked_for():
    def result(max_draft_tokens: int) -> EngineOutput:
        driver = Driver(max_draft_tokens=max_draft_tokens)
        params = SamplingParams(max_tokens=20, temperature=0.0, num_logprobs=2)
        seq = driver.add([7, 8, 9], params, ends=frozenset({60}), grammar=Phrases([(1, 2, 3, 4, 5)], 2))
        driver.run()
        assert len(driver.core.steps) == (1 if max_draft_tokens else 11)
        return driver.result(seq)

    assert_same(result(4), result(0))


def test_a_request_can_switch_it_off():
    driver = Driver(FakeCore(context=1), max_draft_tokens=6)
    seq = driver.add([1, 2] * 10, SamplingParams(max_tokens=30, temperature=0.0, speculation=False))
    driver.run()
    assert driver.counters.draft_tokens == 0
    assert len(driver.core.steps) == 30
    assert driver.tokens(seq)


def test_cancelled_between_steps_gives_everything_back():
    driver = Driver(FakeCore(context=1), max_draft_tokens=6)
    seq = driver.add([1, 2] * 10, SamplingParams(max_tokens=60, temperature=0.0))
    for _ in range(6):
        driver.step()
    driver.cancel(seq)
    assert driver.blocks.num_used == 0


def test_rejected_tokens_never_reach_the_prefix_cache():
    """What a second request finds there gives it the answer that it has without a cache."""
    for seed in range(12):
        text = [random.Random(seed).randrange(60) for _ in range(5)] * 4
        params = SamplingParams(max_tokens=30, temperature=0.7, seed=seed, num_logprobs=1)

        def answers(max_draft_tokens: int, text=text, params=params) -> list[EngineOutput]:
            driver = Driver(FakeCore(context=1, num_blocks=99), max_draft_tokens=max_draft_tokens)
            first = driver.add(text, params)
            driver.run()
            second = driver.add(text + driver.tokens(first), params)
            driver.run()
            assert driver.result(second).num_cached_tokens >= 44
            return [driver.result(first), driver.result(second)]

        for got, expected in zip(answers(6), answers(0), strict=True):
            assert_same(got, expected)


# -- the parts --


def slow_match(tokens: list[int], least: int, most: int) -> tuple[int, int]:
    for length in range(most, least - 1, -1):
        for at in range(len(tokens) - 1, length - 1, -1):
            if tokens[at - length : at] == tokens[len(tokens) - length :]:
                return at, length
    return -1, 0


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 3), st.integers(3, 5))
def test_the_longest_then_latest_match(tokens, least, most):
    assert find_match(np.array(tokens, np.int32), least, most) == slow_match(tokens, least, most)


@pytest.mark.parametrize(
    ("sampled", "tokens"),
    [([5, 6, 9], [1, 5, 2, 6, 3, 9]), ([5, 7, -1], [1, 5, 2, 7]), ([8, -1, -1], [1, 8])],
)
def test_what_comes_of_a_draft(sampled, tokens):
    draft = Draft([1, 5, 2, 6, 3], [1, 3, 5], [Guess(1, 2), Guess(3, 2)])
    assert draft.held(sampled) == tokens
    assert NO_DRAFT.held([4]) == [4]


def test_the_cost_of_a_row_is_learned_with_its_stairs():
    cost, rng = StepCost(), random.Random(1)
    for _ in range(600):
        rows = rng.randint(1, 12)
        cost.observe(rows, 0.01 + 0.002 * rows + (0.008 if rows > 4 else 0) + rng.gauss(0, 0.0003))
    for rows, seconds in ((1, 0.012), (4, 0.018), (5, 0.028), (8, 0.034)):
        assert cost.seconds(rows) == pytest.approx(seconds, rel=0.08)
    assert StepBudget(cost, 1, 1.0).pick([0.9, 0.8, 0.7, 0.6, 0.5]) == 3


def test_a_large_batch_drafts_only_what_is_all_but_certain():
    cost = StepCost()
    for rows in (1, 8, 32, 33) * 40:
        cost.observe(rows, 0.0024 + 0.00052 * rows)
    assert StepBudget(cost, 1, 1.0).pick([0.5]) == 1
    assert StepBudget(cost, 32, 32.0).pick([0.85]) == 0
    assert StepBudget(cost, 32, 32.0).pick([1.0, 1.0]) == 2


def test_before_any_step_was_measured():
    assert StepBudget(StepCost(), 1, 1.0).pick([0.7, 0.5, 0.1]) == 2
