"""The scheduler over a core whose output depends on every KV cell: order, budgets, sharing, preemption, endings."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.adapters import LoadedAdapter
from server.engine.params import SamplingParams
from server.engine.sequence import SequenceState
from tests.server.engine.driver import Driver
from tests.server.engine.fake_core import FakeCore, FakeLora, reference_prompt_logprobs

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
SEEDED = SamplingParams(
    max_tokens=20, temperature=0.9, seed=7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2
)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(61), k=length)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 63, 64, 65, 150])
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_alone(length, params):
    driver = Driver()
    seq = driver.add(prompt(length, length), params)
    driver.run()
    assert driver.tokens(seq) == driver.expected(seq)
    assert driver.result(seq).finish_reason == "length"
    assert driver.blocks.num_used == 0


def test_neighbours_do_not_matter():
    driver = Driver(FakeCore(num_blocks=512, max_num_seqs=16, max_logit_rows=16))
    sequences = [driver.add(prompt(i, 1 + 7 * i), SEEDED if i % 2 else GREEDY) for i in range(16)]
    driver.run()
    for seq in sequences:
        assert driver.tokens(seq) == driver.expected(seq)


def test_many_prompts_share_one_prefill_step():
    driver = Driver()
    for i in range(4):
        driver.add(prompt(i, 10), GREEDY)
    plan = driver.step()
    assert plan.num_tokens == [10, 10, 10, 10]
    assert driver.core.steps[0].logit_rows == [9, 19, 29, 39]


def test_long_prompt_is_chunked_to_the_budget():
    driver = Driver()
    seq = driver.add(prompt(0, 150), GREEDY)
    driver.run()
    assert [step.num_tokens for step in driver.core.steps[:4]] == [[64], [64], [22], [1]]
    assert driver.tokens(seq) == driver.expected(seq)


def test_prefill_beside_decodes_is_bounded():
    driver = Driver(max_mixed_prefill_tokens=16)
    running = driver.add(prompt(0, 5), SamplingParams(max_tokens=100, temperature=0.0))
    driver.step()
    late = driver.add(prompt(1, 50), GREEDY)
    for expected in (16, 16, 16, 2):
        plan = driver.step()
        assert plan.num_tokens == [1, expected]
    driver.run()
    assert driver.tokens(running) == driver.expected(running)
    assert driver.tokens(late) == driver.expected(late)


def test_first_come_first_served():
    driver = Driver(FakeCore(max_num_seqs=2))
    sequences = [driver.add(prompt(i, 6), GREEDY) for i in range(6)]
    admitted = []
    while driver.scheduler.has_work:
        admitted += driver.step().admitted
    assert admitted == sequences


def test_prefix_cache_hot_equals_cold():
    driver = Driver()
    shared = prompt(1, 40)
    cold = driver.add([*shared, 1, 2, 3], SEEDED)
    driver.run()
    hot = driver.add([*shared, 1, 2, 3], SEEDED)
    other = driver.add([*shared, 5, 6, 7, 8, 9], SEEDED)
    driver.run()
    assert driver.result(cold).num_cached_tokens == 0
    assert driver.result(hot).num_cached_tokens == 40
    assert driver.result(other).num_cached_tokens == 40
    assert driver.tokens(hot) == driver.tokens(cold) == driver.expected(cold)
    assert driver.tokens(other) == driver.expected(other)
    assert driver.counters.prefix_hit_tokens == 80
    assert driver.counters.prefix_query_tokens == 43 + 43 + 45


def test_output_blocks_are_cached_too():
    driver = Driver()
    first = driver.add(prompt(2, 10), GREEDY)
    driver.run()
    turn = prompt(2, 10) + driver.tokens(first) + [3, 4]
    second = driver.add(turn, GREEDY)
    driver.run()
    # The last sampled token was never computed: 10 + 11 tokens have KV, 20 of them in full blocks.
    assert driver.result(second).num_cached_tokens == 20
    assert driver.tokens(second) == driver.expected(second)


def test_choices_of_one_prompt_compute_it_once():
    driver = Driver()
    text = prompt(3, 41)
    choices = [driver.add(text, SamplingParams(max_tokens=6, temperature=1.0, seed=5, choice=i)) for i in range(4)]
    assert driver.step().sequences == choices[:1]
    plan = driver.step()
    assert plan.sequences == choices
    assert plan.num_tokens == [1, 1, 1, 1]
    driver.run()
    outputs = [driver.tokens(seq) for seq in choices]
    assert outputs == [driver.expected(seq) for seq in choices]
    assert len({tuple(output) for output in outputs}) == 4


def test_waiting_for_a_prefix_survives_its_owner():
    driver = Driver()
    text = prompt(4, 150)
    owner, follower = driver.add(text, GREEDY), driver.add(text, GREEDY)
    driver.step()
    assert follower.state is SequenceState.WAITING
    driver.cancel(owner)
    driver.run()
    assert driver.tokens(follower) == driver.expected(follower)
    assert driver.result(owner).finish_reason == "cancelled"


def test_waiting_for_a_prefix_is_bounded():
    driver = Driver()
    text = prompt(5, 30)
    driver.add(text, GREEDY)
    follower = driver.add(text, GREEDY)
    follower.num_prefix_waits = 10**6
    plan = driver.step()
    assert follower in plan.sequences  # computed twice rather than never
    driver.run()
    assert driver.tokens(follower) == driver.expected(follower)


def packed(scale: float) -> FakeLora:
    lora = FakeLora()
    lora.add(0, "q_proj", np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), scale)
    return lora


def test_adapters_and_salts_never_share_blocks():
    driver = Driver()
    driver.core.set_lora(0, packed(1.0))
    driver.core.set_lora(1, packed(2.0))
    first, second = LoadedAdapter(0, "sha256:1"), LoadedAdapter(1, "sha256:2")
    text = prompt(6, 33)
    runs = [
        (driver.add(text, GREEDY, adapter=adapter, cache_salt=salt), driver.core.loras[adapter.slot] if adapter else "")
        for _ in range(2)
        for adapter in (None, first, second)
        for salt in (b"", b"key")
    ]
    driver.run()
    for seq, lora in runs:
        assert driver.tokens(seq) == driver.expected(seq, lora=lora)
    assert len({tuple(driver.tokens(seq)) for seq, _ in runs}) == 3
    cold = [driver.result(seq).num_cached_tokens for seq, _ in runs[:6]]
    assert cold == [0] * 6
    assert all(driver.result(seq).num_cached_tokens == 32 for seq, _ in runs[6:])


def test_a_new_version_in_an_old_slot_starts_cold():
    driver = Driver()
    text = prompt(7, 33)
    driver.core.set_lora(0, packed(1.0))
    old = driver.add(text, GREEDY, adapter=LoadedAdapter(0, "sha256:old"))
    driver.run()
    driver.core.clear_lora(0)
    driver.core.set_lora(0, packed(5.0))
    new = driver.add(text, GREEDY, adapter=LoadedAdapter(0, "sha256:new"))
    driver.run()
    assert driver.result(new).num_cached_tokens == 0
    assert driver.tokens(new) == driver.expected(new, lora=driver.core.loras[0])
    assert driver.tokens(new) != driver.tokens(old)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_changes_nothing(prefix_caching):
    driver = Driver(FakeCore(num_blocks=24), prefix_caching=prefix_caching)
    params = [
        SamplingParams(
            max_tokens=60, temperature=0.8, seed=i, frequency_penalty=0.3, repetition_penalty=1.2, min_tokens=40
        )
        for i in range(4)
    ]
    sequences = [driver.add(prompt(i, 13), params[i], ends=frozenset({3, 5})) for i in range(4)]
    driver.run()
    assert driver.counters.num_preemptions > 0
    for seq in sequences:
        assert driver.tokens(seq) == driver.expected(seq)
        assert len(driver.tokens(seq)) > 40
    assert driver.blocks.num_used == 0


def test_preemption_takes_the_latest_arrival():
    driver = Driver(FakeCore(num_blocks=8))
    first = driver.add(prompt(0, 10), SamplingParams(max_tokens=22, temperature=0.0))
    second = driver.add(prompt(1, 10), SamplingParams(max_tokens=22, temperature=0.0))
    finished = []
    while driver.scheduler.has_work:
        driver.step()
        assert first.state is not SequenceState.WAITING
        finished += [seq for seq in (first, second) if seq.state is SequenceState.FINISHED and seq not in finished]
    assert finished == [first, second]
    assert driver.counters.num_preemptions > 0
    assert driver.tokens(second) == driver.expected(second)


def test_one_sequence_may_fill_the_whole_pool():
    driver = Driver(FakeCore(num_blocks=8))
    seq = driver.add(prompt(0, 31), SamplingParams(max_tokens=100, temperature=0.0))
    behind = driver.add(prompt(1, 20), SamplingParams(max_tokens=100, temperature=0.0))
    driver.run()
    assert len(seq.token_ids) == len(behind.token_ids) == 32
    assert driver.result(seq).finish_reason == driver.result(behind).finish_reason == "length"
    assert driver.tokens(behind) == driver.expected(behind)


@pytest.mark.parametrize("num_blocks", [12, 64])
def test_prompt_logprobs(num_blocks):
    """Chunked by the logit rows, never from the cache, complete after a preemption, beside other traffic."""
    driver = Driver(FakeCore(num_blocks=num_blocks, max_logit_rows=9))
    text = prompt(8, 30)
    driver.add(text, SamplingParams(max_tokens=18, temperature=0.0))
    params = SamplingParams(max_tokens=15, temperature=0.0, num_prompt_logprobs=2, num_logprobs=1)
    scored = [driver.add(text, params), driver.add(text, params)]
    driver.run()
    for seq in scored:
        result = driver.result(seq)
        assert result.num_cached_tokens == 0
        assert result.prompt_logprobs[0] is None
        entries = result.prompt_logprobs[1:]
        assert [entry.token_id for entry in entries] == text[1:]
        assert [entry.logprob for entry in entries] == pytest.approx(reference_prompt_logprobs(text))
        assert all(len(entry.top) == 2 and entry.top[0][1] >= entry.top[1][1] for entry in entries)
        assert sum(output.prompt_logprobs is not None for output in driver.outputs[seq]) == 1
        assert driver.outputs[seq][0].prompt_logprobs is not None
        assert driver.tokens(seq) == driver.expected(seq)
        assert [entry.token_id for entry in result.logprobs] == driver.tokens(seq)
        assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in result.logprobs)


def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt():
    driver = Driver(FakeCore(num_blocks=24, max_num_seqs=4, max_logit_rows=4))
    for i in range(2):
        driver.add(prompt(i, 5), SamplingParams(max_tokens=60, temperature=0.0))
    text = prompt(9, 60)
    scored = driver.add(text, SamplingParams(max_tokens=3, temperature=0.0, num_prompt_logprobs=0))
    collected_before_preemption = 0
    while driver.scheduler.has_work:
        driver.step()
        if scored.state is SequenceState.WAITING and scored.was_admitted:
            collected_before_preemption = len(scored.prompt_logprobs)
    assert 1 < collected_before_preemption < 60
    entries = driver.result(scored).prompt_logprobs[1:]
    assert [entry.token_id for entry in entries] == text[1:]
    assert [entry.logprob for entry in entries] == pytest.approx(reference_prompt_logprobs(text))


def test_num_logprobs_zero_gives_the_chosen_token_only():
    driver = Driver()
    seq = driver.add(prompt(1, 5), SamplingParams(max_tokens=2, temperature=1.0, seed=1, num_logprobs=0))
    driver.run()
    logprobs = driver.result(seq).logprobs
    assert [entry.top for entry in logprobs] == [(), ()]
    assert all(entry.logprob < 0 for entry in logprobs)


def test_stop_tokens_and_min_tokens():
    ends = frozenset(range(0, 61, 3))
    driver = Driver()
    plain = driver.add(prompt(1, 5), SamplingParams(max_tokens=50, temperature=1.0, seed=1), ends=ends)
    patient = driver.add(prompt(1, 5), SamplingParams(max_tokens=50, temperature=1.0, seed=1, min_tokens=9), ends=ends)
    driver.run()
    for seq in (plain, patient):
        result = driver.result(seq)
        assert result.finish_reason == "stop"
        assert result.stop_token_id == result.token_ids[-1]
        assert result.stop_token_id in ends
        assert driver.tokens(seq) == driver.expected(seq)
    assert len(driver.tokens(patient)) > 9
    assert not ends & set(driver.tokens(patient)[:9])


def test_latecomers_do_not_starve_the_head_of_the_queue():
    """A big prompt waits for blocks; small ones behind it must not keep taking them."""
    driver = Driver(FakeCore(num_blocks=16))
    small = [driver.add(prompt(i, 8), SamplingParams(max_tokens=12, temperature=0.0)) for i in range(3)]
    driver.step()
    big = driver.add(prompt(99, 50), SamplingParams(max_tokens=5, temperature=0.0))
    for i in range(100):
        if big.state is SequenceState.FINISHED:
            break
        driver.add(prompt(100 + i, 8), SamplingParams(max_tokens=12, temperature=0.0))
        driver.step()
    assert i < 40
    assert driver.tokens(big) == driver.expected(big)
    assert all(seq.state is SequenceState.FINISHED for seq in small)
    driver.run()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(0, 3),  # which shared head
            st.integers(0, 30),  # how much of it
            st.integers(1, 20),  # own tail
            st.integers(1, 30),  # max_tokens
            st.sampled_from(["greedy", "seeded", "scored"]),
            st.sampled_from([b"", b"salt"]),
        ),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
    ),
    max_size=40,
)


@settings(max_examples=120, deadline=None)
@given(OPERATIONS, st.integers(14, 40), st.booleans())
def test_random_traffic_leaks_nothing_and_answers_right(operations, num_blocks, prefix_caching):
    driver = Driver(FakeCore(num_blocks=num_blocks, max_num_seqs=5, max_logit_rows=7), prefix_caching=prefix_caching)
    for operation in operations:
        if operation[0] == "step":
            for _ in range(operation[1]):
                driver.step()
        elif operation[0] == "cancel":
            if driver.sequences:
                driver.cancel(driver.sequences[operation[1] % len(driver.sequences)])
        else:
            _, head, length, tail, max_tokens, kind, salt = operation
            params = SamplingParams(
                max_tokens=max_tokens,
                temperature=0.0 if kind == "greedy" else 0.7,
                seed=length,
                frequency_penalty=0.5,
                num_prompt_logprobs=0 if kind == "scored" else None,
            )
            driver.add(prompt(head, length) + prompt(1000 + tail, tail), params, cache_salt=salt)
    driver.run()
    assert driver.blocks.num_used == 0
    assert driver.blocks.num_available == num_blocks
    for seq in driver.sequences:
        tokens, expected = driver.tokens(seq) if driver.outputs[seq] else [], driver.expected(seq)
        if driver.result(seq).finish_reason == "cancelled":
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
            assert driver.result(seq).finish_reason == "length"
        if seq.params.num_prompt_logprobs == 0 and driver.result(seq).prompt_logprobs:
            assert len(driver.result(seq).prompt_logprobs) == seq.num_prompt
