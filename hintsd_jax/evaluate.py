# SPDX-License-Identifier: Apache-2.0

"""Avg@k and Best@k: weights and held-out tasks in, success rates out; for each category too, where tasks carry one.

Where tasks carry a scenario, Avg@k is what AppWorld calls task goal completion, and there is its scenario goal
completion: the share of scenarios whose tasks all succeed, in the mean over rollouts.

Invariant 8: an episode that its environment's failure kept from being played is no failure of the policy. A task is
scored by its episodes that were played, one without any is not scored at all, and both are counted and said.

The keys of an evaluation do not depend on the training step, so a policy before and after training plays the same tasks
with the same random numbers: a paired comparison.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hintsd_jax import processes
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.config import continuing
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.fork import forked_params
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.models.finite import non_finite
from hintsd_jax.records import episode_records, not_played, success_results
from hintsd_jax.results import EvaluationResult
from hintsd_jax.rollout.played import PROMPT_TOO_LONG, Rollouts
from hintsd_jax.runs.journal import Journal
from hintsd_jax.runs.progress import Progress
from hintsd_jax.runs.watch import FAILURES, Watch
from hintsd_jax.session import Session, open_workdir
from hintsd_jax.statistics import interval
from hintsd_jax.storage import AnyPath, is_folder

EVAL_STEP = 2**31 - 1  # no training step ever has this number


@dataclasses.dataclass(frozen=True)
class Scores:
    """success_NK: one row a task, one column a rollout: 0, 1, or NaN where its environment failed. tokens: sampled.
    ended: episodes by reason, those that were not played too. categories: one a task, "" for a task without; () where
    no task has one. lost: episodes by the failure of their environment. scenarios: one a task, "" for one whose
    scenario is not here as a whole; () where no task has one.
    """

    success_NK: np.ndarray
    tokens: int
    ended: Mapping[str, int]
    categories: tuple[str, ...] = ()
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)
    scenarios: tuple[str, ...] = ()

    @property
    def played_N(self) -> np.ndarray:
        """Tasks of which at least one episode was played: bool."""
        return np.asarray(np.isfinite(self.success_NK).any(axis=1))

    @property
    def avg_N(self) -> np.ndarray:
        """Mean success of each played task."""
        return np.nanmean(self.success_NK[self.played_N], axis=1)

    @property
    def best_N(self) -> np.ndarray:
        """Whether there was any success, of each played task."""
        return np.nanmax(self.success_NK[self.played_N], axis=1)

    @property
    def by_category(self) -> dict[str, Scores]:
        """The scores of each category's tasks, in the names' order; but for `success_NK` nothing is told apart."""
        parts = {}
        for name in sorted(set(self.categories) - {""}):
            chosen_N = np.array(self.categories) == name
            scenarios = tuple(each for each, chosen in zip(self.scenarios, chosen_N) if chosen)
            parts[name] = Scores(self.success_NK[chosen_N], 0, {}, scenarios=scenarios)
        return parts

    @property
    def scenario_S(self) -> np.ndarray:
        """Of each scenario the share of rollouts in which all its tasks succeeded, among those in which all of them
        were played; scenarios without such a rollout are left out.
        """
        names, shares = np.array(self.scenarios), []
        for name in sorted(set(self.scenarios) - {""}):
            all_K = self.success_NK[names == name].min(axis=0)  # NaN where one was not played
            if np.isfinite(all_K).any():
                shares.append(np.nanmean(all_K))
        return np.array(shares)

    def metrics(self, prefix: str) -> dict[str, float]:
        """`prefix/avg@k`, mean success, and `prefix/best@k`, the share of tasks with any, over the tasks that were
        played (absent without any); `prefix/sgc@k` and `prefix/scenarios`, scenario goal completion and over how many;
        `prefix/<category>/avg@k` and so on; `prefix/tasks_played` and `prefix/lost/<reason>` where something was not
        played.
        """
        k, rates = self.success_NK.shape[1], {}
        if self.played_N.any():
            rates = {f"{prefix}/avg@{k}": float(self.avg_N.mean()), f"{prefix}/best@{k}": float(self.best_N.mean())}
        if len(scenario_S := self.scenario_S):
            rates |= {f"{prefix}/sgc@{k}": float(scenario_S.mean()), f"{prefix}/scenarios": len(scenario_S)}
        if self.lost:
            rates[f"{prefix}/tasks_played"] = int(self.played_N.sum())
            rates |= {f"{prefix}/lost/{reason}": number for reason, number in sorted(self.lost.items())}
        for name, scores in self.by_category.items():
            rates |= scores.metrics(f"{prefix}/{name}")
        return rates

    def intervals(self, prefix: str) -> dict[str, float]:
        """`prefix/avg_low` and `prefix/avg_high`; where tasks have categories, Best@k's too, and those of each
        category; `prefix/sgc_low` and `prefix/sgc_high`, over scenarios.
        """
        bounds = _bounds(f"{prefix}/avg", self.avg_N) | _bounds(f"{prefix}/sgc", self.scenario_S)
        if self.categories:
            bounds |= _bounds(f"{prefix}/best", self.best_N)
        for name, scores in self.by_category.items():
            bounds |= _bounds(f"{prefix}/{name}/avg", scores.avg_N)
            bounds |= _bounds(f"{prefix}/{name}/best", scores.best_N)
            bounds |= _bounds(f"{prefix}/{name}/sgc", scores.scenario_S)
        return bounds

    def to_json(self) -> list[list[int | None]]:
        """`success_NK`; None where the environment failed."""
        return [[None if np.isnan(value) else int(value) for value in row] for row in self.success_NK]


def score(
    session: Session,
    params: dict,
    tasks: Sequence[Mapping],
    rollouts: int,
    *,
    greedy: bool = False,
    journal: Journal | None = None,
) -> tuple[Scores, Rollouts]:
    """Plays every task and scores it. A prompt that does not fit the context counts as a failure.

    Raises:
      UserError: no task at all.
    """
    if not len(tasks):
        raise UserError("an evaluation without tasks: raise eval.tasks or eval.test_tasks")
    played = session.play(params, tasks, rollouts, step=EVAL_STEP, greedy=greedy, journal=journal)
    success_NK, ended = np.full((len(tasks), rollouts), np.nan), Counter(played.dropped)
    for n, task in enumerate(tasks):
        if task["id"] in played.too_long:
            success_NK[n] = 0
    for episode in played.episodes:
        success_NK[episode.group, episode.rollout] = episode.success
        ended[episode.ended] += 1
    categories = tuple(str(task.get("category", "")) for task in tasks)
    lost = {reason: number for reason, number in played.dropped.items() if reason != PROMPT_TOO_LONG}
    categories = categories if any(categories) else ()
    return Scores(success_NK, played.stats.sampled_tokens, ended, categories, lost, _whole_scenarios(tasks)), played


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A policy on held-out tasks. metrics: `<split>/avg@k` and so on; success: per task and rollout; greedy: per task
    ([] if off); None in both where the environment failed. categories: per task ([] where there are none). All three
    are [] on a split of which the benchmark allows results as a whole only. benchmark: its version ("" where the
    environment names none).
    """

    metrics: dict[str, float]
    success: list[list[int | None]]
    greedy: list[int | None]
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
    keep: Callable[[Scores, Rollouts], None] | None = None,
) -> HeldOut:
    """Avg@k, Best@k and, if configured, greedy success on the first `count` tasks of a split, with intervals over
    tasks alone: of one run, whose seed nobody has varied. keep: gets the sampled episodes with their scores.
    """
    config, tasks = session.config, session.tasks(split, count)
    sampled, played = score(session, params, tasks, config.eval.rollouts, journal=journal)
    if keep is not None:
        keep(sampled, played)
    metrics = sampled.metrics(split) | {f"{split}/tokens": sampled.tokens, f"{split}/tasks": len(tasks)}
    metrics |= sampled.intervals(split)
    metrics |= {f"{split}/{name}/tasks": len(scores.success_NK) for name, scores in sampled.by_category.items()}
    greedy: list[int | None] = []
    if config.eval.greedy:
        scores, _ = score(session, params, tasks, 1, greedy=True, journal=journal)
        if scores.played_N.any():
            metrics[f"{split}/greedy"] = float(scores.avg_N.mean())
        parts = {name: part for name, part in scores.by_category.items() if part.played_N.any()}
        metrics |= {f"{split}/{name}/greedy": float(part.avg_N.mean()) for name, part in parts.items()}
        metrics |= {f"{split}/greedy_lost/{reason}": number for reason, number in sorted(scores.lost.items())}
        greedy = [row[0] for row in scores.to_json()]
    if split in session.privacy.aggregate_splits:
        return HeldOut(metrics, [], [], [], session.benchmark)
    return HeldOut(metrics, sampled.to_json(), greedy, list(sampled.categories), session.benchmark)


