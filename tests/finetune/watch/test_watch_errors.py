"""A small run of benchmarks/watch_errors.py: false alarms under continuous looks, and how soon harm is found."""

import numpy as np
import pytest

from benchmarks.watch_errors import NEVER, STRICT, Traffic, at_the_tolerance, margins, percent, quantiles, watch
from finetune.watch.processes import Metric


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_harmless_versions_stay(share: float) -> None:
    assert percent(watch(Traffic(share, settings=STRICT), 300, 2000, 1)[0]) <= 2.4  # 7 of 300; 1 % allows 3 on average


def test_what_is_tolerated_is_no_harm() -> None:
    assert percent(watch(Traffic(0.5, at_the_tolerance()), 60, 500, 1)[0]) <= 5


def test_larger_harm_is_found_sooner() -> None:
    some, much = (watch(Traffic(0.9, {Metric.LATENCY: x}), 20, 1500, 1)[0] for x in (2.0, 6.0))
    assert percent(much) == 100
    assert quantiles(much)[0] < quantiles(some)[0]  # type: ignore[operator]


def test_a_harmless_canary_is_promoted_and_a_harmful_one_is_not() -> None:
    assert percent(watch(Traffic(0.5), 10, 1500, 1, is_canary=True)[1]) >= 80
    assert percent(watch(Traffic(0.5, margins()["latency"]), 40, 700, 1)[1]) <= 12


def test_quantiles_say_when_it_did_not_come() -> None:
    assert quantiles(np.array([10, 20, 30, NEVER])) == [20, None]
    assert quantiles(np.arange(1, 11)) == [5, 9]
