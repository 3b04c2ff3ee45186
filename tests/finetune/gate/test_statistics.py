"""The tests are exact (enumeration, textbook values, SciPy where it is installed) and keep their level (simulation)."""

import itertools
import math

import numpy as np
import pytest

from finetune.gate.bootstrap import bootstrap_improvement, resamples_for
from finetune.gate.intervals import NOTHING, balanced, fair_coin, mean_of, share_of, wilson
from finetune.gate.statistics import (
    MAX_WEIGHT,
    balanced_weights,
    half_width,
    mcnemar_p,
    pairs_of,
    primary_test,
    sign_flip_p,
    whole_weights,
)
from tests.finetune.gate.make import arrays, pair, pairs_table

LEVEL = 0.0152


def test_the_coin_is_exact() -> None:
    chances, tails = fair_coin(16)
    assert tails[12] == (1820 + 560 + 120 + 16 + 1) / 65536  # textbook: 12 or more of 16
    assert chances.sum() == pytest.approx(1, abs=1e-15)
    assert fair_coin(3000)[1][1600] == pytest.approx(0.000139, rel=0.01)  # far beyond floats' factorials
    assert mcnemar_p(0, 0) == 1.0


def test_tails_equal_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n, k in ((1, 1), (40, 25), (701, 400)):
        assert mcnemar_p(k, n - k) == pytest.approx(stats.binomtest(k, n, alternative="greater").pvalue, rel=1e-12)
    low, high = stats.binomtest(40, 50).proportion_ci(method="wilson")
    assert wilson(0.8, 50) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_sign_flips_are_counted_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences = rng.integers(-6, 7, rng.integers(1, 11)) * rng.choice([1, 5])
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    expected = (signs @ np.abs(differences) >= differences.sum()).mean()
    assert sign_flip_p(differences) == pytest.approx(expected, abs=1e-14)


def test_one_stratum_and_one_trace_a_cluster_is_mcnemars_test() -> None:
    pairs = pairs_of(pairs_table((50, 12, 4, 34)))
    test = primary_test(pairs, LEVEL)
    assert test.p_value == test.mcnemar_p_value == fair_coin(16)[1][12]
    assert (test.num_better, test.num_worse, test.weights) == (12, 4, (1, 1))
    assert test.difference == pytest.approx(0.08)


def test_strata_weigh_alike_however_many_traces_they_have() -> None:
    # 45 of 900 calls won, 20 of 100 no-calls lost: -7.5 points, which unweighted looks like a clear gain.
    test = primary_test(pairs_of(pairs_table((400, 45, 0, 455), (80, 0, 20, 0))), LEVEL)
    assert test.difference == pytest.approx(-0.075)
    assert test.mcnemar_p_value < 0.002
    assert test.p_value > 0.99
    assert not test.is_passed
    assert test.weights == (1, 9)


def test_a_cluster_is_one_unit_with_the_sum_of_its_traces() -> None:
    traces = [pair(i, True, False, cluster="same") for i in range(50)]
    traces += [pair(100 + i, True, True) for i in range(150)]
    test = primary_test(pairs_of(traces), LEVEL)
    assert (test.num_better, test.p_value) == (1, 0.5)
    assert not test.is_passed
    cancels = [pair(0, True, False, cluster="a"), pair(1, False, True, cluster="a")]
    assert primary_test(pairs_of(cancels), LEVEL).p_value == 1.0


def test_weights_are_whole_numbers_of_three_digits_at_most() -> None:
    assert whole_weights(60, 40) == (2, 3)
    assert whole_weights(0, 7) == whole_weights(7, 0) == (1, 1)
    call, none = whole_weights(3001, 997)
    assert none == MAX_WEIGHT
    assert call / none == pytest.approx(997 / 3001, rel=2e-3)
    weights = balanced_weights(np.array([True] * 3 + [False]))
    assert weights.tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])
    assert balanced_weights(np.array([True, True])).tolist() == [0.5, 0.5]


def test_no_gain_is_shown_by_a_few_unseen_losses_away() -> None:
    # Nothing lost of 25 no-calls may hide a loss of some: 3 points of gain on 475 calls do not show a balanced gain.
    test = primary_test(pairs_of(pairs_table((300, 30, 0, 145), (25, 0, 0, 0))), LEVEL)
    assert test.p_value < 1e-8
    assert test.lower < 0
    assert not test.is_passed


def _draw(rng: np.random.Generator, num: int, better: float, worse: float) -> np.ndarray:
    chance = rng.random(num)
    return np.where(chance < better, 1, np.where(chance < better + worse, -1, 0))


def test_equal_versions_pass_at_most_at_the_level_with_clusters_of_any_size() -> None:
    rng = np.random.default_rng(5)
    num_rounds, num_passed = 1500, 0
    for _ in range(num_rounds):
        sizes = rng.integers(1, 6, 120)
        clusters = np.repeat(np.arange(120), sizes)
        sign = rng.choice([-1, 1], 120)[clusters]  # within a cluster differences go together
        right = sign * (rng.random(len(clusters)) < 0.2)
        num_passed += primary_test(arrays(right, rng.random(len(clusters)) < 0.6, clusters), 0.025).is_passed
    assert num_passed <= 0.025 * num_rounds + 2.5 * math.sqrt(0.025 * num_rounds)
    assert num_passed > 0