def held_out_test(
    session: Session,
    params: dict,
    journal: Journal | None = None,
    keep: Callable[[Scores, Rollouts], None] | None = None,
) -> HeldOut | None:
    """The result on the test tasks of the config; None where it asks for none. keep: as in `held_out`."""
    config = session.config
    if not config.eval.test_tasks:
        return None
    return held_out(session, params, config.tasks.test_split, config.eval.test_tasks, journal, keep)


def validation(session: Session, params: dict, tasks: Sequence[Mapping], journal: Journal | None) -> dict[str, float]:
    """The metrics of an evaluation while training."""
    return score(session, params, tasks, session.config.eval.rollouts, journal=journal)[0].metrics("eval")


def _whole_scenarios(tasks: Sequence[Mapping]) -> tuple[str, ...]:
    """Each task's scenario; "" where fewer of its tasks are here than its "scenario_size" says."""
    names = [str(task.get("scenario", "")) for task in tasks]
    here = Counter(names)
    whole = [here[name] >= task.get("scenario_size", 0) for name, task in zip(names, tasks, strict=True)]
    names = [name if is_whole else "" for name, is_whole in zip(names, whole, strict=True)]
    return tuple(names) if any(names) else ()


def _bounds(name: str, values_N: np.ndarray) -> dict[str, float]:
    if not len(values_N):
        return {}
    low, high = interval(values_N)
    return {f"{name}_low": low, f"{name}_high": high}


