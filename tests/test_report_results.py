"""The last table of a report: the evaluation's own means and intervals, and a change that is paired by task."""

import numpy as np
import pytest

from hintsd_jax.evaluate import Scores
from hintsd_jax.statistics import interval
from hintsd_jax.tools.report import results

RNG = np.random.default_rng(1)
BEFORE_NK, AFTER_NK = (RNG.random((40, 4)) < 0.3).astype(int), (RNG.random((40, 4)) < 0.7).astype(int)
GREEDY_N = BEFORE_NK[:, 0]


def end(success_NK, **more):
    return {"metrics": {}, "success": success_NK.tolist(), "greedy": [], **more}


def test_they_are_the_evaluations_own():
    avg, best = results.lines({"before": end(BEFORE_NK), "after": end(AFTER_NK)}, "test")
    assert (avg["name"], best["name"]) == ("test Avg@4", "test Best@4")
    for when, success_NK in (("before", BEFORE_NK), ("after", AFTER_NK)):
        said = Scores(success_NK, 0, {}).metrics("test") | Scores(success_NK, 0, {}).intervals("test")
        expected = {"value": said["test/avg@4"], "low": said["test/avg_low"], "high": said["test/avg_high"]}
        assert avg[when] == pytest.approx(expected, abs=1e-5)
        assert best[when]["value"] == pytest.approx(said["test/best@4"], abs=1e-5)


def test_what_was_not_played_is_left_out_as_an_evaluation_does():
    success_NK = AFTER_NK.astype(float)
    success_NK[0], success_NK[1, 2] = np.nan, np.nan
    scores = Scores(success_NK, 0, {})
    said = scores.metrics("test") | scores.intervals("test")
    lines = results.lines({"before": end(BEFORE_NK), "after": {"success": scores.to_json(), "greedy": []}}, "test")
    expected = {"value": said["test/avg@4"], "low": said["test/avg_low"], "high": said["test/avg_high"]}
    assert lines[0]["after"] == pytest.approx(expected, abs=1e-5)
    assert lines[1]["after"]["value"] == pytest.approx(said["test/best@4"], abs=1e-5)
    change = np.nanmean(success_NK[1:], axis=1) - BEFORE_NK[1:].mean(axis=1)
    assert lines[0]["change"]["value"] == pytest.approx(change.mean(), abs=1e-5)
    none = results.lines({"before": None, "after": {"success": [[None, None]], "greedy": []}}, "test")
    assert all(line["after"] is None for line in none)


def test_the_change_is_paired_by_task():
    line = results.lines({"before": end(BEFORE_NK), "after": end(1 - BEFORE_NK)}, "test")[0]
    low, high = interval(1 - 2 * BEFORE_NK.mean(axis=1))
    expected = {"value": float(1 - 2 * BEFORE_NK.mean()), "low": low, "high": high}
    assert line["change"] == pytest.approx(expected, abs=1e-5)
    same = results.lines({"before": end(BEFORE_NK), "after": end(BEFORE_NK)}, "test")[0]
    most = 1 - 0.025 ** (1 / len(BEFORE_NK))  # of all tasks may differ where none of these does
    assert same["change"] == pytest.approx({"value": 0.0, "low": -most, "high": most}, abs=1e-5)


def test_categories_and_greedy_have_lines_of_their_own():
    categories = ["base"] * 30 + ["long"] * 10
    after = end(AFTER_NK, categories=categories) | {"greedy": GREEDY_N.tolist()}
    lines = {line["name"]: line for line in results.lines({"before": None, "after": after}, "test")}
    assert list(lines) == [
        f"{part} {name}" for part in ("test", "base", "long") for name in ("Avg@4", "Best@4", "greedy")
    ]
    assert lines["long Avg@4"]["after"]["value"] == pytest.approx(AFTER_NK[30:].mean())
    assert lines["test greedy"]["after"]["value"] == pytest.approx(GREEDY_N.mean())
    assert all(line["before"] is None and line["change"] is None for line in lines.values())


@pytest.mark.parametrize(
    "held_out", [None, {}, {"before": None, "after": None}, {"before": end(BEFORE_NK[:0]), "after": None}]
)
def test_nothing_measured_no_lines(held_out):
    assert results.lines(held_out, "test") == []


def test_other_tasks_before_than_after_are_not_paired():
    line = results.lines({"before": end(BEFORE_NK[:7]), "after": end(AFTER_NK)}, "test")[0]
    assert line["change"] is None and line["before"]["value"] == pytest.approx(BEFORE_NK[:7].mean(), abs=1e-5)
