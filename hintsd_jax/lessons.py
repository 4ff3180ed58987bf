"""What an update learns from: episodes and hindsight in, rows out, as the method has it.

Here is what tells the methods apart once the loss is chosen: which actions are trained on, what the teacher has read,
and what an action's advantage is. Everything before (rollout, analysis) and after (packing, loss) is the same for all.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.analyser import Analysis, Hindsight
from hintsd_jax.methods import method_of
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import job_key
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training import examples as rows
from hintsd_jax.training.examples import Branch, Row

EPSILON = 1e-6  # of a group's standard deviation


def make_rows(
    config: ConfigDict, chat: ChatFormat, episodes: Sequence[Episode], found: Hindsight, step: int
) -> tuple[list[Row], Counter]:
    """The rows of a training step, and how many episodes have nothing to learn from, by reason: "no_advantage" (all
    rollouts of the task ended alike, or a judge said nothing), "no_advice" (no sibling succeeded, and no feedback). One
    row per episode, or per stream of it where history = template; one per action where batch.layout = rows."""
    analyses = {id(analysis.episode): analysis for analysis in found.analyses}
    grouped = advantages(episodes)
    made, without = [], Counter()
    for n, episode in enumerate(episodes):
        key = lambda purpose: job_key(config.seed, step, f"{purpose} {episode.task_id}", episode.rollout)
        analysis = analyses.get(id(episode), Analysis(episode, ()))
        match method_of(config).trains, method_of(config).asks:
            case "targets", _:
                branches = _advised(config, chat, analysis)
            case "step", _:
                chosen = (
                    random.Random(key("sharpen").tobytes()).randrange(len(episode.steps)) + 1 if episode.steps else None
                )
                branches = rows.plain_branches(episode, [chosen] if chosen else [])
            case "successes", _:
                branches = rows.plain_branches(episode, _all(episode) if episode.success else [])
            case "episodes", "orphans":
                branches = _reprompted(chat, episode, siblings(episodes, episode), analysis)
                without["no_advice"] += not branches
            case _:
                values = analysis.rewards if method_of(config).asks == "steps" else (grouped[n],) * len(episode.steps)
                branches = _reinforced(config, chat, analysis, values)
                without["no_advantage"] += not branches
        # the released code's micro-step is one task
        place = {"index": n, "micro": n // config.tasks.rollouts, "key": tuple(key("dropout").tolist())}
        for row in rows.rows(episode, branches, **place):
            if config.batch.layout == "rows" and any(branch.words for branch in row.branches):
                made += rows.single(row)
            else:
                made.append(rows.alone(row) if config.hindsight.feedback_position == "start" else row)
    return made, +without


def advantages(episodes: Sequence[Episode]) -> list[float]:
    """GRPO's (arXiv 2402.03300): (R - mean) / (std + 1e-6) among the rollouts of a task, with the sample's standard
    deviation; 0 for all where they are equal, or there is only one."""
    rewards: dict[str, list[float]] = {}
    for episode in episodes:
        rewards.setdefault(episode.task_id, []).append(episode.reward)

    def advantage(episode: Episode) -> float:
        group = np.array(rewards[episode.task_id])
        return float((episode.reward - group.mean()) / (group.std(ddof=1) + EPSILON)) if np.ptp(group) > 0 else 0.0

    return [advantage(episode) for episode in episodes]


def siblings(episodes: Sequence[Episode], episode: Episode) -> list[Episode]:
    """The other rollouts of its task that succeeded."""
    return [other for other in episodes if other.task_id == episode.task_id and other is not episode and other.success]


def _all(episode: Episode) -> range:
    return range(1, len(episode.steps) + 1)


def _advised(config: ConfigDict, chat: ChatFormat, analysis: Analysis) -> list[Branch]:
    """The targets' actions, each under its own feedback."""
    episode = analysis.episode
    if config.hindsight.feedback_position == "target":
        return rows.target_branches(episode, analysis.targets, chat)
    return [
        branch
        for target in analysis.targets
        for branch in rows.start_branches(episode, [target.step], target.feedback, chat)
    ]


def _reprompted(chat: ChatFormat, episode: Episode, successes: Sequence[Episode], analysis: Analysis) -> list[Branch]:
    """All actions under one advice at the start: a sibling's success, or else what the analyser says of the whole
    episode.
    """
    if successes:
        text = prompts.solution(successes[0])
    elif analysis.targets:
        text = prompts.whole_advice(analysis.targets)
    else:
        return []
    return rows.start_branches(episode, _all(episode), text, chat)


def _reinforced(config: ConfigDict, chat: ChatFormat, analysis: Analysis, values: Sequence[float]) -> list[Branch]:
    """All actions that have an advantage or feedback; a teacher reads those with feedback."""
    episode = analysis.episode
    taught = {branch.step: branch for branch in _advised(config, chat, analysis)}
    branches = []
    for step, value in zip(_all(episode), values, strict=False):  # a judge without any answer gives no values
        branch = taught.get(step) or dataclasses.replace(*rows.plain_branches(episode, [step]), weight=0.0)
        if branch.words or value:
            branches.append(dataclasses.replace(branch, advantage=value))
    return branches
