"""Optimizer steps: every example once an epoch, steps of about the size asked for, the same again."""

from dataclasses import replace

import numpy as np
import pytest

from finetune.packed import Example
from finetune.rounds.steps import Steps


def examples(*lengths: int) -> list[Example]:
    dice = np.random.default_rng(1)
    found = []
    for number, length in enumerate(lengths):
        weights = np.zeros(length, np.float32)
        weights[length // 2 :] = 1
        ids = dice.integers(1000, size=length).astype(np.int32)
        found.append(Example(f"trace-{number}", ids, weights, f"cluster-{number}"))
    return found


def steps(given: list[Example], **changes: object) -> Steps:
    options = {"seed": 1, "epochs": 1.0, "micro_batch_tokens": 100, "tokens_per_step": 200}
    return Steps(given, **(options | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_curriculum", [False, True])
def test_every_example_once_an_epoch(is_curriculum: bool) -> None:
    made = steps(examples(*range(10, 90)), is_curriculum=is_curriculum)
    batches = [made(step) for step in range(made.num_steps)]
    assert sum(one.num_examples for step in batches for one in step) == 80
    sizes = [sum(one.num_real_tokens for one in step) for step in batches]
    assert all(200 <= size < 300 for size in sizes[:-1])
    assert 100 <= sizes[-1] < 400, "what is left is a step of its own, or of the one before"
    assert all(len(one.token_ids) <= 100 for step in batches for one in step)


def test_a_longer_example_is_alone() -> None:
    made = steps(examples(20, 30, 250, 40))
    whole = [one for step in range(made.num_steps) for one in made(step)]
    assert sorted(len(one.token_ids) for one in whole)[-1] == 250
    assert sum(one.num_examples for one in whole) == 4


def test_epochs_differ_and_may_be_parts() -> None:
    given = examples(*range(10, 90))
    one, two, part = steps(given), steps(given, epochs=2.0), steps(given, epochs=1.5)
    assert two.num_steps >= 2 * one.num_steps - 1
    assert one.num_steps < part.num_steps < two.num_steps
    first, second = two(0), two(one.num_steps)
    assert not np.array_equal(first[0].token_ids, second[0].token_ids)
    assert np.array_equal(two(0)[0].token_ids, one(0)[0].token_ids), "asked for again, in any order"
    assert steps(given, max_steps=2).num_steps == 2
    assert steps(given, epochs=0.01).num_steps == 1


def test_kl_is_spread_evenly_and_never_first() -> None:
    given = [replace(one, kl=index < 40) for index, one in enumerate(examples(*([60] * 60)))]
    made = steps(given)
    shares = [sum(one.loss_kl.mean() for one in made(step)) / len(made(step)) for step in range(made.num_steps)]
    assert not made(0)[0].loss_kl.any()
    assert all(0.3 < share < 0.9 for share in shares)
    assert sum(one.num_examples for step in range(made.num_steps) for one in made(step)) == 60
    only = steps([replace(one, kl=True) for one in given])
    assert sum(len(only(step)) for step in range(only.num_steps)) == 60


def test_the_seed_decides() -> None:
    given = examples(*range(10, 90))
    assert np.array_equal(steps(given)(1)[0].token_ids, steps(given)(1)[0].token_ids)
    assert not np.array_equal(steps(given)(1)[0].token_ids, steps(given, seed=2)(1)[0].token_ids)
