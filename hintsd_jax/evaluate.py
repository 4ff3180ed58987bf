# SPDX-License-Identifier: Apache-2.0

"""Avg@k and Best@k: weights and held-out tasks in, success rates out; for each category too, where tasks carry one.

The keys of an evaluation do not depend on the training step, so a policy before and after training plays the same tasks
with the same random numbers: a paired comparison.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.records import episode_records, success_results
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.runs.journal import Journal
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.session import Session
from hintsd_jax.statistics import interval

EVAL_STEP = 2**31 - 1  # no training step ever has this number


@dataclasses.dataclass(frozen=True)
class Scores:
    """success_NK: one row a task, one column a rollout, 0 or 1. tokens: sampled. ended: episodes by reason. categories:
    one a task, "" for a task without; () where no task has one.
    """

    success_NK: np.ndarray
    tokens: int
    ended: Mapping[str, int]
    categories: tuple[str, ...] = ()

    @property
    def avg(self) -> float:
        """Avg@k: mean success over all rollouts."""
        return float(self.success_NK.mean())

    @property
    def best(self) -> float:
        """Best@k: share of tasks with any success."""
        return float(self.success_NK.max(axis=1).mean())

    @property
    def by_category(self) -> dict[str, Scores]:
        """The scores of each category's tasks, in the names' order; `tokens` and `ended` are not told apart."""
        names = np.array(self.categories)
        return {name: Scores(self.success_NK[names == name], 0, {}) for name in sorted(set(self.categories) - {""})}

    def metrics(self, prefix: str) -> dict[str, float]:
        """`prefix/avg@k` and `prefix/best@k`, and `prefix/<category>/avg@k` and so on."""
        k = self.success_NK.shape[1]
        rates = {f"{prefix}/avg@{k}": self.avg, f"{prefix}/best@{k}": self.best}
        for name, scores in self.by_category.items():
            rates |= scores.metrics(f"{prefix}/{name}")
        return rates

    def intervals(self, prefix: str) -> dict[str, float]:
        """`prefix/avg_low` and `prefix/avg_high`; where tasks have categories, Best@k's too, and those of each
        category.
        """
        bounds = _bounds(f"{prefix}/avg", self.success_NK.mean(axis=1))
        if self.categories:
            bounds |= _bounds(f"{prefix}/best", self.success_NK.max(axis=1))
        for name, scores in self.by_category.items():
            bounds |= _bounds(f"{prefix}/{name}/avg", scores.success_NK.mean(axis=1))
            bounds |= _bounds(f"{prefix}/{name}/best", scores.success_NK.max(axis=1))
        return bounds


def score(
    session: Session,
    params: dict,
    tasks: Sequence[Mapping],
    rollouts: int,
    *,
    greedy: bool = False,
    journal: Journal | None = None,
) -> tuple[Scores, list[Episode]]:
    """Plays every task and scores it. A rollout that never began (its environment failed) counts as a failure.

    Raises:
      UserError: no task at all.
    """
    if not len(tasks):
        raise UserError("an evaluation without tasks: raise eval.tasks or eval.test_tasks")
    played = session.play(params, tasks, rollouts, step=EVAL_STEP, greedy=greedy, journal=journal)
    episodes, stats = played.episodes, played.stats
    success_NK, ended = np.zeros((len(tasks), rollouts)), Counter(played.dropped)
    for episode in episodes:
        success_NK[episode.group, episode.rollout] = episode.success
        ended[episode.ended] += 1
    categories = tuple(str(task.get("category", "")) for task in tasks)
    return Scores(success_NK, stats.sampled_tokens, ended, categories if any(categories) else ()), episodes


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A policy on held-out tasks. metrics: `<split>/avg@k` and so on; success: per task and rollout; greedy: per task
    ([] if off). categories: per task ([] where there are none); benchmark: its version ("" where the environment names
    none).
    """

    metrics: dict[str, float]
    success: list[list[int]]
    greedy: list[int]
    categories: list[str]
    benchmark: str

    def to_json(self) -> dict[str, Any]:
        """The record of it; without `categories` and `benchmark` where there are none."""
        optional = ("categories", "benchmark")
        return {name: value for name, value in dataclasses.asdict(self).items() if value or name not in optional}


