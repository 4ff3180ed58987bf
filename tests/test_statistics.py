"""Intervals against resampling by hand, the values that have no spread, and how often an interval holds the truth."""

import itertools
import warnings
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from hintsd_jax import statistics
from hintsd_jax.statistics import DIFFERENCE, RESAMPLES, SHARE, crossed_interval, interval, ratio_interval

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
        assert ratio_interval([1, 0, 0], [2, 0, 0], span=None) == (0.5, 0.5)
        assert ratio_interval([1, 0, 0], [2, 0, 0]) == pytest.approx((0.0125, 0.9875))  # one episode says little


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_the_ends_are_around_the_mean_and_repeat(values):
    low, high = interval(values, span=DIFFERENCE)
    assert low <= np.mean(values) + 1e-9 and np.mean(values) - 1e-9 <= high
    assert (low, high) == interval(values, span=DIFFERENCE)


@pytest.mark.parametrize("values", [[0.3], [0.25] * 7, np.zeros(4)])
def test_without_a_span_equal_values_stand_twice_and_nobody_is_warned(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert interval(values, span=None) == (values[0], values[0])
        assert ratio_interval(values, np.ones(len(values)), span=None) == (values[0], values[0])


@given(st.integers(1, 300), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(max_examples=20, deadline=None)
def test_all_failed_and_all_succeeded_have_the_exact_binomial_interval(count, level):
    for value in (0, 1):
        exact = binomtest(value * count, count).proportion_ci(level, "exact")
        values_N = np.full(count, value)
        for found in (
            interval(values_N, level),
            ratio_interval(3 * values_N, np.full(count, 3), level),
            crossed_interval(np.tile(values_N, (4, 1)), level),
        ):
            assert found == pytest.approx((exact.low, exact.high))
    wide = binomtest(0, count).proportion_ci(level, "exact").high
    assert interval(np.zeros(count), level, DIFFERENCE) == pytest.approx((-wide, wide))


@pytest.mark.parametrize("seed", range(4))
def test_a_crossed_interval_against_all_resamples_there_are(seed, monkeypatch):
    """3 seeds x 4 tasks have 27 x 256 resamples, each as likely as the others: their quantiles, by counting."""
    monkeypatch.setattr(statistics, "RESAMPLES", 40_000)
    values_SN = np.random.default_rng(seed).random((3, 4))
    mean, z, t = values_SN.mean(), NormalDist().inv_cdf(0.975), 4.302653
    widened = (3 / 2) ** 0.5 * t / z
    drawn = []
    for seeds in itertools.product(range(3), repeat=3):
        by_seed = [values_SN[s].mean() for s in seeds]
        extra = (widened - 1) * (sum(by_seed) / 3 - mean)
        tasks_N = sum(values_SN[s] for s in seeds) / 3
        drawn += [sum(tasks_N[n] for n in tasks) / 4 + extra for tasks in itertools.product(range(4), repeat=4)]
    low, high = crossed_interval(values_SN, span=None)
    drawn, slack = np.array(drawn), 0.005  # six standard errors
    assert (drawn < low - 1e-9).mean() - slack <= 0.025 <= (drawn <= low + 1e-9).mean() + slack
    assert (drawn > high + 1e-9).mean() - slack <= 0.025 <= (drawn >= high - 1e-9).mean() + slack


@pytest.mark.parametrize(("seeds", "spread"), [(3, (0.1, 0.02, 0.05)), (8, (0.1, 0.1, 0.2)), (8, (0.02, 0.2, 0.3))])
def test_a_crossed_interval_holds_the_truth_as_often_as_it_says(seeds, spread, monkeypatch):
    """Success = truth + what a seed adds + what a task adds + noise. Over tasks alone it would hold far too seldom."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    generator, truth, tasks, trials = np.random.default_rng(seeds), 0.3, 40, 150
    of_seed, of_task, noise = spread
    held = held_by_tasks = 0
    for _ in range(trials):
        values_SN = truth + of_seed * generator.normal(size=(seeds, 1)) + of_task * generator.normal(size=(1, tasks))
        values_SN = values_SN + noise * generator.normal(size=(seeds, tasks))
        low, high = crossed_interval(values_SN, span=None)
        held += low <= truth <= high
        low, high = np.quantile(
            values_SN.mean(axis=0)[generator.integers(0, tasks, (500, tasks))].mean(1), [0.025, 0.975]
        )
        held_by_tasks += low <= truth <= high
    assert held / trials >= 0.92
    if of_seed >= 0.1:
        assert held_by_tasks / trials < 0.8


def test_a_crossed_interval_stays_inside_of_its_span_and_repeats():
    values_SN = np.array([[1.0] * 5, [1.0] * 5, [1.0, 1.0, 0.0, 1.0, 1.0]])
    low, high = crossed_interval(values_SN)
    assert 0 <= low < values_SN.mean() < high == SHARE[1] and (low, high) == crossed_interval(values_SN)


def test_two_seeds_say_nothing_about_seeds():
    with pytest.raises(ValueError, match="2 seeds x 5 tasks: an interval over seeds needs 3 seeds"):
        crossed_interval(np.zeros((2, 5)))


def test_nothing_has_no_interval():
    with pytest.raises(ValueError, match="no values"):
        interval([])
    with pytest.raises(ValueError, match="sum to 0"):
        ratio_interval([1.0], [0.0])
