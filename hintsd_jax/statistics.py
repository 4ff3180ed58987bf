# SPDX-License-Identifier: Apache-2.0

"""Intervals: one value for each task or episode in, or one for each seed and task; the two ends of a bootstrap interval
out.

R resamples, S seeds, N tasks. A resample draws as many tasks (or episodes) as there are, with replacement;
`crossed_interval` draws seeds, too. The random numbers are fixed: the same values always have the same interval. Values
that are all the same have no spread to resample, and are no proof of certainty: their interval is exact
(`without_spread`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import scipy  # scipy.stats, a second of importing, is loaded where it is first used

RESAMPLES = 10_000
MIN_SEEDS = 3  # fewer say nothing about how seeds vary
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)  # spans of what is measured: success, and one success minus another
_AT_ONCE = 500  # resamples that are in memory together

Span = tuple[float, float]


def interval(
    values_N: Sequence[float] | np.ndarray, level: float = 0.95, span: Span | None = SHARE
) -> tuple[float, float]:
    """The interval of the mean. For a paired difference give the differences, and their span.

    Args:
      values_N: one number for each task, N >= 1.
      level: share of the resamples whose mean lies inside.
      span: the least and the greatest that a value can be; None: any. See `without_spread`.

    Raises:
      ValueError: there are no values.
    """
    values_N = np.asarray(values_N, float)
    if not len(values_N):
        raise ValueError("no values: an interval needs at least one")
    if np.ptp(values_N) == 0:
        return without_spread(float(values_N[0]), len(values_N), level, span)
    result = scipy.stats.bootstrap((values_N,), np.mean, confidence_level=level, **_options())
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def crossed_interval(values_SN: np.ndarray, level: float = 0.95, span: Span | None = SHARE) -> tuple[float, float]:
    """The interval of the mean where seeds and tasks are both drawn from many: what to expect of new ones.

    Each resample draws seeds and, independently, tasks (Owen 2007, "The pigeonhole bootstrap", Annals of Applied
    Statistics 1). Resampled means of few seeds lie too close together, so their part is widened by sqrt(S / (S - 1))
    and from the normal to Student's t with S - 1 degrees of freedom (Hesterberg 2015, arXiv 1411.5279). It errs on the
    wide side: noise that is of one seed on one task is counted up to three times.

    Args:
      values_SN: one number for each seed and task, S >= 3, such as the difference of two arms.
      level, span: as in `interval`; the ends stay inside of the span.

    Raises:
      ValueError: fewer than 3 seeds, or no task.
    """
    values_SN = np.asarray(values_SN, float)
    seeds, tasks = values_SN.shape
    if seeds < MIN_SEEDS or not tasks:
        raise ValueError(f"{seeds} seeds x {tasks} tasks: an interval over seeds needs {MIN_SEEDS} seeds and a task")
    if np.ptp(values_SN) == 0:
        return without_spread(float(values_SN[0, 0]), tasks, level, span)
    tail, generator = (1 - level) / 2, np.random.default_rng(0)
    widened = np.sqrt(seeds / (seeds - 1)) * scipy.stats.t.ppf(1 - tail, seeds - 1) / scipy.stats.norm.ppf(1 - tail)
    mean, mean_S, means_R = values_SN.mean(), values_SN.mean(axis=1), []
    for count in np.diff([*range(0, RESAMPLES, _AT_ONCE), RESAMPLES]):
        share_RS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), count) / seeds
        share_RN = generator.multinomial(tasks, np.full(tasks, 1 / tasks), count) / tasks
        of_seeds_R = share_RS @ mean_S - mean
        means_R.append((share_RS @ values_SN * share_RN).sum(axis=1) + (widened - 1) * of_seeds_R)
    low, high = np.clip(np.quantile(np.concatenate(means_R), [tail, 1 - tail]), *(span or (-np.inf, np.inf)))
    return float(low), float(high)


def without_spread(value: float, count: int, level: float = 0.95, span: Span | None = SHARE) -> tuple[float, float]:
    """The interval of a mean where all of `count` values are the same.

    If none of `count` tasks differs, the share of tasks that do is below 1 - ((1 - level) / 2)^(1 / count) (Clopper and
    Pearson 1934, of 0 in `count`), and what differs is inside of the span. At 0 and 1 this is the exact binomial
    interval. Without a span: that value twice.
    """
    if span is None:
        return value, value
    differ = 1 - ((1 - level) / 2) ** (1 / count)
    return value - differ * (value - span[0]), value + differ * (span[1] - value)


def ratio_interval(
    parts_N: Sequence[float] | np.ndarray,
    wholes_N: Sequence[float] | np.ndarray,
    level: float = 0.95,
    span: Span | None = SHARE,
) -> tuple[float, float]:
    """The interval of sum(parts) / sum(wholes), both of the same N episodes, such as right steps and named steps.
    Resamples whose wholes are all 0 are left out. span: of the ratio, as in `interval`.

    Raises:
      ValueError: the wholes sum to 0.
    """
    parts_N, wholes_N = np.asarray(parts_N, float), np.asarray(wholes_N, float)
    counted_N = wholes_N != 0
    if not counted_N.any():
        raise ValueError("the wholes sum to 0: there is no ratio")
    ratios_N = parts_N[counted_N] / wholes_N[counted_N]
    if np.ptp(ratios_N) == 0 and not parts_N[~counted_N].any():
        return without_spread(float(ratios_N[0]), len(ratios_N), level, span)

    def ratio(parts: np.ndarray, wholes: np.ndarray, axis: int = -1) -> np.ndarray:
        counted = wholes.sum(axis)
        return np.divide(parts.sum(axis), counted, out=np.full(np.shape(counted), np.nan), where=counted != 0)

    with warnings.catch_warnings():
        # Of resamples without a whole: they are left out below.
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        result = scipy.stats.bootstrap((parts_N, wholes_N), ratio, paired=True, confidence_level=level, **_options())
    low, high = np.nanquantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _options() -> dict:
    generator = np.random.default_rng(0)
    return {"n_resamples": RESAMPLES, "batch": _AT_ONCE, "method": "percentile", "vectorized": True, "rng": generator}
