"""The gate's tests on paired answers; the unit is the episode cluster.

Balanced accuracy is the mean of two strata, so a trace counts 1/(2 x traces of its stratum). A cluster's difference is
the weighted sum over its traces (candidate right minus opponent right). The primary test is McNemar's with these
weights: given how much each discordant cluster differs, its sign is a fair coin if the versions are exchangeable, and
p is the exact chance that the signed sum is as large as observed. With one trace a cluster and one stratum it is
McNemar's exact one-sided p to the last digit. Beside it the lower bound of the difference must lie above 0 at the same
level: signs are fair coins for equal versions, not for one that trades rare no-calls for calls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.gate.intervals import fair_coin, normal_quantile
from finetune.gate.results import PairedTrace

MAX_WEIGHT = 1000
"""Of the two strata's whole-number weights. Any fixed weights keep the level; three digits keep the exact distribution
small. The difference that is reported uses the exact ones. Why weights at all: unweighted, 45 calls won against 20
no-calls lost is p = 0.001, though with 900 calls and 100 no-calls balanced accuracy fell by 7.5 points."""

UNSEEN_TRACES = 2
"""Discordant traces that every stratum is taken to have beside those seen, in the bounds (Agresti and Min 2005: one).
Without, with 475 calls and 25 no-calls, a version that wins 5 % of the calls and loses 5 % of the no-calls passes at
1.5 % in 28 % of gates; with one the worst such trade passes in 5 %, with two in 1.9 % (benchmarks/gate_errors.py)."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """N traces as arrays; differences are candidate minus opponent."""

    clusters: np.ndarray
    """int [N]: 0..number of clusters - 1."""
    expects_call: np.ndarray
    """bool [N]"""
    right: np.ndarray
    """int [N]: -1, 0 or 1."""
    loss: np.ndarray
    """float [N]: opponent's token loss minus the candidate's (more is better); NaN where there is none."""

    @property
    def num_clusters(self) -> int:
        return int(self.clusters.max()) + 1 if len(self.clusters) else 0

    def num_clusters_of(self, *, expects_call: bool) -> int:
        return len(np.unique(self.clusters[self.expects_call == expects_call]))


def pairs_of(traces: Sequence[PairedTrace]) -> Pairs:
    _, clusters = np.unique([trace.cluster for trace in traces], return_inverse=True)
    losses = [
        np.nan
        if trace.candidate.token_loss is None or trace.opponent.token_loss is None
        else trace.opponent.token_loss - trace.candidate.token_loss
        for trace in traces
    ]
    return Pairs(
        clusters.astype(np.int64),
        np.array([trace.expects_call for trace in traces], bool),
        np.array([int(trace.candidate.is_right) - int(trace.opponent.is_right) for trace in traces], np.int64),
        np.array(losses, float),
    )


@dataclass(frozen=True, slots=True)
class PrimaryTest:
    difference: float
    """Of balanced accuracy, in shares of 1."""
    p_value: float
    num_better: int
    """Clusters in which the candidate is better, and worse, after weighing."""
    num_worse: int
    weights: tuple[int, int]
    """Of a trace that expects a call, and of one that expects none, in the test."""
    mcnemar_p_value: float
    """The same without weights, for comparison; decides nothing."""
    level: float
    lower: float
    """Bound of the difference at `level`."""
    is_passed: bool


def balanced_weights(expects_call: np.ndarray) -> np.ndarray:
    """float [N], summing to 1: each stratum's traces share one half (or all, where the other is empty)."""
    num_call = int(expects_call.sum())
    num_none = len(expects_call) - num_call
    share = 0.5 if num_call and num_none else 1.0
    return np.where(expects_call, share / max(num_call, 1), share / max(num_none, 1))


def primary_test(pairs: Pairs, level: float) -> PrimaryTest:
    num_call = int(pairs.expects_call.sum())
    weights = whole_weights(num_call, len(pairs.expects_call) - num_call)
    of_trace = np.where(pairs.expects_call, *weights)
    of_cluster = np.bincount(pairs.clusters, of_trace * pairs.right, pairs.num_clusters).round().astype(np.int64)
    num_better, num_worse = int((of_cluster > 0).sum()), int((of_cluster < 0).sum())
    exact = balanced_weights(pairs.expects_call)
    difference = float(exact @ pairs.right)
    p_value = sign_flip_p(of_cluster)
    lower = difference - half_width(exact, pairs.clusters, pairs.right, pairs.expects_call, 1 - level)
    is_passed = p_value <= level and lower > 0
    return PrimaryTest(
        difference,
        p_value,
        num_better,
        num_worse,
        weights,
        mcnemar_p(num_better, num_worse),
        level,
        lower,
        is_passed,
    )


def whole_weights(num_call: int, num_none: int) -> tuple[int, int]:
    """In the ratio 1/num_call : 1/num_none, at most MAX_WEIGHT."""
    if not num_call or not num_none:
        return 1, 1
    call, none = num_none // math.gcd(num_call, num_none), num_call // math.gcd(num_call, num_none)
    largest = max(call, none)
    if largest <= MAX_WEIGHT:
        return call, none
    return max(1, round(call * MAX_WEIGHT / largest)), max(1, round(none * MAX_WEIGHT / largest))


def mcnemar_p(num_better: int, num_worse: int) -> float:
    """Exact one-sided: the chance of this many heads or more among all discordant pairs."""
    return float(fair_coin(num_better + num_worse)[1][num_better])


def sign_flip_p(differences: np.ndarray) -> float:
    """P(sum of +-|d| >= sum of d) for independent fair signs, exactly. `differences`: whole numbers.

    The sum is as large as observed when the sizes that come up positive add up to those that did. Sizes are few (one a
    stratum, and a few for clusters with several traces): one binomial each, folded, the most frequent one last.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    needed = int(differences[differences > 0].sum())
    if not len(sizes):
        return 1.0
    last = int(counts.argmax())
    sums = np.ones(1)  # sums[v]: chance that the sizes folded so far come to v
    for index in np.argsort(-counts):
        if index != last:
            sums = _fold(sums, int(sizes[index]), int(counts[index]))
    values = np.flatnonzero(sums)
    heads = np.maximum(-((values - needed) // int(sizes[last])), 0)  # needed of the last size: rounded up
    tails = np.append(fair_coin(int(counts[last]))[1], 0.0)
    return min(1.0, float(sums[values] @ tails[np.minimum(heads, len(tails) - 1)]))


def _fold(sums: np.ndarray, size: int, count: int) -> np.ndarray:
    """The distribution after `count` more signs of `size` each."""
    folded = np.zeros(len(sums) + size * count)
    for heads, chance in enumerate(fair_coin(count)[0]):
        folded[heads * size : heads * size + len(sums)] += chance * sums
    return folded


def half_width(
    weights: np.ndarray, clusters: np.ndarray, difference: np.ndarray, strata: np.ndarray, level: float
) -> float:
    """From a weighted mean of paired differences (weights sum to 1) to its one-sided bound at `level`.

    Between clusters, as a ratio (residuals from the mean), with UNSEEN_TRACES more in every stratum: else no discordant
    trace at all would be taken for certainty. `strata`: bool [N].
    """
    num_clusters = int(clusters.max()) + 1
    residuals = np.bincount(clusters, weights * (difference - weights @ difference), num_clusters)
    between = float((residuals**2).sum()) * num_clusters / max(num_clusters - 1, 1)
    unseen = sum(float(weights[strata == stratum].max(initial=0.0)) ** 2 for stratum in (True, False))
    return normal_quantile(level) * math.sqrt(between + UNSEEN_TRACES * unseen)
