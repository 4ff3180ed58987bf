"""Avg@k and Best@k: weights and held-out tasks in, success rates out.

The keys of an evaluation do not depend on the training step, so a policy before and after training plays the same tasks with the
same random numbers: a paired comparison.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from hintsd_jax.episodes.episode import Episode
from hintsd_jax.errors import UserError
from hintsd_jax.runs.checkpoints import Checkpoints
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.session import Session

EVAL_STEP = 2**31 - 1  # no training step ever has this number
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Scores:
    """success_NK: one row a task, one column a rollout, 0 or 1. tokens: sampled. ended: episodes by reason."""

    success_NK: np.ndarray
    tokens: int
    ended: Mapping[str, int]

    @property
    def avg(self) -> float:
        """Avg@k: mean success over all rollouts."""
        return float(self.success_NK.mean())

    @property
    def best(self) -> float:
        """Best@k: share of tasks with any success."""
        return float(self.success_NK.max(axis=1).mean())

    def metrics(self, prefix: str) -> dict[str, float]:
        k = self.success_NK.shape[1]
        return {f"{prefix}/avg@{k}": self.avg, f"{prefix}/best@{k}": self.best}


def score(session: Session, params, tasks: Sequence[Mapping], rollouts: int, greedy: bool = False) -> tuple[Scores, list[Episode]]:
    """Plays every task and scores it. A rollout that never began (its environment failed) counts as a failure.

    Raises:
      UserError: no task at all.
    """
    if not len(tasks):
        raise UserError("an evaluation without tasks: raise eval.tasks or eval.test_tasks")
    episodes, dropped, stats = session.play(params, tasks, rollouts, step=EVAL_STEP, greedy=greedy)
    rows = {task["id"]: n for n, task in enumerate(tasks)}
    success_NK = np.zeros((len(tasks), rollouts))
    ended: dict[str, int] = dict(dropped)
    for episode in episodes:
        success_NK[rows[episode.task_id], episode.rollout] = episode.success
        ended[episode.ended] = ended.get(episode.ended, 0) + 1
    return Scores(success_NK, stats.sampled, ended), episodes


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A policy on held-out tasks. metrics: `<split>/avg@k` and so on; success: per task and rollout; greedy: per task ([] if off)."""

    metrics: dict[str, float]
    success: list[list[int]]
    greedy: list[int]


def held_out(session: Session, params, split: str, count: int) -> HeldOut:
    """Avg@k, Best@k and, if configured, greedy success on the first `count` tasks of a split, with intervals over tasks."""
    config = session.config
    tasks = session.tasks(split)
    tasks = [tasks[n] for n in range(min(count, len(tasks)))]
    sampled, _ = score(session, params, tasks, config.eval.rollouts)
    metrics = sampled.metrics(split) | {f"{split}/tokens": sampled.tokens, f"{split}/tasks": len(tasks)}
    metrics[f"{split}/avg_low"], metrics[f"{split}/avg_high"] = interval(sampled.success_NK.mean(axis=1))
    greedy: list[int] = []
    if config.eval.greedy:
        greedy_scores, _ = score(session, params, tasks, 1, greedy=True)
        metrics[f"{split}/greedy"] = greedy_scores.avg
        greedy = greedy_scores.success_NK[:, 0].astype(int).tolist()
    return HeldOut(metrics, sampled.success_NK.astype(int).tolist(), greedy)


def interval(values_N: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap of the mean over tasks, with a fixed seed."""
    rng = np.random.default_rng(0)
    means = rng.choice(values_N, (RESAMPLES, len(values_N))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def evaluate(config: ConfigDict, workdir: str) -> dict[str, float]:
    """`--mode=evaluate`: the newest checkpoint of the workdir, or the initial policy where it has none, on the test split.

    Writes `evaluation.json` into the workdir (which may be another config's run as far as `eval.` and `mesh.` go) and prints a table.
    """
    session = Session.open(config)
    with Workdir.open(workdir, config, may_differ=("eval.", "mesh.")) as folder:
        params, step = restored_params(session, folder.path / "checkpoints")
        result = held_out(session, params, config.tasks.test_split, config.eval.test_tasks or config.eval.tasks)
        folder.write_text("evaluation.json", json.dumps({"step": step, **dataclasses.asdict(result)}) + "\n")
    print(f"{config.policy.path} after {step} updates, {config.tasks.test_split} split:")
    for name, value in result.metrics.items():
        print(f"  {name:20} {value:.4g}")
    return result.metrics


def restored_params(session: Session, directory: Path) -> tuple[dict, int]:
    """The student's weights in the newest checkpoint of a directory, or the loaded ones, and the number of updates they have had."""
    step = None
    if directory.is_dir():
        checkpoints = Checkpoints(directory, session.config.checkpoint.keep, best=f"eval/avg@{session.config.eval.rollouts}")
        step = checkpoints.latest_step
        if step is not None:
            session.trained = checkpoints.restore_part(step, {"params": session.trained})["params"]
        checkpoints.close()
    return session.weights(session.trained), step or 0
