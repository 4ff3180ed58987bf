"""Benchmarks whose licence keeps their texts private: what records hold of them; and scenario goal completion, which
they are scored by, against counting by hand.
"""

import json

import numpy as np
import pytest

from hintsd_jax import evaluate, records
from hintsd_jax.envs.base import Report
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import Scores
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.privacy import NOTE, Privacy
from hintsd_jax.rollout.chat import Delta
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.played import Rollouts
from hintsd_jax.sampling import SamplingStats
from hintsd_jax.session import Session
from hintsd_jax.tools.report.records import entry
from tests.configs import smoke_config
from tests.test_evaluate import quiz_session

SECRET = "zebra"


class Private:
    private_texts = True
    aggregate_splits = ("test",)


def test_records_hold_hashes_in_place_of_every_text_and_token():
    episode = Episode.begin("abc_1", 2, [{"role": "user", "content": f"{SECRET} one"}], Delta((7, 8, 9), 1))
    step = episode.append_action([4, 5], [-0.1, -0.2], f"{SECRET} two")
    step.problem = "no_code"
    episode.append_observation(None, [{"role": "user", "content": f"{SECRET} three"}], reward=0.5)
    episode.ended, episode.detail, episode.report = "terminated", f"{SECRET} four", Report(f"{SECRET} five", ())
    analysis = Analysis(episode, (Target(1, f"{SECRET} six"),), answer=f"{SECRET} seven", problem=f"{SECRET} eight")
    spans = {0: [{"step": 1, "pieces": [f"{SECRET}", "x"], "teacher_best": ["a", "b"], "divergence": [0.5, 0.25]}]}
    rollouts = Rollouts([episode], {}, SamplingStats())

    class Algorithm:
        config = type("C", (), {"hindsight": type("H", (), dict.fromkeys(("analyser", "select"), "x"))})
        uses_analyser = True

    Algorithm.config.hindsight.feedback_position = "target"
    kept, open_ones = (
        next(records.episode_records(rollouts, Hindsight([analysis]), spans, Algorithm, privacy))
        for privacy in (Privacy.of(Private, "p", False), Privacy.of(Private, "p", True))
    )
    text = json.dumps(kept)
    assert text.count(SECRET) == 0 and json.dumps(open_ones).count(SECRET) == 9
    assert (kept["task_id"], kept["ended"], kept["success"], kept["reward"]) == ("abc_1", "terminated", False, 0.0)
    assert kept["steps"][0]["problem"] == "no_code" and kept["steps"][0]["reward"] == 0.5
    assert kept["trained"][0]["divergence"] == [0.5, 0.25] and kept["trained"][0]["pieces"] == ["·", "·"]
    assert kept["hindsight"]["targets"][0]["step"] == 1
    assert len(kept["streams"]) == 1 and kept["streams"][0].endswith(", 5 tokens")
    assert kept["steps"][0]["text"].startswith("sha256:") and kept["steps"][0]["text"].endswith(", 9 characters")
    assert kept["prompt_messages"][0] == {"role": "note", "content": NOTE}
    assert entry(kept)["prompt"][0]["content"] == NOTE  # so the page says why
    assert open_ones["streams"] == [[7, 8, 9, 4, 5]] and len(open_ones["prompt_messages"]) == 1
    assert Privacy.of(object, "p", False).record(open_ones) is open_ones


def test_what_a_class_says_of_itself_is_checked():
    assert Privacy.of(object, "e", False) == Privacy()
    for wrong in ({"private_texts": 1}, {"aggregate_splits": "test"}, {"aggregate_splits": (1,)}):
        with pytest.raises(UserError, match="private_texts must be a bool"):
            Privacy.of(type("E", (), wrong), "e", False)
    with pytest.raises(UserError, match=r"tasks\.train_split = test: .* train on another"):
        Privacy.of(Private, "e", True).check_training("test")
    Privacy.of(Private, "e", True).check_training("train")


def test_scenario_goal_completion_by_hand():
    """Scenario a: in rollout 1 both tasks succeed, in rollout 2 one of them: 1/2. b: never: 0. c was not played."""
    nan = np.nan
    success_NK = np.array([[1, 1], [1, 0], [0, 1], [1, 0], [nan, 1], [1, nan], [1, 1]])
    scores = Scores(success_NK, 0, {}, scenarios=("a", "a", "b", "b", "c", "c", ""))
    metrics = scores.metrics("dev")
    assert metrics["dev/sgc@2"] == 0.25 and metrics["dev/scenarios"] == 2
    bounds = scores.intervals("dev")
    assert bounds["dev/sgc_low"] == 0.0 and bounds["dev/sgc_high"] == 0.5
    parts = Scores(success_NK, 0, {}, ("x", "x", "y", "y", "x", "y", "y"), {}, scores.scenarios).metrics("dev")
    assert parts["dev/x/sgc@2"] == np.mean([0.5, 1]) and parts["dev/y/sgc@2"] == np.mean([0, 1])
    assert "dev/sgc@2" not in Scores(success_NK, 0, {}).metrics("dev")


TASKS = [
    {"id": f"{name}_{n}", "scenario": name, "scenario_size": 3, "category": f"difficulty_{1 + (name > 'm')}"}
    for name in ("aaa", "fff", "ppp", "zzz")
    for n in range(3)
]


def test_evaluate_prints_goal_completions_and_keeps_nothing_by_task(tmp_path, monkeypatch, capsys):
    config = smoke_config(tmp_path / "data", {"eval.test_tasks": 12})
    monkeypatch.setattr(evaluate, "restored_params", lambda session, workdir: (None, 3))
    opened = lambda config, workdir: quiz_session(config, TASKS[:11], env_class=Private)  # of zzz a task is missing
    monkeypatch.setattr(Session, "open", opened)
    metrics = evaluate.evaluate(config, str(tmp_path / "run")).metrics
    assert metrics["test/scenarios"] == 3 and 0 <= metrics["test/sgc@4"] <= metrics["test/avg@4"]
    printed = capsys.readouterr().out
    for line in ("test TGC (Avg@4)", "test SGC", "test difficulty_1 SGC", "test difficulty_2 TGC (Avg@4)"):
        (found,) = [each for each in printed.splitlines() if each.split("  ")[1:2] == [line]]
        assert " to " in found, found
    assert "not kept: of this split only results as a whole are allowed" in printed
    stored = (tmp_path / "run" / "evaluation.json").read_text()
    assert json.loads(stored)["success"] == [] and "categories" not in json.loads(stored)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(task["id"] in path.read_text(errors="replace") for path in files for task in TASKS)
    assert not (tmp_path / "run" / "episodes").exists()
