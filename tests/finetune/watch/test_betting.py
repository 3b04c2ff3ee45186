"""The e-processes: each factor is fair under its null whatever the centre, and they grow under harm of every kind."""

import math

import numpy as np
import pytest

from finetune.gate.decision import Outcome
from finetune.watch.betting import FRACTIONS, log_factors, log_mean_exp, log_sum_exp
from finetune.watch.processes import MAX_STRATA, Metric, Processes, harm_tests, safety_tests
from finetune.watch.ranks import HIGHEST_SECONDS, LOWEST_SECONDS, NUM_BINS, bins_of, ranks
from finetune.watch.settings import WatchSettings, settings_after
from tests.finetune.gate.make import pairs_table
from tests.finetune.gate.test_decision import gate

NO_TOLERANCE = WatchSettings(
    call_rate_change=(0, 0), tool_errors=0, retries=0, malformed=0, feedback=0, latency_ratio=1.0
)


def expected_factor(share: float, centre: float, old: float, difference: float, direction: int, bound: float) -> float:
    """The largest mean factor over the grid, of a measurement that is 0 or 1, by enumeration."""
    total = np.zeros(len(FRACTIONS))
    for is_new in (False, True):
        mean = old + difference * is_new
        for value in (0.0, 1.0):
            chance = (share if is_new else 1 - share) * (mean if value else 1 - mean)
            logs = log_factors(
                np.array([[value]]),
                np.array([is_new]),
                np.array([share]),
                np.array([[centre]]),
                np.array([direction]),
                np.array([bound]),
            )
            total += chance * np.exp(logs[0, 0])
    return float(total.max())


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("centre", [0.01, 0.3, 0.99])
@pytest.mark.parametrize(("direction", "bound"), [(1, 0.0), (1, 0.05), (-1, 0.05), (-1, -0.1), (1, -0.15)])
def test_a_factor_is_fair_at_its_bound_and_less_below_it(
    share: float, centre: float, direction: int, bound: float
) -> None:
    old = 0.4
    assert expected_factor(share, centre, old, direction * bound, direction, bound) == pytest.approx(1, abs=1e-12)
    below, above = direction * (bound - 0.1), direction * (bound + 0.1)
    assert expected_factor(share, centre, old, below, direction, bound) < 1
    assert expected_factor(share, centre, old, above, direction, bound) > 1


def test_no_bet_loses_everything_and_nothing_is_bet_on_what_was_not_measured() -> None:
    rng = np.random.default_rng(0)
    values = rng.choice([0.0, 1.0, np.nan], (500, 3))
    logs = log_factors(
        values, rng.random(500) < 0.5, rng.uniform(0.01, 0.99, 500), rng.uniform(0.01, 0.99, (500, 3)),
        np.array([1, -1, 1]), np.array([0.05, 0.0, -0.2]),
    )  # fmt: skip
    assert logs.min() >= math.log(1 - FRACTIONS[-1]) - 1e-9
    assert (logs[np.isnan(values)] == 0).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_difference_that_cannot_be_is_excluded_at_no_risk(share: float, value: float, is_new: bool) -> None:
    """What the gate measured may allow any call rate: "a rise beyond 1.1" is then to be excluded."""
    arguments = np.array([[value]]), np.array([is_new]), np.array([share]), np.array([[0.5]])
    logs = log_factors(*arguments, np.array([-1.0]), np.array([-1.1]))
    assert np.isfinite(logs).all()
    if share == 0.5:
        assert (logs > 0).all()


def test_logs_of_means_do_not_overflow() -> None:
    assert log_mean_exp(np.array([1000.0, 1000.0])) == 1000.0
    assert log_mean_exp(np.array([0.0, -5000.0])) == pytest.approx(-math.log(2))
    assert log_sum_exp(np.log([0.25, 0.5])) == pytest.approx(math.log(0.75))


def test_ranks_rise_with_the_latency_and_are_uniform_among_their_like() -> None:
    histogram = np.zeros((1, NUM_BINS))
    assert ranks(histogram, np.array([[0.001, 5.0]])).tolist() == [[0.5, 0.5]]  # nothing known yet
    rng = np.random.default_rng(1)
    np.add.at(histogram[0], bins_of(rng.lognormal(0, 0.5, 20_000)), 1)
    seconds = np.geomspace(LOWEST_SECONDS / 10, HIGHEST_SECONDS * 10, 300)[None]
    rank = ranks(histogram, seconds)[0]
    assert (np.diff(rank) >= 0).all()
    assert 0 < rank[0] < rank[-1] < 1
    typical = ranks(histogram, rng.lognormal(0, 0.5, (1, 2000)))[0]
    assert typical.mean() == pytest.approx(0.5, abs=0.02)
    assert np.isnan(ranks(histogram, np.array([[np.nan]]))[0, 0])


