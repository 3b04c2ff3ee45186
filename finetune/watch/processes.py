"""All tests of a version at once: harm for every metric, pooled and by stratum, and for a canary the absence of it.

A metric's harm evidence is half the pooled process (episodes of all strata, each centred on its own stratum's mean) and
half the mean over strata of their own processes, so that harm to one tool is seen too. Metrics are averaged with equal
weights, both directions of the call rate halving theirs: one e-process for "harm anywhere", tested against
1 / false_rollback. "No harm" has a pooled process for every bound; all must have exceeded 1 / false_promotion.
Not here: names, verdicts and storage (watch.py). State arrays have N rows, one a watch.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from finetune.watch.betting import FRACTIONS, log_factors, log_mean_exp, log_sum_exp
from finetune.watch.ranks import NUM_BINS, bins_of, ranks
from finetune.watch.settings import WatchSettings

MAX_STRATA = 16
"""With processes of their own; the rest count in the pooled ones. Each has 1/16 of the half, used or not."""


class Metric(IntEnum):
    """Column of the values. All but the latency lie in [0, 1]."""

    CALL_RATE = 0
    TOOL_ERRORS = 1
    RETRIES = 2
    FEEDBACK = 3
    MALFORMED = 4
    LATENCY = 5


CENTRE_PRIORS = np.array([0.5, 0.05, 0.05, 0.5, 0.05, 0.5])
"""A guess of each metric's mean, worth two episodes: the centre of the first bets."""


@dataclass(frozen=True, slots=True)
class NullHypothesis:
    metric: Metric
    direction: int
    """H0: direction x (new minus old) <= bound."""
    bound: float
    weight: float = 0.0
    """Of the budget; of harm tests only."""
    latency_ratio: float = 1.0
    """The new version's latencies are divided by it."""


def harm_tests(settings: WatchSettings) -> list[NullHypothesis]:
    low, high = settings.call_rate_change
    one = 1 / len(Metric)
    return [
        NullHypothesis(Metric.CALL_RATE, 1, high, one / 2),
        NullHypothesis(Metric.CALL_RATE, -1, -low, one / 2),
        NullHypothesis(Metric.TOOL_ERRORS, 1, settings.tool_errors, one),
        NullHypothesis(Metric.RETRIES, 1, settings.retries, one),
        NullHypothesis(Metric.FEEDBACK, -1, settings.feedback, one),
        NullHypothesis(Metric.MALFORMED, 1, settings.malformed, one),
        NullHypothesis(Metric.LATENCY, 1, 0.0, one, settings.latency_ratio),
    ]


def safety_tests(settings: WatchSettings) -> list[NullHypothesis]:
    """H0: harm beyond the margin. Feedback is left out: nobody owes it; its harm test goes on."""
    low, high = settings.call_rate_change
    return [
        NullHypothesis(Metric.CALL_RATE, -1, -(high + settings.margin_call_rate)),
        NullHypothesis(Metric.CALL_RATE, 1, low - settings.margin_call_rate),
        NullHypothesis(Metric.TOOL_ERRORS, -1, -(settings.tool_errors + settings.margin_tool_errors)),
        NullHypothesis(Metric.RETRIES, -1, -(settings.retries + settings.margin_retries)),
        NullHypothesis(Metric.MALFORMED, -1, -(settings.malformed + settings.margin_malformed)),
        NullHypothesis(Metric.LATENCY, -1, 0.0, latency_ratio=settings.latency_ratio * settings.margin_latency_ratio),
    ]


