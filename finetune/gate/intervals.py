"""Tails and intervals: the fair coin's exact distribution, Wilson's interval for shares of clustered traces.

Several traces of a cluster tell less than as many of different ones. A share's interval is therefore Wilson's for the
effective number of traces: traces divided by the design effect, the ratio of the variance between clusters to the one
that independent traces would have (at least 1). Binomial tails come from integers: exact, and no SciPy.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

Z95 = NormalDist().inv_cdf(0.975)


def normal_quantile(level: float) -> float:
    return NormalDist().inv_cdf(level)


@lru_cache(maxsize=4096)
def fair_coin(num_tosses: int) -> tuple[np.ndarray, np.ndarray]:
    """(P(heads = k), P(heads >= k)) for k = 0..num_tosses, each correctly rounded from integers."""
    ways = [math.comb(num_tosses, k) for k in range(num_tosses + 1)]
    total = 1 << num_tosses
    tails, so_far = [0.0] * (num_tosses + 1), 0
    for k in range(num_tosses, -1, -1):
        so_far += ways[k]
        tails[k] = so_far / total
    return np.array([way / total for way in ways]), np.array(tails)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share or mean of traces with its 95 % interval; None where there is no trace (or, of a mean, one cluster)."""

    value: float | None
    lower: float | None
    upper: float | None
    num_traces: int
    num_clusters: int


NOTHING = Estimate(None, None, None, 0, 0)


def wilson(share: float, num_effective: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval; `num_effective` need not be whole."""
    scale = 1 + z * z / num_effective
    centre = (share + z * z / (2 * num_effective)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_effective + z * z / (4 * num_effective**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def share_of(is_right: np.ndarray, clusters: np.ndarray) -> Estimate:
    """`is_right` bool [N], `clusters` int [N]: numbers of the clusters, not necessarily without gaps."""
    if not len(is_right):
        return NOTHING
    numbers = np.unique(clusters, return_inverse=True)[1]
    num_clusters = int(numbers.max()) + 1
    share = float(is_right.mean())
    effect = _design_effect(is_right, numbers, num_clusters, share)
    return Estimate(share, *wilson(share, len(is_right) / effect), len(is_right), num_clusters)


def mean_of(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """With the normal interval between clusters."""
    if not len(values):
        return NOTHING
    numbers = np.unique(clusters, return_inverse=True)[1]
    num_clusters = int(numbers.max()) + 1
    mean = float(values.mean())
    if num_clusters == 1:
        return Estimate(mean, None, None, len(values), 1)
    sums = np.bincount(numbers, values - mean)
    half = Z95 * math.sqrt(float((sums**2).sum()) * num_clusters / (num_clusters - 1)) / len(values)
    return Estimate(mean, mean - half, mean + half, len(values), num_clusters)


def balanced(call: Estimate, none: Estimate) -> Estimate:
    """The mean of two shares; its interval from theirs (Newcombe's MOVER)."""
    sides = [(e.value, e.lower, e.upper) for e in (call, none)]
    if any(value is None or lower is None or upper is None for value, lower, upper in sides):
        return Estimate(None, None, None, call.num_traces + none.num_traces, call.num_clusters + none.num_clusters)
    values, lowers, uppers = np.array(sides, float).T
    mean = float(values.mean())
    below, above = (float(np.hypot(*(values - bounds))) / 2 for bounds in (lowers, uppers))
    num_traces, num_clusters = call.num_traces + none.num_traces, call.num_clusters + none.num_clusters
    return Estimate(mean, max(0.0, mean - below), min(1.0, mean + above), num_traces, num_clusters)


def _design_effect(is_right: np.ndarray, numbers: np.ndarray, num_clusters: int, share: float) -> float:
    sizes = np.bincount(numbers)
    if num_clusters == len(is_right):
        return 1.0
    largest = float((sizes**2).sum() / sizes.sum())  # when the traces of each cluster are all alike
    if share in (0.0, 1.0) or num_clusters < 2:
        return largest  # nothing varies, so nothing can be estimated
    residuals = np.bincount(numbers, is_right - share)
    between = float((residuals**2).sum()) * num_clusters / (num_clusters - 1)
    return min(max(1.0, between / (len(is_right) * share * (1 - share))), largest)
