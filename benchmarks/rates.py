"""Rates with their intervals: numbers of episodes in, what a table shows of them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hintsd_jax.statistics import SHARE, Span, ratio_interval

Rate = dict[str, float]  # value, low, high, n: a ratio, its 95 % interval, and the sum of what it is a ratio of


def ratio(
    parts_N: Sequence[float] | np.ndarray,
    wholes_N: Sequence[float] | np.ndarray | None = None,
    span: Span | None = SHARE,
) -> Rate | None:
    """sum(parts) / sum(wholes) over N episodes, resampled as whole episodes; wholes are 1 by default, so that it is the
    mean. None where nothing was counted. span: of the ratio; see `hintsd_jax.statistics`.
    """
    parts = np.asarray(parts_N, float)
    wholes = np.ones_like(parts) if wholes_N is None else np.asarray(wholes_N, float)
    if not wholes.sum():
        return None
    low, high = ratio_interval(parts, wholes, span=span)
    rate = {"value": parts.sum() / wholes.sum(), "low": low, "high": high, "n": wholes.sum()}
    return {name: round(float(number), 6) for name, number in rate.items()}


def cell(rate: Rate | None, form: str = "{:.2f}", scale: float = 1.0) -> str:
    """A rate with its interval, for a table."""
    if rate is None:
        return "-"
    value, low, high = (form.format(scale * rate[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def percent(rate: Rate | None, sign: bool = False) -> str:
    return cell(rate, "{:+.1f}" if sign else "{:.1f}", 100.0)
