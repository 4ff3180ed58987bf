"""What CONTRIBUTING.md says of adding things, done from outside of the package: in one run an environment, an
algorithm, a part of a loss and a selector, and a model family.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from hintsd_jax.algorithms.hint_sd import HintSD
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.models import decoder
from hintsd_jax.models.families import FAMILIES
from hintsd_jax.runs.metrics import read_metrics
from hintsd_jax.train import train
from hintsd_jax.training.loss_parts import LossPart, TokenLosses
from tests.configs import smoke_config

LONG = True  # see conftest.py
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyBonus(LossPart):
    """Keeps the student's distribution wide on the targets."""

    name: ClassVar[str] = "entropy_bonus"
    reports: ClassVar[tuple[str, ...]] = ("target_entropy",)

    def token_losses(self, tokens):
        entropy_X = -jnp.sum(jnp.exp(tokens.student_XV) * tokens.student_XV, axis=-1)
        return TokenLosses(-entropy_X, {"target_entropy": entropy_X})


class WideHintSD(HintSD):
    """HINT-SD with that part on the first target of every episode."""

    def loss_parts(self):
        return (*super().loss_parts(), EntropyBonus(coefficient=0.5))

    def branches(self, episode, experience):
        branches = super().branches(episode, experience)
        first = [dataclasses.replace(b, weights={**b.weights, "entropy_bonus": 1.0}) for b in branches[:1]]
        return first + branches[1:]


def last_two(episode, key, max_targets):
    """Who names the steps: nobody, it is always the last two."""
    return list(range(1, len(episode.steps) + 1))[-2:]


def test_an_environment_an_algorithm_a_loss_part_and_a_selector(tmp_path, monkeypatch):
    """The environment is that of docs/environments.md, as it stands there."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "environments.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) < 32
    (tmp_path / "my_envs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = {
        "env.name": "my_envs:Shredder",
        "env.options": {},
        "algorithm": "tests.test_extending:WideHintSD",
        "hindsight.select": "tests.test_extending:last_two",
        "tasks.tasks_per_step": 32,  # as only few of its reviews can be read here
        "optim.steps": 2,
        "eval.tasks": 2,
        "eval.rollouts": 1,
        "eval.test_tasks": 0,
    }
    config = smoke_config(tmp_path / "data", overrides)
    train(config, str(tmp_path / "run"))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert all(row["rollout/ended/terminated"] > 8 for row in rows)  # the embedded policy finds its way
    assert all(row["train/grad_norm"] > 0 for row in rows) and sum(row["hindsight/targets"] for row in rows) > 0
    for row in rows:
        assert 0 < row["train/entropy_bonus_tokens"] < row["train/divergence_tokens"] == row["train/tokens"]
        # the loss is the sum of the parts' means, each over its own tokens
        assert row["train/loss"] == np.float32(
            row["train/divergence"] - 0.5 * row["train/target_entropy"]
        ) or np.isclose(row["train/loss"], row["train/divergence"] - 0.5 * row["train/target_entropy"], rtol=1e-5)
    for line in (tmp_path / "run" / "episodes" / "step_000001.jsonl").read_text().splitlines():
        episode = json.loads(line)
        steps = len(episode["steps"])
        targets = (episode["hindsight"] or {"targets": []})["targets"]
        assert {target["step"] for target in targets} <= {steps - 1, steps}


def test_a_dense_model_family(tmp_path, monkeypatch):
    """A model that is Llama's decoder under another name: a row in the table is all."""
    folder = shutil.copytree(ROOT / "tests" / "fixtures" / "llama_tiny_tied", tmp_path / "other")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"architectures": ["OtherForCausalLM"], "model_type": "other"}))
    row = dataclasses.replace if dataclasses.is_dataclass(FAMILIES["llama"]) else type(FAMILIES["llama"])._replace
    family = row(FAMILIES["llama"], architecture="OtherForCausalLM", model_type="other")
    monkeypatch.setitem(FAMILIES, "other", family)
    expected = dict(np.load(folder / "expected.npz"))
    config, params = load_policy(folder)
    assert config.family == "other" and config.to_hf()["architectures"] == ["OtherForCausalLM"]
    length = expected["lengths"].max()
    row_T = expected["input_ids"][expected["lengths"].argmax()]
    logits_TV = jax.jit(lambda p, ids: decoder.project(p, config, decoder.forward(p, config, ids)))(
        params, row_T[None]
    )[0]
    np.testing.assert_allclose(
        logits_TV[-length:], expected["logits"][expected["lengths"].argmax()][-length:], atol=1e-5
    )
