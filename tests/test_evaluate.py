"""Avg@k, Best@k and their intervals, also by category, against counting by hand; and `--mode=evaluate` on the embedded
policy.
"""

import json
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from hintsd_jax import evaluate, records
from hintsd_jax.config import build
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import Scores
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.played import Rollouts
from hintsd_jax.sampling import SamplingStats
from hintsd_jax.session import Session
from hintsd_jax.tools.report.gather import gather
from hintsd_jax.tools.report.reading import open_runs
from tests.configs import smoke_config

LONG = True  # see conftest.py; so few rollouts that compiling is most of it


def test_avg_and_best_by_hand():
    scores = Scores(np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), tokens=5, ended={})
    assert scores.metrics("eval") == {"eval/avg@4": pytest.approx(5 / 12), "eval/best@4": pytest.approx(2 / 3)}


def test_what_was_not_played_is_neither_right_nor_wrong():
    """Of three tasks one was never played, and one half: Avg@2 is the mean of 1 and 1/2, over two tasks."""
    nan, lost = np.nan, {"env_error": 2, "env_timeout": 1}
    scores = Scores(np.array([[1, nan], [nan, nan], [1, 0]]), 5, {}, ("a", "b", "a"), lost)
    metrics = scores.metrics("test") | {"test/tasks": 3, "test/greedy_lost/env_died": 1}
    assert metrics["test/avg@2"] == metrics["test/a/avg@2"] == 0.75 and "test/b/avg@2" not in metrics
    assert scores.intervals("test")["test/avg_low"] == 0.5 and scores.to_json() == [[1, None], [None, None], [1, 0]]
    assert records.not_played(metrics, "test") == (
        "2 env_error, 1 env_timeout, and 1 greedy ones; rates are over 2 of 3 tasks"
    )
    rows = records.success_results({"test/avg@2": 0.5}, metrics, "test", 2)
    assert rows[0].cells() == ("test Avg@2", "50.0", rows[0].cells()[2], "")  # other episodes: no change is claimed
    assert records.success_results({"test/avg@2": 0.5}, {"test/avg@2": 0.75}, "test", 2)[0].cells()[3] == "+25.0"
    nothing = Scores(np.full((2, 2), nan), 0, {}, lost=lost)
    assert nothing.metrics("x") == {"x/tasks_played": 0, "x/lost/env_error": 2, "x/lost/env_timeout": 1}
    assert nothing.intervals("x") == {} and records.not_played({"test/tasks": 3, "test/avg@2": 0.0}, "test") == ""


class Quiz:
    """Knows nothing: a session stands in for engine and environment below."""

    version = "quiz 7"


def answers_of(tasks, rollouts, greedy):
    """Who answers what: by a generator of its own, more often right in "easy"."""
    rng = np.random.default_rng(11 + greedy)
    return (
        rng.random((len(tasks), rollouts)) < [[0.5 if task.get("category") == "easy" else 0.2] for task in tasks]
    ).astype(int)


def quiz_session(config, tasks, env_class=Quiz):
    """A session whose episodes end as `answers_of` says, in reversed order."""

    def play(params, tasks, rollouts, *, step, greedy, journal):
        success = answers_of(tasks, rollouts, greedy)
        episodes = [
            Episode(
                task["id"], rollout, (), terminated=True, reward=float(success[n, rollout]), ended="terminated", group=n
            )
            for n, task in enumerate(tasks)
            for rollout in range(rollouts)
        ]
        return Rollouts(episodes[::-1], Counter(), SamplingStats(sampled_tokens=7))

    chat = SimpleNamespace(deviation=None, adaptation="it lists no tools")
    session = Session(config, build.algorithm(config), None, None, None, None, chat, None, env_class)
    session.play, session.tasks = play, lambda split, limit: tasks[:limit]
    return session


TASKS = [{"id": f"t{n}", "category": "easy" if n % 3 else "hard"} for n in range(60)]