class Processes:
    """`update` after every episode, then read `log_harm` and `log_safety`."""

    def __init__(self, settings: WatchSettings, num_watches: int = 1) -> None:
        harm, safety = harm_tests(settings), safety_tests(settings)
        tests = [*harm, *safety]
        self._num_harm = len(harm)
        self._metrics = np.array([test.metric for test in tests])
        self._directions = np.array([test.direction for test in tests], float)
        self._bounds = np.array([test.bound for test in tests])
        self._ratios = np.array([test.latency_ratio for test in tests])
        self._is_latency = self._metrics == Metric.LATENCY
        self._log_weights = np.log([test.weight for test in harm])
        n, s, m = num_watches, MAX_STRATA + 1, len(Metric)
        self.pooled = np.zeros((n, len(tests), len(FRACTIONS)))
        self.by_stratum = np.zeros((n, s, len(harm), len(FRACTIONS)))
        self.sums = np.zeros((n, s, m))
        self.counts = np.zeros((n, s, m))
        self.histograms = np.zeros((n, s, NUM_BINS))
        self.best_safety = np.zeros((n, len(safety)))
        """Highest so far: what was shown once stays shown."""
        self._stratum_logs = np.zeros((n, s, len(harm)))

    def update(self, values: np.ndarray, is_new: np.ndarray, share_new: np.ndarray, strata: np.ndarray) -> None:
        """`values` [N, metrics], NaN: not measured. `strata` [N]: 0..MAX_STRATA, the last for all that came later."""
        rows = np.arange(len(values))
        histograms = self.histograms[rows, strata]
        latencies = values[:, Metric.LATENCY]
        ratios = np.where(is_new[:, None], self._ratios[self._is_latency], 1.0)
        measured = values[:, self._metrics]
        measured[:, self._is_latency] = ranks(histograms, latencies[:, None] / ratios)
        centres = (self.sums[rows, strata] + 2 * CENTRE_PRIORS) / (self.counts[rows, strata] + 2)
        centres = centres[:, self._metrics]
        factors = log_factors(measured, is_new, share_new, centres, self._directions, self._bounds)
        self.pooled += factors
        self.by_stratum[rows, strata] += factors[:, : self._num_harm]
        self._stratum_logs[rows, strata] = log_mean_exp(self.by_stratum[rows, strata])
        safety = log_mean_exp(self.pooled[:, self._num_harm :])
        self.best_safety = np.maximum(self.best_safety, safety)
        self._learn(values, histograms, rows, strata)

    def _learn(self, values: np.ndarray, histograms: np.ndarray, rows: np.ndarray, strata: np.ndarray) -> None:
        """After the bets: the centres and histograms of the next ones."""
        latencies = values[:, Metric.LATENCY]
        bounded = values.copy()
        bounded[:, Metric.LATENCY] = ranks(histograms, latencies[:, None])[:, 0]
        self.sums[rows, strata] += np.nan_to_num(bounded)
        self.counts[rows, strata] += ~np.isnan(bounded)
        self.histograms[rows, strata, bins_of(latencies)] += ~np.isnan(latencies)

    @property
    def log_by_test(self) -> np.ndarray:
        """Harm evidence [N, tests] of each metric and direction, pooled and by stratum together."""
        pooled = log_mean_exp(self.pooled[:, : self._num_harm])
        of_strata = log_mean_exp(self._stratum_logs[:, :MAX_STRATA].transpose(0, 2, 1))
        return log_mean_exp(np.stack([pooled, of_strata], axis=-1))

    @property
    def log_harm(self) -> np.ndarray:
        """Log of the one e-process [N]: compare with log(1 / false_rollback)."""
        return log_sum_exp(self.log_by_test + self._log_weights)

    def state(self) -> dict[str, list]:
        return {name: getattr(self, name).tolist() for name in _STATE}

    def restore(self, state: dict[str, list]) -> None:
        """Raises ValueError where the arrays have other shapes."""
        for name in _STATE:
            array, old = np.array(state[name], float), getattr(self, name)
            if array.shape != old.shape:
                raise ValueError(f"'{name}' has the shape {array.shape}, not {old.shape}")
            setattr(self, name, array)
        self._stratum_logs = log_mean_exp(self.by_stratum)


_STATE = ("pooled", "by_stratum", "sums", "counts", "histograms", "best_safety")
