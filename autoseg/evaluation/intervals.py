"""How sure a mean over cases is, and how far values spread."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

N_RESAMPLES = 2000
CONFIDENCE = 0.95
PIECE_VALUES = 2**20
MIN_CASES = 5
"""With fewer, nothing is decided by an interval."""


def bootstrap_interval(values: NDArray[np.float64], *, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean: percentiles of means over cases drawn with replacement, Efron 1979.

    With a handful of cases it is too narrow, as all that is known of the others comes from these.

    Args:
        values: (n,), finite: one per case, or one difference per case for an interval of paired differences.
        seed: of the draws.

    Returns:
        Lower and upper end: NaN without values, both the value itself where there is one.
    """
    n = len(values)
    if not n:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    # In pieces, so that thousands of cases take no more memory than a hundred.
    n_at_once = max(1, PIECE_VALUES // n)
    sizes = [min(n_at_once, N_RESAMPLES - start) for start in range(0, N_RESAMPLES, n_at_once)]
    means = np.concatenate([values[rng.integers(n, size=(size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def robust_deviation(differences: NDArray[np.float64]) -> float:
    """The standard deviation that few outliers do not move: 1.4826 times the median of the absolute differences.

    Args:
        differences: (n,) from a centre, at least one.
    """
    return 1.4826 * float(np.median(np.abs(differences)))
