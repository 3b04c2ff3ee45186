"""Drafts over the real sampler and forward pass, on every instruction set: tokens and log-probabilities stay equal.

test_speculation.py's promise, where a draft's rows share a batch with other rows and their kernels differ by its size.
"""

import random

import pytest

import _sterna
from server.engine.params import EngineOutput, SamplingParams
from tests.server.engine.core_twin import Shape, Twin
from tests.server.engine.driver import Driver
from tests.server.engine.test_speculation import Phrases

TWIN = Twin(Shape())


def answers(isa: str, max_draft_tokens: int) -> tuple[list[EngineOutput], Driver]:
    """Texts that repeat themselves, greedy and seeded, and one whose grammar forces most of its tokens."""
    core = TWIN.core(isa=isa, max_num_seqs=8, max_batch_tokens=64, max_logit_rows=64)
    driver = Driver(core, max_draft_tokens=max_draft_tokens)
    sequences = []
    for i, temperature in enumerate((0.0, 0.0, 0.3, 0.8)):
        prompt = random.Random(i).choices(range(TWIN.shape.vocab), k=4) * 5
        params = SamplingParams(max_tokens=40, temperature=temperature, seed=i, ignore_eos=True, num_logprobs=2)
        sequences.append(driver.add(prompt, params))
        driver.step()
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=9)
    phrases = [(1, 2, 3, 4, 5, 6), (1, 2, 9, 8, 7, 6)]
    sequences.append(driver.add([5, 6, 7], params, ends=frozenset({60}), grammar=Phrases(phrases, 4)))
    driver.run()
    return [driver.result(seq) for seq in sequences], driver


@pytest.mark.parametrize("isa", _sterna.available_isas())
def test_drafts_do_not_change_the_answers(isa: str) -> None:
    expected, _ = answers(isa, 0)
    got, driver = answers(isa, 6)
    assert driver.counters.accepted_tokens > 0
    assert driver.counters.draft_tokens > driver.counters.accepted_tokens
    assert driver.counters.forced_tokens > 0
    for one, other in zip(got, expected, strict=True):
        assert (one.token_ids, one.logprobs, one.finish_reason) == (
            other.token_ids,
            other.logprobs,
            other.finish_reason,
        )
