"""Intervals against resampling by hand, and the values that have no spread."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.statistics import RESAMPLES, interval, ratio_interval

RNG = np.random.default_rng(3)
VALUES_N = RNG.random(40)
PARTS_N, WHOLES_N = RNG.integers(0, 3, 30), RNG.integers(3, 6, 30)


def resampled(size):
    """The episodes of each resample, drawn by hand: [RESAMPLES, size]."""
    return np.random.default_rng(0).integers(0, size, (RESAMPLES, size))


def test_the_mean_by_hand():
    means = VALUES_N[resampled(len(VALUES_N))].mean(axis=1)
    assert interval(VALUES_N) == pytest.approx(np.quantile(means, [0.025, 0.975]))
    assert interval(VALUES_N, 0.5) == pytest.approx(np.quantile(means, [0.25, 0.75]))


def test_a_ratio_by_hand():
    drawn = resampled(len(PARTS_N))
    ratios = PARTS_N[drawn].sum(axis=1) / WHOLES_N[drawn].sum(axis=1)
    assert ratio_interval(PARTS_N, WHOLES_N) == pytest.approx(np.quantile(ratios, [0.025, 0.975]))
    assert ratio_interval(VALUES_N, np.ones(len(VALUES_N))) == pytest.approx(interval(VALUES_N))


def test_resamples_without_a_whole_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ratio_interval([1, 0, 0], [2, 0, 0]) == (0.5, 0.5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_the_ends_are_around_the_mean_and_repeat(values):
    low, high = interval(values)
    assert low <= np.mean(values) + 1e-9 and np.mean(values) - 1e-9 <= high and (low, high) == interval(values)


@pytest.mark.parametrize("values", [[0.3], [0.25] * 7, np.zeros(4)])
def test_values_without_spread_stand_twice_and_nobody_is_warned(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert interval(values) == (values[0], values[0])
        assert ratio_interval(values, np.ones(len(values))) == (values[0], values[0])


def test_nothing_has_no_interval():
    with pytest.raises(ValueError, match="no values"):
        interval([])
    with pytest.raises(ValueError, match="sum to 0"):
        ratio_interval([1.0], [0.0])