def test_categories_are_scored_apart_with_intervals(tmp_path):
    session = quiz_session(smoke_config(tmp_path, {"eval.greedy": True}), TASKS)
    result = evaluate.held_out(session, None, "test", 50)
    success_NK, greedy_N = answers_of(TASKS[:50], 4, False), answers_of(TASKS[:50], 1, True)[:, 0]
    assert result.success == success_NK.tolist() and result.greedy == greedy_N.tolist()
    hard_N = np.arange(50) % 3 == 0
    groups = {"test": np.ones(50, bool), "test/easy": ~hard_N, "test/hard": hard_N}
    for name, rows in groups.items():
        mean_N, any_N = success_NK[rows].sum(axis=1) / 4, (success_NK[rows].sum(axis=1) > 0) * 1.0
        assert result.metrics[f"{name}/avg@4"] == pytest.approx(mean_N.mean()) and result.metrics[
            f"{name}/best@4"
        ] == pytest.approx(any_N.mean())
        assert (
            result.metrics[f"{name}/greedy"] == pytest.approx(greedy_N[rows].mean())
            and result.metrics[f"{name}/tasks"] == rows.sum()
        )
        for kind, values in (("avg", mean_N), ("best", any_N)):  # half a width of the normal approximation
            half = 1.96 * values.std() / np.sqrt(len(values))
            assert result.metrics[f"{name}/{kind}_low"] == pytest.approx(values.mean() - half, abs=0.05)
            assert result.metrics[f"{name}/{kind}_high"] == pytest.approx(values.mean() + half, abs=0.05)
            assert result.metrics[f"{name}/{kind}_low"] < result.metrics[f"{name}/{kind}_high"]
    record = json.loads(json.dumps(result.to_json()))
    assert record["categories"] == [task["category"] for task in TASKS[:50]] and record["benchmark"] == "quiz 7"
    markdown = records.result_tables(session, {"seconds": 1.0, "tokens": 1}, {}, result.metrics)[1]
    lines = [" ".join(line.split()) for line in markdown.splitlines()]
    best, low, high = (100 * result.metrics[f"test/hard/best{end}"] for end in ("@4", "_low", "_high"))
    assert f"| test hard Best@4 | - | {best:.1f} ({low:.1f} to {high:.1f}) | |" in lines
    names = [
        f"| {part} {kind}" for part in ("test", "test easy", "test hard") for kind in ("Avg@4", "Best@4", "greedy")
    ]
    assert [line.split(" | ")[0] for line in lines[2:11]] == names
    assert "- benchmark: quiz 7" in lines


def test_without_categories_and_version_nothing_is_added(tmp_path):
    config = smoke_config(tmp_path, {"eval.greedy": True})
    session = quiz_session(config, [{"id": task["id"]} for task in TASKS], env_class=object)
    result = evaluate.held_out(session, None, "test", 60)
    assert sorted(result.metrics) == sorted(
        f"test/{name}" for name in ("avg@4", "best@4", "tokens", "tasks", "avg_low", "avg_high", "greedy")
    )
    assert sorted(result.to_json()) == ["greedy", "metrics", "success"]
    text = records.result_tables(session, {"seconds": 1.0, "tokens": 1}, {}, result.metrics)[1]
    assert " to " not in text and "benchmark" not in text and text.count("| test ") == 3


def test_evaluate_writes_and_prints_categories_and_the_benchmarks_version(tmp_path, monkeypatch, capsys):
    config = smoke_config(
        tmp_path / "data", {"policy.path": "checkpoints/p", "eval.test_tasks": 60, "eval.greedy": True}
    )
    monkeypatch.setattr(Session, "open", lambda config, workdir: quiz_session(config, TASKS))
    monkeypatch.setattr(evaluate, "restored_params", lambda session, workdir: (None, 3))
    metrics = evaluate.evaluate(config, str(tmp_path / "run")).metrics
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (
        stored["metrics"] == metrics
        and stored["benchmark"] == "quiz 7"
        and stored["categories"] == [task["category"] for task in TASKS]
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["versions"][0]["benchmark"] == "quiz 7"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "checkpoints/p after 3 updates, test split of quiz 7:"
    assert lines[1] == "the chat template: it lists no tools" and not any("test/easy" in line for line in lines)
    kept = tmp_path / "run" / "episodes" / "evaluation_000003.jsonl"
    assert lines[-1] == f"episodes: {kept} (240 terminated)"
    episodes = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(episodes) == 240 and sum(record["reward"] for record in episodes) == np.sum(stored["success"])
    rate, low, high = (100 * metrics[f"test/easy/avg{end}"] for end in ("@4", "_low", "_high"))
    assert ["test", "easy", "Avg@4", f"{rate:.1f}", f"({low:.1f}", "to", f"{high:.1f})"] in [
        line.split() for line in lines
    ]


def test_evaluate_scores_the_initial_policy_where_there_is_no_checkpoint(tmp_path, capsys):
    overrides = {"rollout.slots": 6, "eval.rollouts": 2, "eval.test_tasks": 3, "eval.greedy": True}
    config = smoke_config(tmp_path / "data", overrides)
    first = evaluate.evaluate(config, str(tmp_path / "run"))
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert stored["step"] == 0 and np.shape(stored["success"]) == (3, 2) and len(stored["greedy"]) == 3
    assert first.metrics["test/avg@2"] == pytest.approx(np.mean(stored["success"]))
    assert first == evaluate.evaluate(config, str(tmp_path / "run"))  # the same keys, the same result
    assert "test/avg@2" in capsys.readouterr().out
    (run,) = open_runs([tmp_path / "run"])  # the report shows what was evaluated where nothing was trained
    assert [file.path.name for file in run.episodes] == ["evaluation_000000.jsonl"]
    assert gather([run], most=100).overview["runs"][0]["episodes"] == 6
    assert sorted(os.listdir(tmp_path / "run"))[:1] != ["checkpoints"]
    with pytest.raises(UserError, match="belongs to another config: optim.lr"):
        evaluate.evaluate(smoke_config(tmp_path / "data", {**overrides, "optim.lr": 1.0}), str(tmp_path / "run"))
