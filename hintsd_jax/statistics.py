# SPDX-License-Identifier: Apache-2.0

"""Intervals: one value for each task or episode in, the two ends of a percentile bootstrap interval out.

A resample draws as many tasks (or episodes) as there are, with replacement. The seed is fixed: the same values always
have the same interval.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

RESAMPLES = 10_000
_AT_ONCE = 500  # resamples that are in memory together


def interval(values_N: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean. For a paired difference give the differences.

    Args:
      values_N: one number for each task, N >= 1. One alone, or N equal ones, give that number twice.
      level: share of the resamples whose mean lies inside.

    Raises:
      ValueError: there are no values.
    """
    values_N = np.asarray(values_N, float)
    if not len(values_N):
        raise ValueError("no values: an interval needs at least one")
    if np.ptp(values_N) == 0:
        return float(values_N[0]), float(values_N[0])
    result = bootstrap((values_N,), np.mean, confidence_level=level, **_options())
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def ratio_interval(
    parts_N: Sequence[float] | np.ndarray, wholes_N: Sequence[float] | np.ndarray, level: float = 0.95
) -> tuple[float, float]:
    """The interval of sum(parts) / sum(wholes), both of the same N episodes, such as right steps and named steps.
    Resamples whose wholes are all 0 are left out.

    Raises:
      ValueError: the wholes sum to 0.
    """
    parts_N, wholes_N = np.asarray(parts_N, float), np.asarray(wholes_N, float)
    if not wholes_N.sum():
        raise ValueError("the wholes sum to 0: there is no ratio")
    if len(parts_N) == 1:
        return float(parts_N[0] / wholes_N[0]), float(parts_N[0] / wholes_N[0])

    def ratio(parts: np.ndarray, wholes: np.ndarray, axis: int = -1) -> np.ndarray:
        counted = wholes.sum(axis)
        return np.divide(parts.sum(axis), counted, out=np.full(np.shape(counted), np.nan), where=counted != 0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of resamples without a whole: left out below
        result = bootstrap((parts_N, wholes_N), ratio, paired=True, confidence_level=level, **_options())
    low, high = np.nanquantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _options() -> dict:
    generator = np.random.default_rng(0)
    return {"n_resamples": RESAMPLES, "batch": _AT_ONCE, "method": "percentile", "vectorized": True, "rng": generator}
