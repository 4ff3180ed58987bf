"""The figures' and tables' numbers from summaries that are written down here: intervals, pairs, equal time; nothing is
trained.
"""

import json
import os
import re
import signal
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import (
    compare_algorithms,
    comparison,
    comparison_runs,
    comparison_search,
    comparison_settings,
    comparison_tables,
)
from benchmarks.comparison import Curve, retimed
from benchmarks.comparison_runs import Run, Runner
from hintsd_jax.statistics import DIFFERENCE, crossed_interval, interval

LABELS = {"hint_sd": "**HINT-SD**", "openclaw_rl": "OpenClaw", "environment": "PRIVILEGED: report"}


def held_out(rng, rate, tasks=50, k=4):
    success_NK = (rng.random((tasks, k)) < rate).astype(int)
    return {"success": success_NK.tolist(), "greedy": (rng.random(tasks) < rate).astype(int).tolist()}


def summary(arm, seed, rate=0.7, step_s=2.0, steps=4, **more):
    """A finished run: success rises by 10 points an evaluation from 30 %, one every two updates."""
    rng = np.random.default_rng([seed, len(arm)])
    even = [n % 2 == 0 for n in range(steps + 1)]
    rows = {
        "step": list(range(steps + 1)),
        "time/step": [None, 50.0, 40.0, *[step_s] * (steps - 2)],
        "time/rollout": [None, *[1.0] * steps],
        "time/analysis": [None, *[step_s / 4] * steps],
        "time/update": [None, *[step_s / 4] * steps],
        "rollout/tokens": [None, *[1000] * steps],
        "rollout/episodes": [None, *[64] * steps],
        "hindsight/tokens": [None, *[100] * steps],
        "train/student_tokens": [None, *[3000] * steps],
        "memory/peak_bytes": [2**20, *[2**30] * steps],
        "eval/avg@4": [0.3 + 0.05 * n if even[n] else None for n in range(steps + 1)],
    }
    before = comparison.encode(held_out(np.random.default_rng(seed), 0.3))
    machine = {"cpu": "x", "cores": 4, "jobs": 2, "cores_per_job": 2}
    found = {
        "arm": arm,
        "seed": seed,
        "status": "finished",
        "config": "c.py",
        "settings": {"a": "1"},
        "overrides": [f"algorithm={arm}"],
        "rows": rows,
    }
    after = comparison.encode(held_out(rng, rate))
    found |= {"before": before, "after": after, "machines": [machine], "versions": {"jax": "1"}, "date": "2026-01-01"}
    return found | more


def test_success_is_kept_by_task():
    result = {"success": [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], "greedy": [0, 0, 1]}
    run = {"after": json.loads(json.dumps(comparison.encode(result)))}
    assert comparison.success(run, "after", "avg").tolist() == [0.25, 0.0, 1.0]
    assert comparison.success(run, "after", "best").tolist() == [1.0, 0.0, 1.0]
    assert comparison.success(run, "after", "greedy").tolist() == [0.0, 0.0, 1.0]
    assert comparison.encode(None) is None


def test_estimates_are_paired_by_task_and_seed():
    better = {seed: summary("hint_sd", seed, 0.9) for seed in (0, 1, 2)}
    worse = {seed: summary("openclaw_rl", seed, 0.5) for seed in (1, 2, 3)}
    raw = {
        (arm["arm"], seed): np.array([[int(digit) for digit in row] for row in arm["after"]["success"]])
        for runs in (better, worse)
        for seed, arm in runs.items()
    }
    found = comparison.contrast(better, worse, "avg")
    expected_SN = np.array(
        [raw["hint_sd", seed].mean(axis=1) - raw["openclaw_rl", seed].mean(axis=1) for seed in (1, 2)]
    )
    assert found.mean == pytest.approx(expected_SN.mean()) and found.seeds == pytest.approx(expected_SN.mean(axis=1))
    assert (found.low, found.high) == interval(expected_SN.mean(axis=0)) and found.low < found.mean < found.high
    assert not found.over_seeds and found.text().endswith("] (tasks)")  # two seeds say nothing about seeds
    worse[0] = summary("openclaw_rl", 0, 0.1)
    wider = comparison.contrast(better, worse, "avg")
    assert wider.over_seeds and wider.text().endswith("]") and len(wider.seeds) == 3
    values_SN = [
        comparison.success(better[s], "after", "avg") - comparison.success(worse[s], "after", "avg") for s in (0, 1, 2)
    ]
    assert (wider.low, wider.high) == crossed_interval(np.array(values_SN), span=DIFFERENCE)
    assert comparison.contrast(better, {9: worse[3]}, "avg") is None
    change = comparison.change(better, "greedy")
    gained = [run["after"]["greedy"].count("1") - run["before"]["greedy"].count("1") for run in better.values()]
    assert change.mean == pytest.approx(np.mean(gained) / 50)
    # a pair of the same runs differs by nothing, which 50 tasks do not prove for all
    assert comparison.contrast(better, better, "best").text("+") == "+0.0 [-7.1, +7.1]"