def held_out(
    session: Session,
    params: dict,
    split: str,
    count: int,
    journal: Journal | None = None,
    keep: Callable[[Scores, Sequence[Episode]], None] | None = None,
) -> HeldOut:
    """Avg@k, Best@k and, if configured, greedy success on the first `count` tasks of a split, with intervals over
    tasks. keep: gets the sampled episodes with their scores.
    """
    config, tasks = session.config, session.tasks(split, count)
    sampled, episodes = score(session, params, tasks, config.eval.rollouts, journal=journal)
    if keep is not None:
        keep(sampled, episodes)
    metrics = sampled.metrics(split) | {f"{split}/tokens": sampled.tokens, f"{split}/tasks": len(tasks)}
    metrics |= sampled.intervals(split)
    metrics |= {f"{split}/{name}/tasks": len(scores.success_NK) for name, scores in sampled.by_category.items()}
    greedy: list[int] = []
    if config.eval.greedy:
        scores, _ = score(session, params, tasks, 1, greedy=True, journal=journal)
        metrics[f"{split}/greedy"] = scores.avg
        metrics |= {f"{split}/{name}/greedy": part.avg for name, part in scores.by_category.items()}
        greedy = scores.success_NK[:, 0].astype(int).tolist()
    return HeldOut(
        metrics, sampled.success_NK.astype(int).tolist(), greedy, list(sampled.categories), session.benchmark
    )


def held_out_test(session: Session, params: dict, journal: Journal | None = None) -> HeldOut | None:
    """The result on the test tasks of the config; None where it asks for none."""
    config = session.config
    if not config.eval.test_tasks:
        return None
    return held_out(session, params, config.tasks.test_split, config.eval.test_tasks, journal)


def validation(session: Session, params: dict, tasks: Sequence[Mapping], journal: Journal | None) -> dict[str, float]:
    """The metrics of an evaluation while training."""
    return score(session, params, tasks, session.config.eval.rollouts, journal=journal)[0].metrics("eval")


def _bounds(name: str, values_N: np.ndarray) -> dict[str, float]:
    low, high = interval(values_N)
    return {f"{name}_low": low, f"{name}_high": high}


def evaluate(config: Config, workdir: str) -> dict[str, float]:
    """`--mode=evaluate`: the newest checkpoint of the workdir, or the initial policy where it has none, on the test
    split.

    Writes `evaluation.json` and the sampled episodes into the workdir (which may be another config's run as far as
    `eval.` and `mesh.` go) and prints a table.
    """
    session = Session.open(config)
    with Workdir.open(workdir, config, may_differ=("eval.", "mesh."), benchmark=session.benchmark) as folder:
        params, step = restored_params(session, folder.path)
        count, lines = config.eval.test_tasks or config.eval.tasks, []

        def keep(scores: Scores, episodes: Sequence[Episode]) -> None:
            kept = episode_records(episodes, Hindsight(), {}, session.algorithm)
            path = folder.write_episodes(step, kept, kind="evaluation")
            ended = ", ".join(f"{number} {reason}" for reason, number in sorted(scores.ended.items()))
            lines.append(f"episodes: {path} ({ended})")

        result = held_out(session, params, config.tasks.test_split, count, keep=keep)
        folder.write_text("evaluation.json", json.dumps({"step": step, **result.to_json()}) + "\n")
    split, benchmark = config.tasks.test_split, f" of {result.benchmark}" if result.benchmark else ""
    print(f"{config.policy.path} after {step} updates, {split} split{benchmark}:", *session.chat_notes, sep="\n")
    for name, value in result.metrics.items():
        if "/" not in name.removeprefix(f"{split}/"):
            print(f"  {name:20} {value:.4g}")
    if result.categories:
        print("success, %, with 95 % intervals over tasks:")
        for line in success_results({}, result.metrics, split, config.eval.rollouts):
            print(f"  {line.name:40} {line.cells()[2]}")
    print(*lines, sep="\n")
    return result.metrics


def restored_params(session: Session, workdir: Path) -> tuple[dict, int]:
    """The student's weights in the newest checkpoint of a workdir, or the loaded ones, and the number of updates they
    have had.
    """
    step, trained = None, session.trained
    if (workdir / "checkpoints").is_dir():
        checkpoints = Checkpoints.open(workdir, session.config)
        step = checkpoints.latest_step
        if step is not None:
            trained = session.trained = checkpoints.restore_part(step, {"params": session.trained})["params"]
        checkpoints.close()
    return session.weights(trained), step or 0
