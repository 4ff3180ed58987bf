"""Avg@k, Best@k and their interval, against counting by hand; and `--mode=evaluate` on the embedded policy."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from hintsd_jax import evaluate
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import Scores, interval

OPTIMIZED = True  # real rollouts: see conftest.py


def test_avg_and_best_by_hand():
    scores = Scores(np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), tokens=5, ended={})
    assert scores.avg == pytest.approx(5 / 12) and scores.best == pytest.approx(2 / 3)
    assert scores.metrics("eval") == {"eval/avg@4": pytest.approx(5 / 12), "eval/best@4": pytest.approx(2 / 3)}


def test_the_interval_is_that_of_the_normal_approximation():
    values_N = np.random.default_rng(0).random(400)
    low, high = interval(values_N)
    half = 1.96 * values_N.std() / np.sqrt(400)
    assert (low, high) == (pytest.approx(values_N.mean() - half, abs=0.004), pytest.approx(values_N.mean() + half, abs=0.004))
    assert interval(np.ones(10)) == (1.0, 1.0)


def test_evaluate_scores_the_initial_policy_where_there_is_no_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    namespace = {}
    exec(Path("configs/desk_smoke.py").read_text(), namespace)
    config = namespace["get_config"]()
    config.env.data_dir = str(tmp_path / "data")
    config.tasks.tasks_per_step, config.tasks.rollouts, config.rollout.slots = 3, 2, 6
    config.eval.rollouts, config.eval.test_tasks, config.eval.greedy = 2, 6, True
    first = evaluate.evaluate(config, str(tmp_path / "run"))
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert stored["step"] == 0 and np.shape(stored["success"]) == (6, 2) and len(stored["greedy"]) == 6
    assert first["test/avg@2"] == pytest.approx(np.mean(stored["success"]))
    assert first == evaluate.evaluate(config, str(tmp_path / "run"))  # the same keys, the same result
    assert "test/avg@2" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "run"))[:1] != ["checkpoints"]
    config.optim.lr = 1.0
    with pytest.raises(UserError, match="belongs to another config: optim.lr"):
        evaluate.evaluate(config, str(tmp_path / "run"))
