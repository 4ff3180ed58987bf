"""Typed configs for tests: the shortest run on Desk, with overrides by dotted key."""

from pathlib import Path
from typing import Any

from hintsd_jax.config import base
from hintsd_jax.config.build import build
from hintsd_jax.config.schema import Config
from hintsd_jax.configs import desk_smoke

POLICY = Path(__file__).parents[1] / "assets" / "desk-policy"


# Tasks of two requests: half the steps and shapes of the four that desk_smoke has, for half of the tests' time.
SHORT_TASKS = {
    "env.options.length": 2,
    "env.options.difficulty": 2,
    "rollout.context": 144,
    "rollout.max_steps": 8,
    "rollout.prefill_buckets": (16, 144),
    "hindsight.max_tokens": 56,
    "hindsight.context": 200,
    "batch.length_buckets": (144,),
}


def smoke_config(data_dir: Path, overrides: dict[str, Any] | None = None) -> Config:
    """`configs/desk_smoke.py` with shorter tasks, whose sets are kept in `data_dir`."""
    config = desk_smoke.get_config()
    config.policy.path, config.env.data_dir = str(POLICY), str(data_dir)
    config.update_from_flattened_dict(SHORT_TASKS | (overrides or {}))
    return build(config)


TINY = SHORT_TASKS | {  # four updates on six episodes each
    "tasks.tasks_per_step": 3,
    "tasks.rollouts": 2,
    "rollout.slots": 6,
    "eval.every": 2,
    "eval.tasks": 3,
    "eval.rollouts": 2,
    "eval.test_tasks": 4,
    "optim.steps": 4,
    "checkpoint.every": 1,
}
MIXED = {"tasks.tasks_per_step": 1, "tasks.rollouts": 6, "seed": 4}  # six episodes of a task that do not end alike


def tiny_config(data_dir: Path, overrides: dict[str, Any] | None = None) -> Config:
    return smoke_config(data_dir, TINY | (overrides or {}))


def algorithm_config(name: str, overrides: dict[str, Any] | None = None) -> Config:
    """The default settings with an algorithm; for tests that load no policy."""
    config = base()
    config.policy.path, config.algorithm, config.tasks.rollouts, config.rollout.slots = "policy", name, 2, 4
    config.sft.path = "dialogues.jsonl"
    config.update_from_flattened_dict(overrides or {})
    return build(config)
