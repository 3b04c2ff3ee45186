"""Optimizer steps: every example once an epoch, steps of about the size asked for, the same again."""

from dataclasses import replace

import numpy as np
import pytest

from finetune.dataset.packing import pack
from finetune.packed import Example, Preference
from finetune.rounds.steps import Steps, normalized


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


def test_a_last_step_of_a_few_tokens_goes_to_the_one_before() -> None:
    given = examples(*([90] * 10))
    made = steps(given)
    ids = [tuple(one.token_ids) for step in range(made.num_steps) for one in made(step)]
    assert [len(made(step)) for step in range(made.num_steps)] == [3, 3, 4]
    assert len(set(ids)) == 10, "each once"


@pytest.mark.parametrize("is_curriculum", [False, True])
def test_micro_batches_come_in_twos(is_curriculum: bool) -> None:
    for seed in range(8):
        made = steps(examples(*range(10, 91)), num_sides=2, is_curriculum=is_curriculum, seed=seed)
        batches = [made(step) for step in range(made.num_steps)]
        assert sum(one.num_examples for step in batches for one in step) == 81
        assert sum(len(step) % 2 for step in batches) == 1, "there are 41"


def test_those_beside_each_other_are_others_in_the_next_epoch() -> None:
    made = steps(examples(*range(60, 100)), num_sides=2, epochs=2.0, tokens_per_step=1)
    half = made.num_steps // 2
    pairs = [
        {frozenset(tuple(one.token_ids.tolist()) for one in made(step)) for step in range(at, at + half)}
        for at in (0, half)
    ]
    assert len(pairs[0] & pairs[1]) < half / 2


def test_those_beside_each_other_are_of_like_length() -> None:
    made = steps(examples(*([50] * 4 + [95] * 4 + [180])), num_sides=2, tokens_per_step=1)
    pairs = [tuple(len(one.token_ids) for one in made(step)) for step in range(made.num_steps)]
    assert sorted(pairs) == [(95, 95), (95, 95), (100, 100), (180,)], "50 and 50 share a micro-batch"


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


def test_a_window_draws_dialogues_and_keeps_their_turns_together() -> None:
    given = []
    for number, one in enumerate(examples(*([40] * 60))):
        first = np.concatenate([[number], one.token_ids[1:]]).astype(np.int32)
        weights = (np.arange(44) > 40).astype(np.float32)
        given += [
            replace(one, id=f"{number}:0", token_ids=first),
            replace(one, id=f"{number}:1", token_ids=np.concatenate([first, first[:4]]), weights=weights),
        ]
    made = steps(given, window=4, epochs=2.0)

    def dialogues(epoch: int) -> list[tuple[int, ...]]:
        half = made.num_steps // 2
        batches = [one for step in range(half * epoch, half * (epoch + 1)) for one in made(step)]
        assert sum(one.num_examples for one in batches) == 120
        assert all(len(one.token_ids) == 88 for one in batches), "two dialogues, each laid out once"
        return [tuple(int(one.token_ids[part.start]) for part in one.segments if part.parent < 0) for one in batches]

    drawn, again = dialogues(0), dialogues(1)
    assert sorted(number for pair in drawn for number in pair) == list(range(60))
    assert {frozenset(pair) for pair in drawn} != {frozenset(pair) for pair in again}
    assert drawn != sorted(drawn)


def test_kl_is_spread_evenly_and_never_first() -> None:
    given = [replace(one, kl=index < 40) for index, one in enumerate(examples(*([60] * 60)))]
    made = steps(given)
    shares = [sum(one.loss_kl.mean() for one in made(step)) / len(made(step)) for step in range(made.num_steps)]
    assert not made(0)[0].loss_kl.any()
    assert all(0.3 < share < 0.9 for share in shares)
    assert sum(one.num_examples for step in range(made.num_steps) for one in made(step)) == 60
    only = steps([replace(one, kl=True) for one in given])
    assert sum(len(only(step)) for step in range(only.num_steps)) == 60


@pytest.mark.parametrize("is_curriculum", [False, True])
def test_pairs_are_among_the_steps(is_curriculum: bool) -> None:
    given = examples(*range(30, 60))
    ids = np.arange(45, dtype=np.int32)
    pairs = [Preference(one, np.append(one.token_ids[:20], ids), 20) for one in given[:10]]
    references = {pair.chosen.id: float(number) for number, pair in enumerate(pairs)}
    made = steps(given[10:], pairs=pairs, references=references, is_curriculum=is_curriculum)
    batches = [one for step in range(made.num_steps) for one in made(step)]
    found = [one.pairs for one in batches if one.pairs is not None]
    margins = {id_: value for one in found for id_, value in zip(one.ids, one.references.tolist(), strict=True)}
    assert margins == references
    assert sum(one.num_examples for one in batches) == 30
    only = steps([], pairs=pairs, references=references, is_curriculum=is_curriculum)
    assert sum(one.num_examples for step in range(only.num_steps) for one in only(step)) == 10


def test_distrust_changes_who_weighs_but_not_how_much_a_step_does() -> None:
    given = [replace(one, kl=index % 5 == 0) for index, one in enumerate(examples(*range(10, 60)))]
    doubts = [1.0 if one.kl else 0.25 + index % 3 for index, one in enumerate(given)]
    doubted = [replace(one, doubt=d, weights=one.weights * np.float32(d)) for one, d in zip(given, doubts, strict=True)]
    plain, made = (normalized(pack(one, 100, seed=1, epoch=0)) for one in (given, doubted))
    for is_kl in (False, True):
        sums = [sum(float(one.loss_weights[one.loss_kl == is_kl].sum()) for one in step) for step in (plain, made)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert len({round(float(weight), 3) for one in made for weight in one.loss_weights[~one.loss_kl]}) == 3
    assert {float(weight) for one in plain for weight in one.loss_weights} == {1.0}
    twice = [one if one.kl else replace(one, doubt=2 * one.doubt, weights=2 * one.weights) for one in doubted]
    for one, two in zip(made, normalized(pack(twice, 100, seed=1, epoch=0)), strict=True):
        np.testing.assert_allclose(one.loss_weights, two.loss_weights, rtol=1e-6)  # alpha cancels out


def test_the_seed_decides() -> None:
    given = examples(*range(10, 90))
    assert np.array_equal(steps(given)(1)[0].token_ids, steps(given)(1)[0].token_ids)
    assert not np.array_equal(steps(given)(1)[0].token_ids, steps(given, seed=2)(1)[0].token_ids)
