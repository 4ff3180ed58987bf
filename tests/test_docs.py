"""The tutorial environment, taken out of the page as it stands there, trains."""

import re
from pathlib import Path

import pytest

from hintsd_jax import train as training
from hintsd_jax.runs.metrics import read_metrics

OPTIMIZED = True  # real rollouts: see conftest.py

REPO = Path(__file__).parents[1]


@pytest.fixture
def tutorial(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (REPO / "docs" / "environments.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) < 60
    (tmp_path / "my_envs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(REPO)


def test_the_tutorial_environment_trains(tutorial, tmp_path):
    namespace = {}
    exec((REPO / "configs" / "desk_smoke.py").read_text(), namespace)
    config = namespace["get_config"]()
    config.env.name = "my_envs:Shredder"
    config.optim.steps = 2
    config.eval.tasks, config.eval.rollouts, config.eval.test_tasks = 2, 1, 0  # of no matter here
    training.train(config, str(tmp_path / "run"))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(row["rollout/ended/terminated"] > 8 for row in rows[1:])  # the embedded policy finds its way
    assert sum(row["hindsight/targets"] for row in rows[1:]) > 0
    assert all(row["train/grad_norm"] > 0 for row in rows[1:])
