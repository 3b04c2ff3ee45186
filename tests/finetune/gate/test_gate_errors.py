"""A small run of benchmarks/gate_errors.py: the level over a history, and what fresh clusters are for."""

import numpy as np
import pytest

from benchmarks.gate_errors import (
    LEVEL_ONE,
    NUM_ROUNDS,
    World,
    gaining,
    lord,
    memorizing,
    promotions,
    rate,
    spent,
    traded,
    unspent,
)

SOME = World(120)


def test_twenty_rounds_of_equal_candidates_promote_few() -> None:
    assert promotions([SOME], spent, 40, 1, has_second=False)["any_percent"] <= 10  # 4 of 40; 5 % allows 2 on average
    assert promotions([SOME], unspent, 10, 1, has_second=False)["any_percent"] >= 10  # what the spending is for


@pytest.mark.slow
def test_twenty_rounds_of_equal_candidates_promote_few_by_either_route() -> None:
    assert promotions([SOME], spent, 200, 2)["any_percent"] <= 8


def test_what_was_gated_before_does_not_help_a_candidate_that_knows_it() -> None:
    assert memorizing(4, 1, is_fresh=True)["mean"] <= 0.25
    assert memorizing(1, 1, is_fresh=False)["mean"] >= 15  # of 20 rounds


def test_schedules_stay_within_their_budget() -> None:
    assert sum(spent(k, (), k + 1) for k in range(5000)) < 0.025
    assert sum(lord(k, (), k + 1) for k in range(5000)) < 0.025 / 2
    assert lord(3, (2,), 3) > lord(3, (), 3)
    assert spent(0, (1,), 2) == spent(0, (), 1) == LEVEL_ONE  # a promotion gives its level back


def test_power_grows_with_the_gain_and_trades_have_none() -> None:
    small, large = (rate(gaining(150, gain), 60, 1, LEVEL_ONE) for gain in (0.05, 0.20))
    assert small < 50 < 90 < large
    assert rate(traded(150, 50, 0.1), 100, 1, LEVEL_ONE) <= 5


def test_worlds_are_drawn_as_they_say() -> None:
    pairs = World(3000, max_traces=3, better=(0.2, 0.0), worse=(0.1, 0.1), loss_gain=0.5).draw(np.random.default_rng(0))
    assert pairs.num_clusters == 3000
    assert pairs.num_clusters_of(expects_call=True) == 2000
    calls = pairs.right[pairs.expects_call]
    assert (calls == 1).mean() == pytest.approx(0.2 * 0.8, abs=0.02)
    assert (pairs.right[~pairs.expects_call] == 1).sum() == 0
    assert pairs.loss.mean() == pytest.approx(0.5, abs=0.05)
    assert pairs.loss.std() == pytest.approx(1, abs=0.1)
    assert NUM_ROUNDS == 20