def test_the_first_updates_do_not_count_as_step_times():
    run = summary("hint_sd", 0, step_s=2.0, steps=6)
    assert comparison.a_step(run, "time/step") == 2.0  # not the 50 and 40 s
    assert comparison.a_step(summary("hint_sd", 0, steps=2), "time/step") == 40.0  # nothing else is there
    assert np.isnan(comparison.a_step(run, "time/none"))
    assert comparison.a_step(run, "time/step", np.mean, 0) == pytest.approx((50 + 40 + 4 * 2) / 6)


def test_curves_and_equal_time_by_hand():
    curve = Curve.of(summary("hint_sd", 0))  # 30 %, 40 %, 50 % at 0, 90 and 94 s
    assert (
        curve.steps.tolist() == [0, 2, 4]
        and curve.time.tolist() == [0, 90, 94]
        and curve.tokens.tolist() == [0, 2200, 4400]
    )
    assert curve.value.tolist() == pytest.approx([0.3, 0.4, 0.5])
    assert curve.at_time(45) == pytest.approx(0.35) and curve.at_time(94) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="ended after 94.0 s, before 95.0 s"):
        curve.at_time(95)
    slower = Curve.of(summary("openclaw_rl", 0, step_s=6.0))  # 102 s
    assert comparison.equal_time(curve, slower) == pytest.approx((94, 0.4 + 0.1 * 4 / 12, 0.5))
    assert comparison.equal_time(slower, curve) == pytest.approx((94, 0.5, 0.4 + 0.1 * 4 / 12))
    assert (
        curve.reaches(0.3) == 0
        and curve.reaches(0.35) == pytest.approx(45)
        and curve.reaches(0.45) == pytest.approx(92)
    )
    assert curve.reaches(0.51) is None
    mean = Curve.mean([curve, Curve.of(summary("hint_sd", 1, step_s=4.0, steps=2))])
    assert mean.time.tolist() == [0, 90] and mean.value.tolist() == pytest.approx([0.3, 0.4])


@given(st.lists(st.floats(0.1, 0.9), min_size=2, max_size=6), st.floats(0.1, 0.9))
@settings(max_examples=50, deadline=None)
def test_when_a_level_is_reached_the_curve_is_at_it(values, wanted):
    steps = np.arange(len(values), dtype=float)
    curve = Curve(steps, 10 * steps, steps, np.array(values))
    seconds = curve.reaches(wanted)
    if seconds is None:
        assert max(values) < wanted
    elif seconds > 0:
        assert curve.at_time(seconds) == pytest.approx(wanted)
        assert all(curve.at_time(earlier) < wanted + 1e-9 for earlier in np.linspace(0, seconds, 7))
    else:
        assert values[0] >= wanted