def evaluate(config: Config, workdir: str) -> EvaluationResult:
    """`--mode=evaluate`: the newest checkpoint of the workdir, or where it has none what its run would begin with, on
    the test split.

    Writes `evaluation.json` and the sampled episodes into the workdir (which may be another config's run as far as
    `eval.` and `mesh.` go) and prints a table.
    """
    session = Session.open(config, workdir)
    config = session.config
    with open_workdir(session, workdir, continuing.or_of("eval.")) as folder:
        screen = Progress(stream=processes.screen())
        session.watch = Watch(screen, folder.own_file(FAILURES))
        where = folder.run_path
        params, step = restored_params(session, where)
        count, lines = config.eval.test_tasks or config.eval.tasks, []
        if not step and config.fork.path:
            session.trained, said = forked_params(config, folder, session.trained)
            params = session.weights(session.trained)
            lines.append(f"evaluated: {said}")

        def keep(scores: Scores, played: Rollouts) -> None:
            ended = ", ".join(f"{number} {reason}" for reason, number in sorted(scores.ended.items()))
            if config.tasks.test_split in session.privacy.aggregate_splits:
                lines.append(f"episodes: {ended}; not kept: of this split only results as a whole are allowed")
                return
            kept = episode_records(played, Hindsight(), {}, session.algorithm, session.privacy)
            lines.append(f"episodes: {folder.write_episodes(step, kept, kind='evaluation')} ({ended})")

        result = held_out(session, params, config.tasks.test_split, count, keep=keep)
        screen.close()
        folder.write_text("evaluation.json", json.dumps({"step": step, **result.to_json()}) + "\n")
    split, benchmark = config.tasks.test_split, f" of {result.benchmark}" if result.benchmark else ""
    print(f"{config.policy.path} after {step} updates, {split} split{benchmark}:", *session.chat_notes, sep="\n")
    for name, value in result.metrics.items():
        if "/" not in name.removeprefix(f"{split}/"):
            print(f"  {name:20} {value:.4g}")
    by_part = success_results({}, result.metrics, split, config.eval.rollouts)
    if len({line.name for line in by_part}) > 3:  # more than Avg@k, Best@k and greedy success of the split
        print("success, %, with 95 % intervals over tasks (of this one run: other seeds differ by more):")
        for line in by_part:
            print(f"  {line.name:40} {line.cells()[2]}")
    if text := not_played(result.metrics, split):
        lines.append(f"not played: {text}")
    print(*lines, sep="\n")
    return EvaluationResult(where, step, result.metrics, result.success)


def restored_params(session: Session, workdir: AnyPath) -> tuple[dict, int]:
    """The student's weights in the newest checkpoint of a workdir, or the loaded ones, and the number of updates they
    have had.
    """
    step, trained = None, session.trained
    if is_folder(workdir / "checkpoints"):
        checkpoints = Checkpoints.open(workdir, session.config)
        step = checkpoints.latest_step
        if step is not None:
            trained = session.trained = checkpoints.restore_part(step, {"params": session.trained})["params"]
        checkpoints.close()
    if trained is not None and (names := non_finite(trained)):
        raise UserError(
            f"the weights of step {step} in {workdir} hold numbers that are not finite ({', '.join(names[:3])}): they"
            " can be neither evaluated nor exported; give the workdir of an earlier checkpoint"
        )
    return session.weights(trained), step or 0
