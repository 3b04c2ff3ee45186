"""Latencies as ranks among those seen before: bounded, and one slow outlier weighs no more than any slow episode.

The past is a histogram of logarithmic bins, one for each stratum. Comparing a latency divided by 1.25 tests whether the
new version is more than a quarter slower: a tolerance is a ratio, as operators think of it.
"""

import numpy as np

LOWEST_SECONDS, HIGHEST_SECONDS = 1e-4, 1e4
NUM_BINS = 128
"""A bin is a factor of 1.155: finer than any tolerance that one would set."""
PRIOR = 2.0
"""Episodes of middle rank that the first ones are compared with."""


def bins_of(seconds: np.ndarray) -> np.ndarray:
    """Bins, any shape; NaN goes to bin 0, the caller masks it."""
    clipped = np.clip(np.nan_to_num(seconds, nan=LOWEST_SECONDS), LOWEST_SECONDS, HIGHEST_SECONDS)
    place = np.log(clipped / LOWEST_SECONDS) / np.log(HIGHEST_SECONDS / LOWEST_SECONDS)
    return np.minimum((place * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def ranks(histograms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Rank in (0, 1) of `seconds` [N, K] in `histograms` [N, bins]: the share below and half of those in its bin.

    Never falls as seconds rise, so what is slower at every quantile has the higher mean rank. NaN stays NaN.
    """
    bins = bins_of(seconds)
    rows = np.arange(len(bins))[:, None]
    up_to = histograms.cumsum(axis=1)
    middle = up_to[rows, bins] - histograms[rows, bins] / 2
    rank = (middle + PRIOR / 2) / (up_to[:, -1:] + PRIOR)
    return np.where(np.isnan(seconds), np.nan, rank)