def test_summaries_of_earlier_versions_are_read_by_the_names_of_today(tmp_path):
    old = {"arm": "dense", "seed": 0, "overrides": ["method=dense", "hindsight.place=start"], "settings": {"a": "1"}}
    old["rows"] = {"step": [0, 1], "time/distill": [None, 2.0], "hindsight/asked": [None, 5], "time/step": [None, 3.0]}
    (tmp_path / "old.json").write_text(comparison_tables.to_json([old]))
    (run,) = comparison.read_summaries(f"{tmp_path}/old.json")
    assert run["arm"] == "openclaw_rl" and run["settings"] == {"a": "1"}
    assert run["overrides"] == ["algorithm=openclaw_rl", "hindsight.feedback_position=start"]
    assert list(run["rows"]) == ["step", "time/update", "hindsight/questions", "time/step"]


def test_the_page_has_every_run():
    runs = [
        summary(arm, seed, rate, step_s)
        for seed in (0, 1)
        for arm, rate, step_s in (("hint_sd", 0.8, 2.0), ("openclaw_rl", 0.4, 6.0))
    ]
    runs += [
        {**summary("rejection_sampling", 0), "status": "failed", "problem": "error: no | success"},
        {**summary("rejection_sampling", 1), "status": "unfinished"},
    ]
    text = re.sub(" +", " ", comparison_tables.page(runs, LABELS))
    for row in (
        "| rejection_sampling | 0 | | **failed**: error: no / success | | | |",
        "| rejection_sampling | 1 | | not finished | | | |",
    ):
        assert text.count(row) == 3  # Avg@4, Best@4, greedy
    assert text.count("| **HINT-SD** | 0, 1 |") == 3 and "Before training 0 of 400 rollouts differ" in text
    cost = next(line for line in text.splitlines() if line.startswith("| OpenClaw | 6.00 |"))
    assert cost.split(" | ")[1:7] == ["6.00", "3.00", "1.00", "1.50", "1.50", "3.00"] and "| 1,024 |" in cost
    for change in (
        {"settings": {"a": "2"}},
        {"after": comparison.encode(held_out(np.random.default_rng(0), 0.5, tasks=49))},
    ):
        with pytest.raises(SystemExit, match="hint_sd-0 and openclaw_rl-7"):
            comparison_tables.page([*runs, {**summary("openclaw_rl", 7), **change}], LABELS)
    with pytest.raises(SystemExit, match=r"openclaw_rl-7 has no held-out results to compare: set eval\.test_tasks"):
        comparison_tables.page([*runs, {**summary("openclaw_rl", 7), "after": None}], LABELS)
    assert json.loads(comparison_tables.to_json(runs))["runs"] == runs


