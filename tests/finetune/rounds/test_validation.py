"""The validation part: whole clusters of the training side, no general examples, bounded cost, the same every time."""

from collections import Counter
from dataclasses import replace

import pytest

from finetune.packed import Example
from finetune.rounds.errors import RoundError
from finetune.rounds.validation import split_validation
from tests.finetune.rounds.test_steps import examples


def split(given: list[Example], **changes: float) -> tuple[list[Example], list[Example]]:
    options = {"share": 0.1, "evaluate_every": 20, "tokens_per_step": 2048, "seed": 1}
    return split_validation(given, **(options | changes))  # type: ignore[arg-type]


def some() -> list[Example]:
    """Forty clusters of three examples, and general ones that share a cluster's name."""
    made = examples(*[20 + number % 7 for number in range(160)])
    return [replace(one, cluster=f"cluster-{n % 40}", kl=n >= 120) for n, one in enumerate(made)]


def test_whole_clusters_without_general_examples() -> None:
    given = some()
    train, validated = split(given)
    assert Counter(one.id for one in (*train, *validated)) == Counter(one.id for one in given)
    assert len({one.cluster for one in validated}) == 4
    assert len(validated) == 12
    assert not {one.cluster for one in validated} & {one.cluster for one in train if not one.kl}
    assert sum(one.kl for one in train) == 40


def test_it_is_the_same_every_time_and_the_seed_decides() -> None:
    given = some()
    names = [{one.cluster for one in split(given[::order], seed=seed)[1]} for order, seed in ((1, 1), (-1, 1), (1, 2))]
    assert names[0] == names[1]
    assert names[0] != names[2]


def test_what_an_evaluation_costs_is_bounded() -> None:
    given = some()
    _, validated = split(given, share=0.5, evaluate_every=1, tokens_per_step=1500)
    tokens = sum(len(one.token_ids) for one in validated)
    assert tokens <= 0.03 * 3 * 1500
    _, one_cluster = split(given, share=0.5, evaluate_every=1, tokens_per_step=1)
    assert len({one.cluster for one in one_cluster}) == 1, "at least one"


def test_both_sides_have_something() -> None:
    train, validated = split([replace(one, cluster=f"{n}") for n, one in enumerate(examples(20, 20))], share=0.5)
    assert (len(train), len(validated)) == (1, 1)
    with pytest.raises(RoundError, match="has 1 clusters; it needs 2 or more"):
        split([replace(one, cluster="same") for one in examples(20, 20)])
