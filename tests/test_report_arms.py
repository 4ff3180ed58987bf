"""Runs become arms by their settings; differences are paired by seed and task, and say over what their interval is."""

import numpy as np
import pytest

from hintsd_jax.statistics import crossed_interval, interval
from hintsd_jax.tools.report import arms
from hintsd_jax.tools.report.reading import Run

RNG = np.random.default_rng(3)


def run(name, seed, success_NK=None, before_NK=None, **settings):
    ends = {"before": before_NK, "after": success_NK}
    held_out = {when: None if end is None else {"success": end.tolist(), "greedy": []} for when, end in ends.items()}
    config = {"seed": seed, "algorithm": "hint_sd", "tasks.test_split": "test", "env.name": "desk"} | settings
    return Run(name, None, config, {}, [], held_out, None, [])


def played(share):
    return (RNG.random((12, 4)) < share).astype(int)


def test_runs_that_differ_in_their_seed_alone_are_one_arm():
    runs = [
        run("hint-0", 0),
        run("sft-0", 0, algorithm="sft"),
        run("hint-1", 1, **{"mesh.fsdp": 2, "rollout.slots": 7, "eval.record_tasks": 3}),  # where, not what
        run("other", 2, **{"optim.lr": 0.5}),
        run("hint-0b", 0),  # the same seed again
        run("longer", 0, **{"optim.steps": 3}),
    ]
    found = [(arm.name, arm.runs, arm.seeds) for arm in arms.group(runs)]
    assert found == [
        ("hint", [0, 2], [0, 1]),
        ("sft-0", [1], [0]),
        ("other", [3], [2]),
        ("hint-0b", [4], [0]),
        ("longer", [5], [0]),
    ]


def test_a_setting_at_its_default_is_as_one_that_is_not_there_and_names_stay_apart():
    runs = [
        run("x-0", 0),
        run("x-1", 1, **{"optim.clip_norm": 1.0}),
        run("x-2", 0, algorithm="sft"),
        run("x-3", 1, algorithm="sft"),
    ]
    assert arms.flat(arms.dataclasses.asdict(arms.Config()))["optim.clip_norm"] == 1.0
    assert [(arm.name, arm.runs) for arm in arms.group(runs)] == [("x-0", [0, 1]), ("x-2", [2, 3])]


def test_one_run_is_not_compared():
    assert arms.compare([run("a", 0, played(0.5))]) is None


def test_three_seeds_are_compared_over_seeds_and_tasks():
    base, other, before = ([played(share) for _ in range(4)] for share in (0.3, 0.7, 0.5))
    runs = [run(f"base-{s}", s, base[s], before[s]) for s in (0, 1, 2)]
    runs += [run(f"new-{s}", s, other[s], before[s], algorithm="sft") for s in (3, 2, 1, 0)]  # seed 3 has no partner
    said = arms.compare(runs)
    assert [arm["name"] for arm in said["arms"]] == ["base", "new"]
    assert [measure["name"] for measure in said["measures"]] == ["test Avg@4", "test Best@4"]
    first, second = said["measures"][0]["arms"]
    assert first["against"] is None
    mean = np.array([base[s].mean(axis=1) for s in (0, 1, 2)])
    low, high = crossed_interval(mean)
    assert first["after"] == pytest.approx({"value": mean.mean(), "low": low, "high": high, "seeds": 3}, abs=1e-5)
    change = np.array([(other[s] - before[s]).mean(axis=1) for s in (3, 2, 1, 0)])
    assert second["change"]["value"] == pytest.approx(change.mean(), abs=1e-5) and second["change"]["seeds"] == 4
    paired = np.array([(other[s] - base[s]).mean(axis=1) for s in (2, 1, 0)])
    low, high = crossed_interval(paired, span=(-1.0, 1.0))
    assert second["against"] == pytest.approx({"value": paired.mean(), "low": low, "high": high, "seeds": 3}, abs=1e-5)
    best = np.array([other[s].max(axis=1) - base[s].max(axis=1) for s in (2, 1, 0)])
    assert said["measures"][1]["arms"][1]["against"]["value"] == pytest.approx(best.mean(), abs=1e-5)


def test_one_seed_has_an_interval_over_tasks_and_says_so():
    a, b = played(0.3), played(0.6)
    line = arms.compare([run("a", 0, a), run("b", 0, b, algorithm="sft")])["measures"][0]["arms"][1]
    low, high = interval((b - a).mean(axis=1), span=(-1.0, 1.0))
    assert line["against"] == pytest.approx({"value": (b - a).mean(), "low": low, "high": high, "seeds": 1}, abs=1e-5)


@pytest.mark.parametrize(
    "seed, settings, why",
    [
        (1, {}, "no seed in common"),
        (0, {"env.options.length": 3}, "other tasks"),
        (0, {"eval.test_tasks": 5}, "other tasks"),
        (0, {"env.name": "other"}, "other tasks"),
    ],
)
def test_what_cannot_be_paired_says_why(seed, settings, why):
    runs = [run("a", 0, played(0.5)), run("b", seed, played(0.5), algorithm="sft", **settings)]
    line = arms.compare(runs)["measures"][0]["arms"][1]
    assert (line["against"], line["why"]) == (None, why) and line["after"]["seeds"] == 1


def test_what_was_not_played_is_in_no_mean():
    values = [np.array([1.0, np.nan, 0.0, 1.0]), np.array([0.0, 1.0, 0.0, np.nan]), None, np.full(4, np.nan)]
    assert arms.over_seeds(values, (0.0, 1.0))["value"] == 0.25  # tasks 1 and 3 of two seeds
    assert arms.over_seeds(values, (0.0, 1.0))["seeds"] == 2
    assert arms.over_seeds([None], (0.0, 1.0)) is None
    assert arms.over_seeds([np.array([1.0, np.nan]), np.array([np.nan, 1.0])], (0.0, 1.0)) is None
    assert arms.over_seeds([np.ones(3), np.ones(4)], (0.0, 1.0)) is None
