"""The cluster bootstrap of a mean improvement: one-sided p, studentized, and only as many resamples as it takes.

Clusters are drawn with replacement; each resample's mean is divided by its own standard error (bootstrap-t), because
the percentile bootstrap of skewed losses is too bold at small levels. Resampling stops once 20 resamples were as
extreme as the data (Besag and Clifford 1991: p = 20 / resamples so far, a valid p-value), so that a clear "no" is
cheap. The draw is seeded: equal data give an equal p.
"""

import math
from dataclasses import dataclass

import numpy as np

MAX_RESAMPLES = 1_000_000
"""A few seconds with some hundred clusters. Fewer would do for larger levels, see `resamples_for`."""
ENOUGH_EXTREME = 20
CHUNK_DRAWS = 1_000_000
"""Drawn indices at a time: 8 MB."""


def resamples_for(level: float) -> int:
    """Enough for 20 extreme ones at that level: p is then within about a quarter of its limit."""
    return min(MAX_RESAMPLES, max(2000, math.ceil(ENOUGH_EXTREME / level)))


@dataclass(frozen=True, slots=True)
class BootstrapTest:
    mean: float
    standard_error: float
    p_value: float
    num_resamples: int


def bootstrap_improvement(
    values: np.ndarray, weights: np.ndarray, clusters: np.ndarray, *, max_resamples: int = MAX_RESAMPLES, seed: int = 0
) -> BootstrapTest:
    """H0: the weighted mean of `values` [N] is not above zero. `weights` sum to 1; `clusters`: 0..C-1."""
    num_clusters = int(clusters.max()) + 1
    mean = float(weights @ values)
    residuals = np.bincount(clusters, weights * (values - mean), num_clusters)
    error = _standard_error((residuals**2).sum(), residuals.sum(), num_clusters)
    if mean <= 0 or error <= 1e-9 * mean:  # the same difference in every cluster is rounding or a fault, no sample
        return BootstrapTest(mean, float(error), 1.0, 0)
    observed = mean / error
    rng = np.random.default_rng(seed)
    num_done = num_extreme = 0
    chunk = min(1000, max(1, CHUNK_DRAWS // num_clusters))  # small at first: most tests end there
    while num_done < max_resamples:
        chunk = min(chunk, max_resamples - num_done)
        drawn = residuals[rng.integers(num_clusters, size=(chunk, num_clusters))]
        sums = drawn.sum(axis=1)
        errors = _standard_error((drawn**2).sum(axis=1), sums, num_clusters)
        extreme = np.flatnonzero(sums >= observed * errors)
        if num_extreme + len(extreme) >= ENOUGH_EXTREME:
            num_done += int(extreme[ENOUGH_EXTREME - num_extreme - 1]) + 1
            return BootstrapTest(mean, float(error), ENOUGH_EXTREME / num_done, num_done)
        num_done, num_extreme = num_done + chunk, num_extreme + len(extreme)
        chunk = max(1, CHUNK_DRAWS // num_clusters)
    return BootstrapTest(mean, float(error), (num_extreme + 1) / (num_done + 1), num_done)


def _standard_error(squares: np.ndarray, sums: np.ndarray, num_clusters: int) -> np.ndarray:
    """Of a sum of independent terms, from the sums of their squares and of themselves."""
    spread = np.maximum(squares - sums**2 / num_clusters, 0.0)
    return np.sqrt(spread * num_clusters / max(num_clusters - 1, 1))
