"""A collapse raises an alarm once it has lasted, again only after as long again; the same in a run that was killed."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.config.schema import AlarmsSection
from hintsd_jax.runs.alarms import Alarm, AlarmConfig, Alarms
from hintsd_jax.runs.metrics import MetricsWriter, read_metrics

THRESHOLDS = (
    *("min_entropy", "max_divergence", "max_action_length", "min_success", "max_unreadable", "min_tokens"),
    *("min_targets", "max_dropped", "max_success_drop"),
)
OFF = AlarmConfig("warn", patience=3, **dict.fromkeys(THRESHOLDS, 0.0))
ON = dataclasses.replace(
    OFF,
    min_entropy=0.1,
    max_divergence=2.0,
    max_action_length=50.0,
    min_success=0.05,
    max_unreadable=0.5,
    min_tokens=2.0,
    min_targets=3.0,
    max_dropped=0.5,
)
BEYOND = {"train/entropy": 0.01, "train/divergence": 3.0, "rollout/action_length": 60.0, "rollout/success": 0.0}
BEYOND |= {"hindsight/unreadable": 0.6, "train/tokens": 1, "hindsight/targets": 2, "rollout/dropped_share": 0.6}
FINE = {"train/entropy": 0.5, "train/divergence": 0.5, "rollout/action_length": 20.0, "rollout/success": 0.5}
FINE |= {"hindsight/unreadable": 0.2, "train/tokens": 100, "hindsight/targets": 5, "rollout/dropped_share": 0.5}
NAMES = THRESHOLDS[:-1]  # all but max_success_drop, which is no threshold of a metric
METRICS = dict(zip(NAMES, BEYOND))


def names(alarms, rows):
    return [[alarm.name for alarm in alarms.check(row)] for row in rows]


def test_an_alarm_after_as_many_rows_as_patience_says_and_then_anew():
    assert names(Alarms(ON), [BEYOND] * 7) == [[], [], [*NAMES], [], [], [*NAMES], []]
    assert names(Alarms(ON), [BEYOND, BEYOND, FINE, BEYOND, BEYOND, FINE] * 3) == [[]] * 18
    assert names(Alarms(dataclasses.replace(ON, patience=1)), [FINE, BEYOND]) == [[], [*NAMES]]


@pytest.mark.parametrize("name", NAMES)
def test_each_threshold_alone(name):
    config = dataclasses.replace(OFF, **{name: getattr(ON, name)})
    assert names(Alarms(config), [FINE, BEYOND, BEYOND, BEYOND]) == [[], [], [], [name]]
    at_it = FINE | {METRICS[name]: getattr(ON, name)}
    assert names(Alarms(config), [at_it] * 5) == [[]] * 5
    assert names(Alarms(OFF), [BEYOND] * 5) == [[]] * 5


def test_the_line_says_all():
    (alarm,) = Alarms(dataclasses.replace(OFF, patience=1, min_entropy=0.1)).check({"train/entropy": 0.01234567})
    assert alarm == Alarm("min_entropy", "train/entropy = 0.01235 is below alarms.min_entropy = 0.1, for 1 step")
    alarms = Alarms(dataclasses.replace(OFF, max_action_length=50.0))
    assert [alarms.check(BEYOND) for _ in range(3)][2] == [
        Alarm("max_action_length", "rollout/action_length = 60 is above alarms.max_action_length = 50, for 3 steps")
    ]


def test_what_was_not_measured_counts_for_nothing():
    """Neither beyond the threshold nor back: rows of skipped updates, rows without the metric."""
    skipped = {"train/skipped": 1, "train/entropy": 0.0, "train/divergence": 0.0}
    config = dataclasses.replace(OFF, min_entropy=0.1)
    assert names(Alarms(config), [BEYOND, skipped, BEYOND, {}, skipped, BEYOND]) == [[]] * 5 + [["min_entropy"]]
    assert names(Alarms(config), [skipped] * 9) == [[]] * 9
    assert names(Alarms(ON), [skipped | {"rollout/success": 0.0}] * 3) == [[], [], ["min_success"]]
    assert names(Alarms(config), [BEYOND | {"train/skipped": 0.0}] * 3) == [[], [], ["min_entropy"]]
    unscored = FINE | {"train/teacher_scored_tokens": 0.0, "train/divergence": 0.0}
    rows = [BEYOND | {"train/teacher_scored_tokens": 5.0}, BEYOND, unscored, BEYOND]
    assert names(Alarms(ON), rows) == [[]] * 3 + [["max_divergence"]]
    unplayed = {"rollout/episodes": 0, "rollout/success": 0.0, "rollout/action_length": 0.0}
    unplayed |= {"hindsight/questions": 0, "hindsight/unreadable": 0.0, "hindsight/targets": 0, "train/tokens": 1}
    unplayed |= {"rollout/dropped_share": 1.0}
    raised = names(Alarms(ON), [BEYOND, BEYOND, *[unplayed] * 5, BEYOND])
    still = ["min_tokens", "max_dropped"]
    assert raised[2:] == [still, [], [], still, [], [name for name in NAMES if name not in still]]


def test_updates_without_a_token_are_an_alarm_unless_nothing_failed():
    config = dataclasses.replace(OFF, min_entropy=0.1, min_tokens=1.0, min_targets=1.0, max_unreadable=0.5)
    empty = {"train/skipped": 1, "train/tokens": 0, "train/entropy": 0.0, "rollout/success": 0.25}
    empty |= {"hindsight/targets": 0, "hindsight/questions": 0}
    unread = empty | {"hindsight/questions": 3, "hindsight/unreadable": 1.0}
    assert names(Alarms(config), [empty | {"train/skipped": 0}] * 3) == [[], [], ["min_tokens"]]
    assert names(Alarms(config), [unread] * 3) == [[], [], ["max_unreadable", "min_tokens", "min_targets"]]
    assert names(Alarms(config), [empty | {"rollout/success": 1.0}] * 6) == [[]] * 6
    # other tokens do not hide that nothing was named
    assert names(Alarms(config), [unread | {"train/tokens": 9, "hindsight/unreadable": 0}] * 3)[2] == ["min_targets"]


def test_a_run_that_learns_nothing_is_an_alarm_without_any_setting():
    config = AlarmConfig(**AlarmsSection().to_dict())
    nothing = {"train/skipped": 1, "train/tokens": 0, "rollout/success": 0.0, "hindsight/questions": 16}
    nothing |= {"hindsight/targets": 0, "hindsight/unreadable": 1.0, "rollout/dropped_share": 0.75}
    raised = names(Alarms(config), [nothing] * 3)
    assert raised == [[], [], ["max_unreadable", "min_tokens", "min_targets", "max_dropped"]]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_an_update_that_met_a_number_that_is_not_finite_is_an_alarm_at_once_whatever_is_off(value):
    bad = {"train/nonfinite": 1, "train/skipped": 1, "train/loss": value, "train/grad_norm": value}
    text = "train/grad_norm, train/loss: not a finite number, so the update was skipped"
    assert Alarms(OFF).check(FINE | bad) == [Alarm("not_finite", text)]
    assert Alarms(OFF).check(FINE | bad | {"train/loss": 1.0, "train/grad_norm": 1.0})[0].text.startswith("a gradient")
    (sampled,) = Alarms(OFF).check(FINE | {"train/nonfinite": 0, "rollout/nonfinite_logprobs": 7})
    assert sampled == Alarm("not_finite", "7 sampled tokens have no finite log-probability")
    (broken,) = Alarms(OFF).check(FINE | {"train/nonfinite": 1, "train/skipped": 0})
    assert "the update made weights" in broken.text
    assert Alarms(OFF).check(FINE | {"train/nonfinite": 0, "eval/avg@4": None, "train/loss": value}) == []


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_counts_for_nothing(value):
    rows = [BEYOND, BEYOND, FINE | dict.fromkeys(BEYOND, value), BEYOND]
    assert names(Alarms(ON), rows) == [[], [], [], [*NAMES]]


def test_success_that_falls_from_its_own_best():
    config = dataclasses.replace(OFF, patience=2, max_success_drop=0.25)
    rows = [{"rollout/success": value} for value in (0.1, 0.1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.25)]
    alarms = Alarms(config)
    raised = [alarms.check(row) for row in rows]
    # Means of two: 0.1, 0.425, 0.75, 0.625, 0.5 (0.25 below: not more), 0.375: an alarm. Then the count begins again,
    # and 0.25 and 0.375 are alarms.
    assert [len(each) for each in raised] == [0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    assert raised[6][0].text == (
        "rollout/success = 0.375, the mean of 2 steps, is 0.375 below its best so far, 0.75"
        " (alarms.max_success_drop = 0.25)"
    )
    assert alarms.state["best_success"] == 0.75
    assert names(Alarms(dataclasses.replace(config, max_success_drop=0.0)), rows) == [[]] * len(rows)


def test_the_rows_of_a_file(tmp_path):
    """As the writer returns them and as they are read again."""
    writer = MetricsWriter(tmp_path)
    bad = {"train/grad_norm": math.nan, "train/nonfinite": 1}
    given_back = [writer.write(n, BEYOND | (bad if n == 2 else {})) for n in range(4)]
    writer.close()
    written, read = Alarms(ON), Alarms(ON)
    raised = names(written, given_back)
    assert raised == names(read, read_metrics(tmp_path / "metrics.jsonl")) == [[], [], ["not_finite", *NAMES], []]
    assert written.state == read.state


VALUES = st.sampled_from([None, math.nan, 0.0, 0.04, 0.1, 0.3, 0.9, 2.5, 70.0])
KEYS = st.sampled_from(
    [
        "train/skipped",
        "train/teacher_scored_tokens",
        "rollout/episodes",
        "hindsight/questions",
        "train/nonfinite",
        *BEYOND,
    ]
)
ROWS = st.lists(st.dictionaries(KEYS, VALUES | st.just(1), max_size=6), max_size=25)
CONFIGS = st.builds(
    AlarmConfig,
    action=st.sampled_from(["warn", "stop", "halve_lr"]),
    patience=st.integers(1, 4),
    min_entropy=st.sampled_from([0.0, 0.1, 0.5]),
    max_divergence=st.sampled_from([0.0, 0.5, 2.0]),
    max_action_length=st.sampled_from([0.0, 50.0]),
    min_success=st.sampled_from([0.0, 0.05]),
    max_unreadable=st.sampled_from([0.0, 0.5]),
    min_tokens=st.sampled_from([0.0, 1.0]),
    min_targets=st.sampled_from([0.0, 1.0]),
    max_dropped=st.sampled_from([0.0, 0.5]),
    max_success_drop=st.sampled_from([0.0, 0.2]),
)


@given(CONFIGS, ROWS, st.data())
@settings(max_examples=100, deadline=None)
def test_a_killed_run_decides_the_same(config, rows, data):
    cut = data.draw(st.integers(0, len(rows)))
    whole, first = Alarms(config), Alarms(config)
    raised = [whole.check(row) for row in rows]
    before = [first.check(row) for row in rows[:cut]]
    saved = json.loads(json.dumps(first.state, allow_nan=False))
    resumed = Alarms(config, saved)
    assert before + [resumed.check(row) for row in rows[cut:]] == raised and resumed.state == whole.state
    assert saved == first.state  # what was given is not changed


@given(CONFIGS, ROWS)
@settings(max_examples=100, deadline=None)
def test_thresholds_against_runs_of_rows(config, rows):
    """The oracle looks at the measured values alone: an alarm stands where a multiple of `patience` of them in a row
    lies beyond.
    """
    raised = names(Alarms(config), rows)
    for name, metric in METRICS.items():
        limit, sign = getattr(config, name), -1 if name.startswith("min") else 1
        expected, length = [], 0
        for row in rows:
            value = row.get(metric, math.nan)
            measured = value is not None and math.isfinite(value)
            if name in ("min_success", "max_action_length"):
                measured &= row.get("rollout/episodes") != 0
            elif name == "max_unreadable":
                measured &= row.get("hindsight/questions") != 0
            elif name == "min_tokens":
                measured &= row.get("rollout/success") != 1
            elif name == "min_targets":
                measured &= row.get("rollout/success") != 1 and row.get("hindsight/questions") != 0
            elif name == "max_dropped":
                pass
            else:
                measured &= row.get("train/skipped") != 1 and row.get("train/tokens") != 0
            if name == "max_divergence":
                measured &= row.get("train/teacher_scored_tokens") != 0
            if measured:
                length = length + 1 if limit and (value - limit) * sign > 0 else 0
            expected.append(measured and length > 0 and length % config.patience == 0)
        assert [name in each for each in raised] == expected
