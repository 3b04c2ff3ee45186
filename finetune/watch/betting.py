"""E-processes by betting on which version an episode was drawn to, given how it went.

An episode goes to the new version by a hash draw of known chance s. Let A be 1 if it did, x in [0, 1] what was
measured, D the difference that the new version makes to the mean of x. Then E[(x - c)(A - s)] = s (1 - s) D for every
centre c chosen beforehand, whatever else changes over time. So for H0: direction x D <= bound,
    wealth x (1 + fraction x (direction (x - c)(A - s) - s (1 - s) bound) / largest loss)
never grows in expectation, and by Ville's inequality exceeds 1/alpha ever with chance alpha at most. The wealth is the
mean over a grid of fractions, which costs log 7 and needs no tuning. Sources: Waudby-Smith and Ramdas 2024 (betting),
Ramdas et al. 2023 (e-processes). Arrays throughout, so that simulations run many watches at once.
"""

import numpy as np

FRACTIONS = np.array([0.01, 0.03, 0.08, 0.2, 0.4, 0.65, 0.9])
"""Of the largest bet that cannot lose everything: from effects of a hundredth to those seen in a few episodes."""


NO_LOSS = 1e-3
"""The least that a bet is scaled by."""


def log_factors(
    values: np.ndarray,
    is_new: np.ndarray,
    share_new: np.ndarray,
    centres: np.ndarray,
    directions: np.ndarray,
    bounds: np.ndarray,
) -> np.ndarray:
    """Log factors [N, P, fractions] of P tests in N watches.

    `values` [N, P] in [0, 1], NaN: not measured, nothing is bet; `is_new` and `share_new` [N]; `centres` [N, P] in
    (0, 1); `directions` (1 or -1) and `bounds` [P].
    """
    share = share_new[:, None]
    drift = share * (1 - share) * bounds
    gain = directions * (values - centres) * (is_new[:, None] - share) - drift
    losses = [directions * (end - centres) * (arm - share) - drift for end in (0.0, 1.0) for arm in (0.0, 1.0)]
    # Of a bound that no two means can differ by (1.1 for shares), no outcome may be a loss: then nothing is risked.
    largest_loss = np.maximum(-np.minimum.reduce(losses), NO_LOSS)
    factors = np.log1p(FRACTIONS * (gain / largest_loss)[:, :, None])
    return np.where(np.isnan(values)[:, :, None], 0.0, factors)


def log_mean_exp(logs: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    peak = logs.max(axis=-1, keepdims=True)
    return np.log(np.exp(logs - peak).mean(axis=-1)) + peak[..., 0]


def log_sum_exp(logs: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return log_mean_exp(logs) + np.log(logs.shape[-1])