def test_figures_are_the_same_bytes_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import comparison_figures

    arms = {
        arm: {seed: summary(arm, seed, rate) for seed in (0, 1)}
        for arm, rate in (("hint_sd", 0.8), ("openclaw_rl", 0.4), ("environment", 0.9))
    }
    figures = [comparison_figures.overview(arms, LABELS, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg")]
    assert figures[0] == figures[1]
    for figure in (figures[0], comparison_figures.progress(arms, "tokens", tmp_path / "c.svg").read_bytes()):
        words = "".join(ElementTree.fromstring(figure).itertext())
        assert {"hint_sd", "openclaw_rl", "environment"} <= set(words.split()) and len(figure) < 60_000
    values = comparison_figures.spread([10.0, 11.0, 50.0, 51.0, 99.0], 5.0, 0.0, 100.0)
    assert values == pytest.approx([8.0, 13.0, 48.0, 53.0, 99.0])


def test_a_workdir_that_is_finished_is_read_and_a_lone_summary_is_kept(tmp_path, monkeypatch, capsys):
    """--read brings summaries up to what the workdirs hold, and takes those of other machines from a collected file."""
    runs = {}
    for arm in ("hint_sd", "openclaw_rl"):
        run = runs[arm] = summary(arm, 0)
        folder = tmp_path / "runs" / f"{arm}-0"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(run | {"status": "unfinished"} if arm == "hint_sd" else run))
    rows = [{"step": n, "eval/avg@4": 0.25 + n / 3, "time/step": 1.5, "train/loss": 1.0} for n in range(2)]
    (tmp_path / "runs/hint_sd-0/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {when: held_out(np.random.default_rng(5), 0.5) for when in ("before", "after")}
    (tmp_path / "runs/hint_sd-0/held_out.json").write_text(json.dumps(results))
    (tmp_path / "far.json").write_text(
        comparison_tables.to_json([summary("grpo", 0), summary("openclaw_rl", 0, status="failed", problem="x")])
    )

    def read(*options):
        monkeypatch.setattr(
            sys, "argv", ["compare", "--read", f"--workdir={tmp_path}/runs", f"--out={tmp_path}/out/table", *options]
        )
        monkeypatch.setattr(compare_algorithms, "figures", lambda: None)
        with pytest.raises(SystemExit) as exit:
            compare_algorithms.main()
        return exit.value.code, {
            (run["arm"], run["seed"]): run for run in json.loads((tmp_path / "out/table.json").read_text())["runs"]
        }

    status, found = read("--seeds=0", "--arms=hint_sd,openclaw_rl,grpo", f"--collected={tmp_path}/far.json")
    assert (
        status == 0
        and list(found) == [("hint_sd", 0), ("openclaw_rl", 0), ("grpo", 0)]
        and "0 runs are left" in capsys.readouterr().out
    )
    assert found["hint_sd", 0]["rows"] == {"step": [0, 1], "eval/avg@4": [0.25, 0.58333], "time/step": [1.5, 1.5]}
    assert (
        found["hint_sd", 0]["status"] == "finished" and found["openclaw_rl", 0]["rows"] == runs["openclaw_rl"]["rows"]
    )
    assert (tmp_path / "out/table.md").read_text().startswith("# Algorithms side by side")
    assert read("--seeds=0,1", "--arms=hint_sd,openclaw_rl")[0] == 75


def test_a_run_that_cannot_start_is_a_row_that_says_why(tmp_path, monkeypatch, capsys):
    """A real process, which says why and ends."""
    (tmp_path / "python").write_text("#!/bin/sh\necho step 1\necho 'error: no | luck' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(comparison_runs.sys, "executable", f"{tmp_path}/python")
    out = tmp_path / "table"
    elsewhere = summary(
        "openclaw_rl", 0, config="desk", settings={"checkpoint.every": "2", "eval.tasks": "7"}
    )  # not run again here
    (tmp_path / "far.json").write_text(comparison_tables.to_json([elsewhere]))
    options = [
        f"--workdir={tmp_path}/runs",
        f"--out={out}",
        f"--collected={tmp_path}/far.json",
        "--arms=hint_sd,openclaw_rl",
        "--seeds=0",
        "eval.tasks=7",
    ]
    monkeypatch.setattr(sys, "argv", ["compare", *options])
    monkeypatch.setattr(compare_algorithms, "figures", lambda: None)
    with pytest.raises(SystemExit) as exit:
        compare_algorithms.main()
    assert exit.value.code == 1 and "1 runs are left, 1 of them failed" in capsys.readouterr().out
    kept = json.loads((tmp_path / "runs/hint_sd-0/summary.json").read_text())
    assert (
        os.listdir(tmp_path / "runs") == ["hint_sd-0"]
        and "**failed**: error: no / luck" in out.with_suffix(".md").read_text()
    )
    monkeypatch.setattr(sys, "argv", ["compare", *options, "optim.lr=0"])
    with pytest.raises(
        SystemExit, match=r"openclaw_rl-0 was run with other settings .*: give the same, or another --workdir"
    ):
        compare_algorithms.main()
    assert kept["status"] == "failed" and kept["problem"] == "error: no | luck"
    monkeypatch.setattr(sys, "argv", ["compare", f"--workdir={tmp_path}/runs", "--arms=grpo", "optim.lrr=1"])
    with pytest.raises(SystemExit, match=r"error: unknown config key optim.lrr: did you mean optim.lr\?"):
        compare_algorithms.main()  # before anything is run


def test_clean_times_take_the_place_of_disturbed_ones():
    rows = {
        "step": [0, 1, 2, 3, 4, 5],
        "time/step": [None, 90.0, 80.0, 20.0, 40.0, 60.0],
        "time/compile": [30.0, *[None] * 5],
        "eval/avg@4": [0.1] * 6,
    }
    clean = {
        "arm": "openclaw_rl",
        "rows": {"step": [0, 1, 2, 3, 4], "time/step": [None, 7.0, 7.0, 5.0, 10.0], "time/compile": [6.0, *[None] * 4]},
    }
    (run,) = retimed([{"arm": "openclaw_rl", "rows": rows}], [clean])
    assert run["rows"]["time/step"] == [None, 7.0, 7.0, 5.0, 10.0, 7.5]
    assert (
        run["rows"]["time/compile"] == [6.0, *[None] * 5]
        and run["rows"]["eval/avg@4"] == rows["eval/avg@4"]
        and rows["time/step"][3] == 20.0
    )
    for others in ([clean | {"arm": "grpo"}], [clean, clean]):
        with pytest.raises(SystemExit, match="one run with clean times of openclaw_rl"):
            retimed([{"arm": "openclaw_rl", "rows": rows}], others)


def searching(arm, seed, factor, last, config="desk", **more):
    values = [0.1, 0.2, last]
    rows = {"step": [0, 1, 2], "time/step": [None, 1.0, 1.0], "eval/avg@4": values}
    return {"arm": arm, "seed": seed, "factor": factor, "status": "finished", "rows": rows, "config": config} | more


def test_the_best_factor_is_chosen_on_the_mean_over_the_seeds_of_the_search():
    grid = {0.3: (0.5, 0.7), 1.0: (0.9, 0.2), 3.0: (0.6, 0.6)}
    runs = [searching("grpo", seed, f, values[seed]) for f, values in grid.items() for seed in (0, 1)]
    runs += [searching("sdpo", 0, f, 0.5) for f in grid]  # its second seed is not through
    runs.append(searching("sdpo", 1, 1.0, 0.9, status="unfinished"))
    choices = comparison_search.choose(runs, [0.3, 1.0, 3.0], [0, 1])
    assert list(choices) == ["grpo"] and choices["grpo"].factor in (0.3, 3.0) and choices["grpo"].at_edge
    assert choices["grpo"].by_factor == {0.3: [0.5, 0.7], 1.0: [0.9, 0.2], 3.0: [0.6, 0.6]}
    level = comparison_search.choose([searching("grpo", 0, f, 0.5) for f in grid], [0.3, 1.0, 3.0], [0])
    assert level["grpo"].factor == 1.0 and not level["grpo"].at_edge  # the nearest to the config's
    text = comparison_search.table(level, LABELS, 3e-4, [7])
    assert "| **50.0** |" in text and "0.0003" in text and "seed 7 (not reported)" in text


def test_every_arm_searches_before_it_is_run_and_the_test_tasks_stay_out_of_it(tmp_path, monkeypatch, capsys):
    """The processes are played here: each leaves what a run would."""
    played = []

    def play(runner, workdir, wanted):
        for facts in wanted:
            run = Run.of(facts)
            played.append((run, facts))
            rate = 0.9 if run.factor == 3.0 else 0.5
            found = summary(run.arm, run.seed) | facts | {"rows": searching(run.arm, 0, 0, rate)["rows"]}
            found |= {"before": None, "after": None} if run.factor else {}
            folder = workdir / run.folder
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps(found))

    monkeypatch.setattr(Runner, "run_all", play)
    monkeypatch.setattr(compare_algorithms, "figures", lambda: None)
    options = [f"--workdir={tmp_path}/runs", f"--out={tmp_path}/table", "--arms=hint_sd,grpo,lr0", "--seeds=0,1"]
    search = ["--search-lr=1,3", "--search-seeds=7"]
    for calls in (1, 2):
        monkeypatch.setattr(sys, "argv", ["compare", *options, *search])
        with pytest.raises(SystemExit) as exit:
            compare_algorithms.main()
        assert exit.value.code == 0 and len(played) == 4 + 5, calls  # nothing is run twice
    searched, reported = played[:4], played[4:]
    assert {run for run, _ in searched} == {Run(arm, 7, f) for arm in ("hint_sd", "grpo") for f in (1.0, 3.0)}
    assert all("eval.test_tasks=0" in facts["overrides"] for _, facts in searched)
    rates = {run.arm: facts["resolved"]["optim.lr"]["value"] for run, facts in reported}
    assert rates == {"hint_sd": pytest.approx(3e-3), "grpo": pytest.approx(3e-3), "lr0": 0.0}
    text = re.sub(" +", " ", (tmp_path / "table.md").read_text())
    assert "| **HINT-SD** | 50.0 | **90.0** | 0.003 | at its edge |" in text
    assert "0.97 (config; the algorithm's own: 0.999)" in text and "# Algorithms side by side: desk" in text
    kept = [Run.of(run) for run in json.loads((tmp_path / "table.json").read_text())["runs"]]
    assert set(kept) == {run for run, _ in played}
    (tmp_path / "elsewhere").mkdir()
    options[0] = f"--workdir={tmp_path}/elsewhere"  # the kept results alone
    monkeypatch.setattr(
        sys,
        "argv",
        ["compare", *options, *search, "--read", f"--collected={tmp_path}/table.json"],
    )
    with pytest.raises(SystemExit) as exit:
        compare_algorithms.main()
    assert exit.value.code == 0 and re.sub(" +", " ", (tmp_path / "table.md").read_text()) == text


def test_a_command_that_is_stopped_in_the_search_starts_nothing_more(tmp_path, monkeypatch):
    """Each process here asks the command to stop as soon as it is looked at."""
    started = []

    class Process:
        def __init__(self, command, **options):
            started.append(command)

        def poll(self):
            os.kill(os.getpid(), signal.SIGTERM)

        def terminate(self):
            pass

        def wait(self):
            return -signal.SIGTERM

    monkeypatch.setattr(comparison_runs.subprocess, "Popen", Process)
    options = [f"--workdir={tmp_path}", "--arms=hint_sd,grpo,lr0", "--search-lr=1,3", "--seeds=0,1"]
    monkeypatch.setattr(sys, "argv", ["compare", *options, f"--collect={tmp_path}/all.json"])
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as exit:
            compare_algorithms.main()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert exit.value.code == 75 and len(started) == 1  # not one of those that need no search either


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--search-seeds=1,5", "seed 1 is reported and searched with"),
        ("--search-lr=1,x", "--search-lr=1,x: give numbers separated by commas"),
        ("--search-lr=0,1", "--search-lr=0,1: give different factors above 0"),
        ("--arms=hint", "--arms: hint is unknown"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(tmp_path, option, message):
    words = ["--search-lr=1", f"--workdir={tmp_path}", option]
    options = compare_algorithms.parser("")
    options.add_argument("--workdir")
    arguments = options.parse_args(words)
    arguments.workdir = tmp_path
    with pytest.raises(SystemExit, match=re.escape(message)):
        compare_algorithms.carry_out(arguments, [], Runner(arguments))


def test_dialogues_are_the_setting_of_the_one_arm_that_reads_them():
    """So that it stands beside arms that were run without them."""
    plain, given = (
        compare_algorithms.parser(None).parse_args(["eval.tasks=9", *more]) for more in ([], ["sft.path=x.jsonl"])
    )
    facts = lambda arguments, arm: compare_algorithms.facts_of(arguments, Run(arm, 0), {})
    assert facts(given, "grpo") == facts(plain, "grpo")
    sft = facts(given, "sft")
    assert sft["settings"] == facts(plain, "grpo")["settings"] and "sft.path=x.jsonl" in sft["overrides"]


@pytest.mark.parametrize("config", ["desk", "textworld", "bfcl_smoke"])
def test_every_arm_is_a_config_of_every_environment(config):
    arms = {
        arm: comparison_settings.settings_of(config, {"sft.path": "x.jsonl"} | dict(o.split("=", 1) for o in overrides))
        for arm, (_, overrides) in compare_algorithms.ARMS.items()
    }
    assert arms["sdpo"]["optim.ema_decay"] == {"value": 0.95}
    assert "optim.ema_decay" not in arms["grpo"] and "hindsight.select" not in arms["grpo"]
    assert arms["grpo"]["loss"] == {"value": "policy_gradient"} and arms["all"]["hindsight.select"]["value"] == "all"