@pytest.mark.parametrize("num_none", [25, 100])
def test_trading_rare_no_calls_for_calls_is_no_gain(num_none: int) -> None:
    rng = np.random.default_rng(6)
    num_rounds, num_passed = 500, 0
    for _ in range(num_rounds):
        right = np.concatenate([_draw(rng, 400, 0.05, 0), _draw(rng, num_none, 0, 0.05)])
        num_passed += primary_test(arrays(right, np.arange(len(right)) < 400), LEVEL).is_passed
    assert num_passed <= 2 * LEVEL * num_rounds


def test_bounds_hold_and_shrink_with_the_clusters() -> None:
    weights = np.full(200, 1 / 200)
    right = np.array([1] * 20 + [-1] * 10 + [0] * 170)
    strata = np.ones(200, bool)
    single = half_width(weights, np.arange(200), right, strata, 0.975)
    assert single == pytest.approx(1.96 * math.sqrt((30 - 0.5) / 200**2 * 200 / 199 + 2 / 200**2), rel=1e-3)
    assert half_width(weights, np.arange(200) // 10, right, strata, 0.975) > 1.5 * single
    assert half_width(weights, np.arange(200), right * 0, strata, 0.975) > 0


def test_shares_of_clustered_traces_have_wider_intervals() -> None:
    is_right = np.arange(100) < 60
    alone = share_of(is_right, np.arange(100))
    assert (alone.lower, alone.upper) == wilson(0.6, 100)
    together = share_of(is_right, np.arange(100) // 10)
    assert together.num_clusters == 10
    assert together.lower is not None
    assert together.lower < wilson(0.6, 20)[0]
    certain = share_of(np.ones(100, bool), np.arange(100) // 10)
    assert certain.lower == pytest.approx(wilson(1.0, 10)[0])
    assert share_of(np.zeros(0, bool), np.zeros(0, int)) == NOTHING


def test_balanced_intervals_come_from_their_halves() -> None:
    call, none = share_of(np.arange(80) < 60, np.arange(80)), share_of(np.arange(20) < 19, np.arange(20))
    both = balanced(call, none)
    assert both.value == pytest.approx((0.75 + 0.95) / 2)
    assert both.lower is not None
    assert call.lower is not None
    assert none.lower is not None
    assert both.value - both.lower == pytest.approx(math.hypot(0.75 - call.lower, 0.95 - none.lower) / 2)
    assert balanced(call, NOTHING).value is None


def test_means_of_losses() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    estimate = mean_of(values, np.arange(4))
    assert estimate.upper == pytest.approx(2.5 + 1.959964 * np.std(values, ddof=1) / 2)
    assert mean_of(values, np.zeros(4, int)).lower is None


def test_the_bootstrap_agrees_with_the_t_test_on_normal_values_and_repeats_itself() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.2, 1, 150)
    weights, clusters = np.full(150, 1 / 150), np.arange(150)
    test = bootstrap_improvement(values, weights, clusters, max_resamples=20_000)
    assert test.mean == pytest.approx(values.mean())
    assert test.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(150))
    z = test.mean / test.standard_error
    assert test.p_value == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), rel=0.5)
    assert test == bootstrap_improvement(values, weights, clusters, max_resamples=20_000)
    # Copies of the same traces are no new evidence.
    thrice = bootstrap_improvement(
        np.tile(values, 3), np.full(450, 1 / 450), np.tile(clusters, 3), max_resamples=20_000
    )
    assert thrice.standard_error == pytest.approx(test.standard_error)


def test_the_bootstrap_stops_early_where_there_is_nothing_and_says_so_where_nothing_varies() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0.02, 1, 120)
    test = bootstrap_improvement(values, np.full(120, 1 / 120), np.arange(120), max_resamples=resamples_for(1e-4))
    assert test.num_resamples < 1000
    assert bootstrap_improvement(-np.abs(values), np.full(120, 1 / 120), np.arange(120)).p_value == 1.0
    assert bootstrap_improvement(np.ones(120), np.full(120, 1 / 120), np.arange(120)).p_value == 1.0
    assert resamples_for(0.0152) == 2000
    assert resamples_for(1e-9) == 1_000_000


def test_the_bootstrap_keeps_its_level_on_skewed_losses() -> None:
    rng = np.random.default_rng(3)
    weights, clusters = np.full(120, 1 / 120), np.arange(120)
    num_rounds, num_passed = 600, 0
    for seed in range(num_rounds):
        values = math.exp(0.5) - rng.lognormal(0, 1, 120)  # mean 0, long tail of losses
        num_passed += bootstrap_improvement(values, weights, clusters, max_resamples=2000, seed=seed).p_value <= LEVEL
    assert num_passed <= 2.5 * LEVEL * num_rounds