def simulate(
    processes: Processes,
    num_episodes: int,
    *,
    share: float = 0.9,
    harm: dict[Metric, float] | None = None,
    only_stratum: int | None = None,
    drift: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(ever over 1/1 % for harm, ever all safe at 5 %) of N watches; harm is added to the new version's means."""
    rng = np.random.default_rng(seed)
    means = {Metric.CALL_RATE: 0.6, Metric.TOOL_ERRORS: 0.05, Metric.RETRIES: 0.05, Metric.FEEDBACK: 0.7}
    means[Metric.MALFORMED] = 0.05
    num = len(processes.pooled)
    has_harm, is_safe = np.zeros(num, bool), np.zeros(num, bool)
    for step in range(num_episodes):
        is_new, strata = rng.random(num) < share, rng.integers(3, size=num)
        is_hit = is_new if only_stratum is None else is_new & (strata == only_stratum)
        moved = drift * math.sin(step / 50)
        values = np.full((num, len(Metric)), np.nan)
        for metric, mean in means.items():
            changed = np.clip(mean + moved + (harm or {}).get(metric, 0.0) * is_hit, 0, 1)
            values[:, metric] = rng.random(num) < changed
        slower = 1 + (harm or {}).get(Metric.LATENCY, 0.0) * is_hit
        values[:, Metric.LATENCY] = rng.lognormal(3 * moved, 0.5, num) * slower
        processes.update(values, is_new, np.full(num, share), strata)
        has_harm |= processes.log_harm >= math.log(100)
        is_safe |= (processes.best_safety >= math.log(20)).all(axis=1)
    return has_harm, is_safe


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_equal_versions_stay_though_everything_drifts(drift: float) -> None:
    has_harm, _ = simulate(Processes(NO_TOLERANCE, 200), 600, drift=drift, seed=3)
    assert has_harm.sum() <= 6  # 1 % of 200 is 2, and under 1 in 100 runs it is more than 6


@pytest.mark.parametrize(
    ("metric", "change"),
    [
        (Metric.CALL_RATE, 0.38),
        (Metric.CALL_RATE, -0.5),
        (Metric.TOOL_ERRORS, 0.4),
        (Metric.RETRIES, 0.4),
        (Metric.FEEDBACK, -0.6),
        (Metric.MALFORMED, 0.4),
        (Metric.LATENCY, 3.0),
    ],
)
@pytest.mark.parametrize("share", [0.9, 0.2])
def test_harm_of_every_kind_is_found(metric: Metric, change: float, share: float) -> None:
    has_harm, is_safe = simulate(Processes(WatchSettings(), 20), 600, share=share, harm={metric: change})
    assert has_harm.mean() >= 0.9
    if metric is not Metric.FEEDBACK:  # which no canary has to show
        assert not is_safe.any()


def test_improvement_is_no_harm() -> None:
    better = {Metric.TOOL_ERRORS: -0.05, Metric.RETRIES: -0.05, Metric.FEEDBACK: 0.3, Metric.MALFORMED: -0.05}
    has_harm, is_safe = simulate(Processes(WatchSettings(), 60), 700, share=0.5, harm={**better, Metric.LATENCY: -0.5})
    assert not has_harm.any()
    assert is_safe.mean() > 0.5


def test_harm_to_one_tool_is_found_by_its_stratum() -> None:
    processes = Processes(WatchSettings(), 20)
    has_harm, _ = simulate(processes, 800, share=0.5, harm={Metric.CALL_RATE: -0.6}, only_stratum=1)
    assert has_harm.mean() >= 0.9
    evidence = log_mean_exp(processes.by_stratum)[:, :, 1].mean(axis=0)  # fall of the call rate
    assert evidence.argmax() == 1
    assert (evidence[3:MAX_STRATA] == 0).all()


def test_the_weights_are_the_budget() -> None:
    settings = WatchSettings()
    assert sum(test.weight for test in harm_tests(settings)) == pytest.approx(1)
    assert {test.metric for test in harm_tests(settings)} == set(Metric)
    assert {test.metric for test in safety_tests(settings)} == set(Metric) - {Metric.FEEDBACK}
    assert Processes(settings).log_harm[0] == pytest.approx(0)  # e-value 1: no evidence yet


def test_what_the_gate_measured_is_allowed_for() -> None:
    decision = gate(pairs_table((60, 30, 0, 10), (45, 0, 5, 0)), has_live=False)
    assert decision.outcome is Outcome.PROMOTE
    settings = settings_after(decision)
    # No call made more (the wrong answers of these tables are calls), and 10 points of no-calls lost.
    assert settings.call_rate_change == pytest.approx((-0.05, 0.15))
    assert settings.tool_errors == pytest.approx(0.01 + 0.2 * 0.1)
    assert settings.malformed == pytest.approx(0.01 + 0.1 * 0.1)
    assert settings.latency_ratio == pytest.approx(2.0)
    assert settings_after(gate(pairs_table((60, 30, 0, 10), (45, 0, 0, 0)))).latency_ratio == 1.25
